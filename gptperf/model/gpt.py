"""The GPT: embedding, blocks, head and loss. Shapes: B batch, T tokens, C n_embd, V padded vocabulary."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptperf.config import ModelConfig
from gptperf.kernels.reference import softcapped
from gptperf.model.attention import KVCache
from gptperf.model.linear import Linear, decode_layer
from gptperf.model.mask import document_starts, make_masks
from gptperf.model.norm import NORMS
from gptperf.model.recompute import CHECKPOINT_OPTIONS
from gptperf.ops import Ops, resolve_ops
from gptperf.registry import component

__all__ = ["GPT", "Units"]


class Units(Protocol):
    """Provides the weights of a model if they are not always in memory, as under FSDP.

    Unit 0 is the embeddings, unit i + 1 is block i, and the last unit is the rest: the last norm and the head.
    """

    def enter(self, unit: int) -> None:
        """Provides the weights of a unit. The model calls it before it reads them."""

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        """Ends the forward pass of a block. The backward pass of the block begins when its outputs get gradients."""


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: sizes and components.
        ops: the implementations of the fused ops; default: eager PyTorch.
    """

    def __init__(self, config: ModelConfig, ops: Ops | None = None):
        super().__init__()
        ops = ops or resolve_ops("eager", "cpu")
        self.config = config
        self.windows = config.windows
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position = component("position_encoding", config.position_encoding)(config, ops)
        self.dropout = nn.Dropout(config.dropout)
        block = component("norm_position", config.norm_position)
        self.blocks = nn.ModuleList(block(config, ops) for _ in range(config.n_layer))
        self.norm = component("normalization", config.normalization)(config, ops)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.wte.weight
        self.loss, self.draw, self.decode_linear = ops.linear_cross_entropy, ops.draw, ops.decode_linear
        self.recomputed: Callable[..., tuple[Tensor, Tensor]] = checkpoint
        """Function that runs a block whose activations backward computes again."""
        self.document_end: int | None = None
        """Id of the token that ends a document; attention then stays inside a document. None: documents are mixed."""
        self.units: Units | None = None
        """Provider of the weights of each unit, or None if they are always in memory."""
        self.recompute = "none"
        """What backward computes again: "none", "selective" (norms and activations) or "full" (whole blocks)."""
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws matrices from N(0, 0.02) and zeroes biases.

        The projections into the residual stream, two for each block, are drawn from N(0, 0.02 / sqrt(2 n_layer))
        (Radford et al., 2019, section 2.3), or zeroed with `residual_init` zero: the blocks then begin as the identity.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                into_residual = name.endswith(("attention.out.weight", "ffn.out.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02
                nn.init.normal_(parameter, std=std)  # zeroed or not: other matrices have the same values
                if into_residual and self.config.residual_init == "zero":
                    nn.init.zeros_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile_blocks(self) -> None:
        """Compiles every block, the last norm and the loss, each as a separate graph."""
        if self.recompute == "selective":  # the choice among a block's ops has to be part of the block's graph
            self.recomputed = torch.compile(checkpoint)
        for block in self.blocks:
            block.compile()
        self.norm.compile()
        self.loss = torch.compile(self.loss)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        caches: list[KVCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Computes the mean loss if targets are given, else the logits.

        Args:
            tokens: `(B, T)` int64.
            targets: `(B, T)` int64, or None; -100 does not count in the mean.
            caches: one cache for each block, or None; with caches, `tokens` follow the cached tokens. Caches with
                `positions` take one token of each sequence.
            last_only: compute the logits of the last token alone.

        Returns:
            The loss as a float32 scalar, or logits `(B, T, V)`; `(B, 1, V)` with `last_only`.
        """
        if targets is None and caches and caches[0].positions is not None:
            return self._step(*self._stream(tokens, caches))
        x = self.hidden(tokens, caches)
        if targets is None:
            return self.logits(x[:, -1:] if last_only else x)
        return self.loss(x, self.lm_head.weight, targets, softcap=self.config.logit_softcap)

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Returns the output of the last norm `(B, T, C)`; the arguments are those of `forward`."""
        return self.norm(*self._stream(tokens, caches))[0]

    def _stream(self, tokens: Tensor, caches: list[KVCache] | None) -> tuple[Tensor, Tensor | None]:
        """Returns the output of the last block: two tensors to add, or one and None."""
        cached = caches[0].length if caches else 0
        start: int | Tensor = cached
        T = cached + tokens.shape[1]
        if caches and caches[0].positions is not None:
            start, T = caches[0].positions, caches[0].size
        starts = document_starts(tokens, self.document_end) if self.document_end is not None and not caches else None
        flex = tokens.device if tokens.is_cuda and not caches and T % 128 == 0 else None
        masks = make_masks(self.windows, T, starts, flex)
        if self.units is not None:
            self.units.enter(0)
        x = self.dropout(
            self.position.embed(self.wte(tokens), start, *(() if starts is None else (starts,)))
        )  # (B, T, C)
        residual = None
        for i, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            limits = {} if mask is None else {"mask": mask}
            if self.units is not None:
                self.units.enter(i + 1)
            if self.recompute != "none" and caches is None and torch.is_grad_enabled():
                x, residual = self.recomputed(
                    block, x, residual, self.position, **limits, **CHECKPOINT_OPTIONS[self.recompute]
                )
            else:
                x, residual = block(x, residual, self.position, caches[i] if caches else None, **limits)
            if self.units is not None:
                self.units.leave(i + 1, (x, residual))
        if self.units is not None:
            self.units.enter(len(self.blocks) + 1)
        return x, residual

    def _step(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Returns the logits of a decode step `(B, 1, V)` from the output of the last block."""
        if self.training or type(self.norm) not in NORMS or not self.lm_head.decodes(x):
            return self.logits(self.norm(x, residual)[0])
        x = x if residual is None else x + residual
        logits = decode_layer(self.decode_linear, x, self.lm_head, self.norm)
        return softcapped(logits, self.config.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits `(..., V)` of outputs of the last norm `(..., C)`."""
        return softcapped(self.lm_head(hidden), self.config.logit_softcap)
