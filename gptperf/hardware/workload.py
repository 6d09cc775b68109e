"""The workloads that are measured for a model's ceilings: its GEMMs, its attention and copies, as plain sizes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from gptperf import flops
from gptperf.config import ModelConfig
from gptperf.errors import ConfigError
from gptperf.flops.matmuls import linears

__all__ = ["COPY_BYTES", "PROTOCOL", "VERSION", "CausalAttention", "Copy", "Gemm", "Timer", "Work"]
__all__ += ["copy_name", "gemm_list", "workload", "workload_key"]

VERSION = 1
"""Version of the protocol and of the cache file. A file of another version is not read."""
PROTOCOL = (
    "fresh normal random numbers; a window is launches one by one, at least 300 ms between two CUDA events; a round "
    "gives every work one window, so that kinds alternate; one round of warm-up, then 5; median, 10th and 90th "
    "percentile; a mean over GEMMs weights them by FLOPs; attention counts the causal half, backward twice forward; a "
    "copy counts bytes read and written, of the fastest of three copies"
)
"""How `gptperf.hardware.measure` measures. The text is part of the key of a measurement."""
COPY_BYTES = (2_000_000_000, 256_000_000)
"""Sizes in bytes of the buffers that are copied."""

_SQUARE = 8192

Timer = Callable[[int], float]
"""Number of launches -> milliseconds from the start of the first to the end of the last."""


@dataclass(frozen=True)
class Gemm:
    """A matmul (m, k) x (k, n), which a step of one micro-batch runs `count` times."""

    name: str
    kind: str
    """forward (the second operand is a transposed view), dgrad (neither is) or wgrad (the first is)."""
    m: int
    n: int
    k: int
    count: int

    @property
    def amount(self) -> int:
        """FLOPs of one call."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class CausalAttention:
    """The model's causal attention in one layer, for one micro-batch."""

    name: str
    """attention_forward or attention_backward."""
    batch_size: int
    tokens: int
    n_head: int
    kv_heads: int
    head_dim: int

    @property
    def amount(self) -> int:
        """FLOPs of one call: the causal half of both products, and twice that for backward."""
        pairs = self.batch_size * self.n_head * self.tokens * (self.tokens + 1) // 2
        return 2 * 2 * pairs * self.head_dim * (2 if self.name == "attention_backward" else 1)


@dataclass(frozen=True)
class Copy:
    """A copy of `buffer_bytes` on the device."""

    name: str
    buffer_bytes: int

    @property
    def amount(self) -> int:
        """Bytes that one call reads and writes."""
        return 2 * self.buffer_bytes


Work = Gemm | CausalAttention | Copy


def gemm_list(model: ModelConfig, batch_size: int) -> tuple[Gemm, ...]:
    """Returns every GEMM of a training step with one micro-batch, with its count.

    Raises:
        ConfigError: the FFN component has no card in `gptperf.cards`, so that its matmuls are not known.
    """
    reason = flops.uncountable_flops(model)
    if reason is not None:
        raise ConfigError(f"the GEMMs of the model are not known: {reason}")
    tokens, gemms = batch_size * model.block_size, []
    for _, (name, out, into), count in linears(model):
        gemms += [
            Gemm(f"{name}_forward", "forward", tokens, out, into, count),
            Gemm(f"{name}_dgrad", "dgrad", tokens, into, out, count),
            Gemm(f"{name}_wgrad", "wgrad", out, into, tokens, count),
        ]
    return tuple(gemms)


def copy_name(buffer_bytes: int) -> str:
    """Returns the name of the copy of a buffer of this size."""
    return f"copy_{buffer_bytes // 1_000_000}mb"


def workload(model: ModelConfig, batch_size: int) -> tuple[Work, ...]:
    """Returns all workloads that are measured for a model.

    Raises:
        ConfigError: as in `gemm_list`.
    """
    sizes = (batch_size, model.block_size, model.n_head, model.kv_heads, model.head_width)
    return (
        *gemm_list(model, batch_size),
        Gemm("square", "forward", _SQUARE, _SQUARE, _SQUARE, 0),
        CausalAttention("attention_forward", *sizes),
        CausalAttention("attention_backward", *sizes),
        *(Copy(copy_name(size), size) for size in COPY_BYTES),
    )


def workload_key(model: ModelConfig, batch_size: int) -> str:
    """Returns a hash of the workloads and of the protocol."""
    works = [dataclasses.astuple(work) for work in workload(model, batch_size)]
    text = json.dumps([VERSION, PROTOCOL, model.attention_backend, works])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
