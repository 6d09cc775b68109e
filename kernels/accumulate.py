"""Adds a gradient to the float32 sum of those before it.

    total = total + gradient

It takes one pass with wide accesses. Elements moved for n elements: 2 n of float32, and n of the gradient's dtype.

Eager reference: `gptperf.kernels.reference.accumulate`. There is no backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_accumulate
from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["accumulate"]

BLOCK = 2048
"""Elements of a program."""


@triton.jit
def _accumulate_kernel(TOTAL, GRADIENT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    gradient = tl.load(GRADIENT + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(TOTAL + at, tl.load(TOTAL + at, mask=at < n, other=0.0) + gradient, mask=at < n)


def _forward(total: Tensor, gradient: Tensor) -> None:
    n = total.numel()
    if n:
        constants = {"BLOCK": BLOCK, "num_warps": 8}
        launch(_accumulate_kernel, (ceil_div(n, BLOCK),), (total, gradient.contiguous()), (n,), constants)


_accumulate = register("accumulate(Tensor(a!) total, Tensor gradient) -> ()", _forward, lambda *_: None)


def accumulate(total: Tensor, gradient: Tensor) -> None:
    """Adds a gradient to a sum; see `gptperf.kernels.reference.accumulate`."""
    check_accumulate(total, gradient)
    _accumulate(total, gradient)
