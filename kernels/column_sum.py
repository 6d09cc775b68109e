"""Sums the rows of a float32 matrix in an order that depends on its shape alone.

    y[n] = x[0, n] + x[1, n] + ... + x[P - 1, n]

Each program of a backward kernel writes one row of partial sums instead of adding with atomics; this kernel adds the
rows up to the gradient of a weight. The sums are in float32, and each result is rounded once. Elements moved: P N read
and N written; the rows are still in the L2 cache.

Reference: `torch.sum(x, 0)`. There is no backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.launch import ceil_div, launch, power_of_2

__all__ = ["column_sum"]

ROWS = 1024
"""Largest number of rows that one program sums; more rows take a second pass."""
COLUMNS = 16
"""Columns of a program: 64 bytes, or two sectors. The number is small, so that even N = 768 gives 48 programs."""


@triton.jit
def _column_sum_kernel(X, Y, Z, P, N, split, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    part = tl.program_id(1).to(tl.int64)
    rows = part * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < P)[:, None] & (cols < N)[None, :]
    sums = tl.sum(tl.load(X + rows[:, None] * N + cols[None, :], mask=mask, other=0.0), axis=0)
    tl.store(Y + part * split + cols, sums.to(Y.dtype.element_ty), mask=cols < split)
    tl.store(Z + part * (N - split) + (cols - split), sums.to(Z.dtype.element_ty), mask=(cols >= split) & (cols < N))


def column_sum(x: Tensor, split: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over the first dimension, and splits the result in two.

    Args:
        x: `(P, N)` float32, contiguous, P >= 1.
        split: number of columns in the first result, 0..N.
        dtypes: the dtypes of the two results, or one dtype for both.

    Returns:
        The sums of the first `split` columns `(split,)` and those of the others `(N - split,)`. The same x gives the
        same bits on every GPU.
    """
    P, N = x.shape
    while P > ROWS:
        passes = ceil_div(P, ROWS)
        y = x.new_empty((passes, N))
        _launch(x, y, y, P, N, N, passes)
        x, P = y, passes
    y, z = x.new_empty(split, dtype=dtypes[0]), x.new_empty(N - split, dtype=dtypes[-1])
    _launch(x, y, z, P, N, split, 1)
    return y, z


def _launch(x: Tensor, y: Tensor, z: Tensor, P: int, N: int, split: int, passes: int) -> None:
    block = min(ROWS, power_of_2(P))
    constants = {"BLOCK_P": block, "BLOCK_N": COLUMNS, "num_warps": 8 if block > 256 else 4}
    launch(_column_sum_kernel, (ceil_div(N, COLUMNS), passes), (x, y, z), (P, N, split), constants)
