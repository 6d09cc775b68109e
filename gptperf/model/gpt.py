"""The GPT: norm, position encoding, attention, FFN, block, model, read top to bottom.

Shapes: B batch, T tokens, C n_embd, H query heads, K key and value heads, D head_dim, F FFN width, V padded vocabulary.
Blocks pass on a branch and the residual stream apart from each other, so that every residual add runs inside the norm
that follows it.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gptperf.config import ModelConfig
from gptperf.ops import Ops, resolve_ops
from gptperf.registry import component, register_built_in

__all__ = ["GPT", "KVCache", "prefers_cudnn"]


class RMSNorm(nn.Module):
    """RMSNorm with a weight; with a residual, of the sum."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.norm_eps
        self.op = ops.rms_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual `(B, T, C)` -> the normed sum and the sum."""
        return (
            (self.op(x, self.weight, self.eps), x) if residual is None else self.op(x, self.weight, self.eps, residual)
        )


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias; with a residual, of the sum."""

    has_bias: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if self.has_bias else None
        self.eps = config.norm_eps
        self.op = ops.layer_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual `(B, T, C)` -> the normed sum and the sum."""
        if residual is None:
            return self.op(x, self.weight, self.bias, self.eps), x
        return self.op(x, self.weight, self.bias, self.eps, residual)


class LayerNormNoBias(LayerNorm):
    """LayerNorm with a weight alone."""

    has_bias = False


class NoPosition(nn.Module):
    """No position encoding: heads are split, queries and keys normalised if asked, nothing is added."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.heads = (config.n_head, config.kv_heads)
        self.eps = config.norm_eps
        self.norm = ops.rms_norm

    def embed(self, x: Tensor, start: int) -> Tensor:
        """Token embeddings `(B, T, C)` of positions start, start + 1, ... -> the model's input."""
        return x

    def split(self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, start: int) -> tuple[Tensor, ...]:
        """Packed projection `(B, T, (H + 2K) D)` -> q `(B, T, H, D)`, k and v `(B, T, K, D)`."""
        H, K = self.heads
        q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)
        if q_weight is not None:
            q, k = self.norm(q, q_weight, self.eps), self.norm(k, k_weight, self.eps)
        return q, k, v


class LearnedAbsolute(NoPosition):
    """A learned vector for each position, added to the token embedding."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__(config, ops)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x + self.wpe.weight[start : start + x.shape[1]].to(x.dtype)


class RoPE(NoPosition):
    """Rotary position encoding of queries and keys; one pair of float32 tables for the whole model."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__(config, ops)
        self.interleaved = config.rope_pairs == "interleaved"
        self.op = ops.rope
        D = config.head_dim
        inverse = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * inverse  # (T, D/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def split(self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, start: int) -> tuple[Tensor, ...]:
        H, K = self.heads
        return self.op(qkv, self.cos[start:], self.sin[start:], H, K, q_weight, k_weight, self.eps, self.interleaved)


def prefers_cudnn(capability: tuple[int, int]) -> bool:
    """Whether SDPA tries cuDNN's kernel first: on Hopper and on Blackwell's data-centre GPUs.

    On an H200 it is 1.6 to 1.8 times as fast as FlashAttention-2, both directions, head_dim 64 and 128.
    """
    return capability[0] in (9, 10)


class SDPA(nn.Module):
    """PyTorch's scaled_dot_product_attention."""

    PREFER_CUDNN: ClassVar[list[SDPBackend]] = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.grouped = config.kv_heads != config.n_head

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `(B, T, H, D)`, k and v `(B, S, K, D)`, causal from the last row -> `(B, T, H, D)`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = q.shape[2] == k.shape[2]
        mask = None if causal or q.shape[2] == 1 else _causal_mask(q.shape[2], k.shape[2], q.device)
        with self._backends(q):
            y = F.scaled_dot_product_attention(
                q, k, v, mask, self.dropout if self.training else 0.0, causal, enable_gqa=self.grouped
            )
        return y.transpose(1, 2)

    def _backends(self, q: Tensor) -> contextlib.AbstractContextManager[None]:
        if self.training and self.dropout == 1:  # the fused kernels divide by what is left
            return sdpa_kernel(SDPBackend.MATH)
        if q.is_cuda and prefers_cudnn(torch.cuda.get_device_capability(q.device)):
            return sdpa_kernel(self.PREFER_CUDNN, set_priority=True)
        return contextlib.nullcontext()


class ManualAttention(nn.Module):
    """Attention written out; the score matrix is kept in memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `(B, T, H, D)`, k and v `(B, S, K, D)`, causal from the last row -> `(B, T, H, D)`."""
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~_causal_mask(q.shape[1], k.shape[1], q.device), -torch.inf)
        weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), self.dropout, self.training)
        return torch.einsum("bhts,bshd->bthd", weights, v)


class FlashAttention(nn.Module):
    """The package flash-attn."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from flash_attn import flash_attn_func

        self.function = flash_attn_func
        self.dropout = config.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `(B, T, H, D)`, k and v `(B, S, K, D)`, causal from the last row -> `(B, T, H, D)`."""
        return self.function(q, k, v, dropout_p=self.dropout if self.training else 0.0, causal=True)


def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """`(T, S)`, true where the query may look; the last query sees every key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class Attention(nn.Module):
    """Packed projection, position encoding, attention, output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D, K = config.n_embd, config.head_dim, config.kv_heads
        self.qkv = nn.Linear(C, C + 2 * K * D, bias=config.bias)
        self.out = nn.Linear(C, C, bias=config.bias)
        self.q_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.backend = component("attention_backend", config.attention_backend)(config)

    def forward(self, x: Tensor, position: NoPosition, cache: "KVCache | None" = None) -> Tensor:
        """x `(B, T, C)` -> `(B, T, C)`."""
        start = 0 if cache is None else cache.length
        q, k, v = position.split(self.qkv(x), self.q_norm, self.k_norm, start)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(self.backend(q, k, v).flatten(2))


class KVCache:
    """Keys and values of one attention layer during generation."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v `(B, T, K, D)`; returns those of every position so far."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=1)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=1)
        return self.k, self.v


class StandardFFN(nn.Module):
    """up, activation, down."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.out = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)
        self.activation = component("activation", config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x `(B, T, C)` -> `(B, T, C)`."""
        return self.out(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """silu(gate) * up, down; gate and up are one projection."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_width, bias=config.bias)
        self.out = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)
        self.op = ops.swiglu

    def forward(self, x: Tensor) -> Tensor:
        """x `(B, T, C)` -> `(B, T, C)`."""
        return self.op(self.gate_up(x), self.out.weight, self.out.bias)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the second add is left to the next norm."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        norm = component("normalization", config.normalization)
        self.norm1 = norm(config, ops)
        self.attention = Attention(config)
        self.norm2 = norm(config, ops)
        self.ffn = component("ffn_type", config.ffn_type)(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, residual: Tensor | None, position: NoPosition, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Branch x and residual `(B, T, C)`, whose sum is the block's input -> those whose sum is its output."""
        x, residual = self.norm1(x, residual)
        x = self.dropout(self.attention(x, position, cache))
        x, residual = self.norm2(x, residual)
        return self.dropout(self.ffn(x)), residual


class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + ffn(x)); the residual stream is the last norm's output."""

    def forward(
        self, x: Tensor, residual: Tensor | None, position: NoPosition, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Input x `(B, T, C)`, no residual -> the output, no residual."""
        x, _ = self.norm1(self.dropout(self.attention(x, position, cache)), x)
        x, _ = self.norm2(self.dropout(self.ffn(x)), x)
        return x, None


_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
}
"""Ops whose outputs selective recomputation keeps: matrix products and attention."""


def _selective(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS: dict[str, dict[str, Any]] = {
    "full": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, _selective),
    },
}

_BUILT_IN: dict[str, dict[str, type[nn.Module] | Callable[[Tensor], Tensor]]] = {
    "normalization": {"layernorm": LayerNorm, "layernorm_nobias": LayerNormNoBias, "rmsnorm": RMSNorm},
    "activation": {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "relu_squared": lambda x: F.relu(x).square(),
    },
    "position_encoding": {"learned_absolute": LearnedAbsolute, "rope": RoPE, "none": NoPosition},
    "attention_backend": {"sdpa": SDPA, "manual": ManualAttention, "flash_attn": FlashAttention},
    "norm_position": {"pre": PreNormBlock, "post": PostNormBlock},
    "ffn_type": {"standard": StandardFFN, "swiglu": SwiGLU},
}
register_built_in(_BUILT_IN)


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
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
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
                x, residual = self.recomputed(block, x, residual, self.position, **_CONTEXTS[self.recompute])
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
