"""The GPT: embedding, blocks, head and loss. Shapes: B batch, T tokens, C n_embd, V padded vocabulary."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptperf.config import ModelConfig
from gptperf.model.attention import KVCache
from gptperf.model.linear import Linear
from gptperf.model.recompute import CHECKPOINT_OPTIONS
from gptperf.ops import Ops, resolve_ops
from gptperf.registry import component

__all__ = ["GPT", "Units"]


class Units(Protocol):
    """Who provides the weights of a model that are not always there."""

    def enter(self, unit: int) -> None:
        """The weights of a unit are about to be read."""

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        """A block has given its outputs; their gradients come when its backward is about to begin."""


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: sizes and components.
        ops: implementations of the fused ops; default: eager PyTorch.
    """

    def __init__(self, config: ModelConfig, ops: Ops | None = None):
        super().__init__()
        ops = ops or resolve_ops("eager", "cpu")
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position = component("position_encoding", config.position_encoding)(config, ops)
        self.dropout = nn.Dropout(config.dropout)
        block = component("norm_position", config.norm_position)
        self.blocks = nn.ModuleList(block(config, ops) for _ in range(config.n_layer))
        self.norm = component("normalization", config.normalization)(config, ops)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.wte.weight
        self.loss = ops.linear_cross_entropy
        self.recomputed: Callable[..., tuple[Tensor, Tensor]] = checkpoint
        self.units: Units | None = None
        """Is told before the weights of a unit are read: 0 before the blocks, i + 1 block i, then the rest."""
        self.recompute = "none"
        """What backward computes again: "none", "selective" (norms and activations) or "full" (the blocks)."""
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices N(0, 0.02), the projections into the residual stream N(0, 0.02 / sqrt(2 n_layer)), biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                into_residual = name.endswith(("attention.out.weight", "ffn.out.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile_blocks(self) -> None:
        """Compile every block, the last norm and the loss apart from each other."""
        if self.recompute == "selective":  # what is kept is chosen among the ops of a block, so in its graph
            self.recomputed = torch.compile(checkpoint)
        for block in self.blocks:
            block.compile()
        self.norm.compile()
        self.loss = torch.compile(self.loss)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, caches: list[KVCache] | None = None) -> Tensor:
        """Mean loss where targets are given, logits otherwise.

        Args:
            tokens: `(B, T)` int64.
            targets: `(B, T)` int64; -100 is left out of the mean.
            caches: one a block; tokens are then those after the cached ones.

        Returns:
            A float32 scalar, or logits `(B, T, V)`.
        """
        start = caches[0].length if caches else 0
        if self.units is not None:
            self.units.enter(0)
        x = self.dropout(self.position.embed(self.wte(tokens), start))  # (B, T, C)
        residual = None
        for i, block in enumerate(self.blocks):
            if self.units is not None:
                self.units.enter(i + 1)
            if self.recompute != "none" and caches is None and torch.is_grad_enabled():
                x, residual = self.recomputed(block, x, residual, self.position, **CHECKPOINT_OPTIONS[self.recompute])
            else:
                x, residual = block(x, residual, self.position, caches[i] if caches else None)
            if self.units is not None:
                self.units.leave(i + 1, (x, residual))
        if self.units is not None:
            self.units.enter(len(self.blocks) + 1)
        x, _ = self.norm(x, residual)
        if targets is None:
            return self.lm_head(x)
        return self.loss(x, self.lm_head.weight, targets)
