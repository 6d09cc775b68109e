"""Causal self-attention: the backends, the layer and its key-value cache.

Shapes: B batch, T query tokens, S key tokens, C n_embd, H query heads, K key and value heads, D head_dim. The queries
are the last T of the S tokens; a query attends to its own token and to those before it.
"""

import contextlib
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptperf.config import ModelConfig
from gptperf.model.linear import Linear
from gptperf.model.mask import Mask, flex
from gptperf.model.position import NoPosition
from gptperf.registry import built_in, component

__all__ = ["Attention", "FlashAttention", "KVCache", "ManualAttention", "SDPA", "prefers_cudnn"]


def prefers_cudnn(capability: tuple[int, int]) -> bool:
    """Returns whether SDPA tries cuDNN's kernel first, which it does on Hopper and on Blackwell's data-centre GPUs.

    On an H200 that kernel is 1.6 to 1.8 times as fast as FlashAttention-2, forward and backward, with head_dim 64 and
    128.
    """
    return capability[0] in (9, 10)


_CAUSAL = Mask(None, None, None)


@built_in("attention_backend", "sdpa")
class SDPA(nn.Module):
    """PyTorch's scaled_dot_product_attention; on a GPU, FlexAttention for windows and documents.

    Windows and documents with dropout, or where FlexAttention does not run, use a mask of T x T elements.
    """

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

    @property
    def drops(self) -> bool:
        """Whether dropout applies now."""
        return self.training and self.dropout > 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Returns the attention output `(B, T, H, D)` for q `(B, T, H, D)`, and k and v `(B, S, K, D)`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.drops else 0.0
        if mask is not None and mask.blocks is not None and dropout == 0:
            return flex(q, k, v, mask.blocks, self.grouped).transpose(1, 2)
        T, S = q.shape[2], k.shape[2]
        causal = T == S and mask is None
        seen = None if causal or (T == 1 and mask is None) else (mask or _CAUSAL).dense(T, S, q.device)
        with self._backends(q):
            y = F.scaled_dot_product_attention(q, k, v, seen, dropout, causal, enable_gqa=self.grouped)
        return y.transpose(1, 2)

    def _backends(self, q: Tensor) -> contextlib.AbstractContextManager[None]:
        if self.training and self.dropout == 1:  # the fused kernels divide by 1 - dropout
            return sdpa_kernel(SDPBackend.MATH)
        if q.is_cuda and prefers_cudnn(torch.cuda.get_device_capability(q.device)):
            return sdpa_kernel(self.PREFER_CUDNN, set_priority=True)
        return contextlib.nullcontext()


@built_in("attention_backend", "manual")
class ManualAttention(nn.Module):
    """Attention written out in plain ops, for reading and testing. It keeps the matrix of scores in memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Returns the attention output `(B, T, H, D)` for q `(B, T, H, D)`, and k and v `(B, S, K, D)`."""
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~(mask or _CAUSAL).dense(q.shape[1], k.shape[1], q.device), -torch.inf)
        weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), self.dropout, self.training)
        return torch.einsum("bhts,bshd->bthd", weights, v)


@built_in("attention_backend", "flash_attn")
class FlashAttention(nn.Module):
    """The attention of the package flash-attn, which must be installed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from flash_attn import flash_attn_func

        self.function = flash_attn_func
        self.dropout = config.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Returns the attention output `(B, T, H, D)` for q `(B, T, H, D)`, and k and v `(B, S, K, D)`."""
        limits: dict[str, tuple[int, int]] = {}
        if mask is not None:
            assert mask.starts is None, "the configuration refuses document_mask with flash_attn"
            assert mask.window is not None
            limits = {"window_size": (mask.window - 1, 0)}
        return self.function(q, k, v, dropout_p=self.dropout if self.training else 0.0, causal=True, **limits)


class KVCache:
    """The keys and values of one attention layer during generation, in buffers of a fixed size.

    Args:
        size: the most positions that it holds.
        buffers: memory for keys and values `(B, size, K, D)`; None: allocated with the first tokens.
        positions: `(B,)` int64 on the device, the position of each sequence's next token. Then the sequences take one
            token at a time, at positions that may differ. None: all sequences take the same number of tokens.
    """

    def __init__(
        self, size: int, buffers: tuple[Tensor, Tensor] | None = None, positions: Tensor | None = None
    ) -> None:
        self.size, self.length = size, 0
        """The number of positions that it can hold, and that it holds; the length does not count with `positions`."""
        self.buffers, self.positions = buffers, positions

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v `(B, T, K, D)`, and returns the keys and values of all positions `(B, S, K, D)`."""
        start, self.length = self.length, self.length + k.shape[1]
        assert self.length <= self.size, "the cache is full"
        if self.buffers is None:
            B, _, K, D = k.shape
            self.buffers = k.new_empty(B, self.size, K, D), v.new_empty(B, self.size, K, D)
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[:, start : self.length] = new
        all_k, all_v = self.buffers
        return all_k[:, : self.length], all_v[:, : self.length]


class Attention(nn.Module):
    """The attention layer: packed projection, position encoding, attention, output projection.

    H D may be another width than C.

    With `qk_norm`, queries and keys are RMS-normalised over each head before they are rotated.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.head_width
        packed = config.query_width, config.kv_width, config.kv_width
        self.qkv = Linear(C, sum(packed), bias=config.attention_biases != "none", packed=packed)
        self.out = Linear(config.query_width, C, bias=config.attention_biases == "all")
        self.q_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.backend = component("attention_backend", config.attention_backend)(config)

    def forward(
        self, x: Tensor, position: NoPosition, cache: KVCache | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Returns the output `(B, T, C)` for x `(B, T, C)`; with a cache, x has the tokens after the cached ones."""
        if cache is not None and cache.positions is not None:
            return self.out(self.decode(self.qkv(x), position, cache, mask))
        packed = self.qkv(x)
        if cache is None and mask is None and type(self.backend) is SDPA and not self.backend.drops:
            y = position.attend(packed, self.q_norm, self.k_norm)
            if y is not None:
                return self.out(y.flatten(2))
        start = 0 if cache is None else cache.length
        q, k, v = position.split(packed, self.q_norm, self.k_norm, start)  # (B, T, H, D), twice (B, T, K, D)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.backend(q, k, v) if mask is None else self.backend(q, k, v, mask)
        return self.out(y.flatten(2))

    def decode(self, packed: Tensor, position: NoPosition, cache: KVCache, mask: Mask | None) -> Tensor:
        """Returns the attention `(B, 1, H D)` of one token of each sequence, from its packed projection."""
        assert cache.buffers is not None
        assert cache.positions is not None
        window = 0 if mask is None or mask.window is None else mask.window
        return position.decode(packed, self.q_norm, self.k_norm, cache.buffers, cache.positions, window)
