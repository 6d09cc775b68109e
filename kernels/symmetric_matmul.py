"""Products of matrices whose result is symmetric, computed by half.

    y = alpha x z^T + beta add        for each matrix of a batch; z = x, or x z^T is symmetric for another reason

A program computes one square tile on or below the diagonal and writes it twice, the second time transposed, so that y
is symmetric to the bit. If x itself is symmetric, x x^T is its square. Two symmetric matrices with the same
eigenvectors have a symmetric product too. Sums are in float32, and y is rounded once to x's dtype. FLOPs for x
`(B, M, K)`: B M (M + 1) K, and the upper halves of the tiles on the diagonal; a full product has 2 B M M K. Elements
moved: at least B (M K + M M); with z B M K more, with `add` B M M / 2 more.

No gradient. Eager reference: `gptperf.kernels.reference.symmetric_matmul`. It serves the optimizer Muon.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gptperf.kernels.checks import check_symmetric_matmul, check_triton, interpreter_is_on
from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["symmetric_matmul"]


def program_shape(M: int, K: int, itemsize: int) -> dict[str, int]:
    """Returns the side of a tile, the columns of x that a program takes at a time, and warps; there are three stages.

    Large tiles read x least often. A stage of them holds 32 KB, so that three fit into the 96 KB of the smallest GPUs.
    The fastest of 13 in float16 on an H200, 2026-11-30, in turns with torch.baddbmm: 24 products of 2048 x 2048 take
    0.395 ms (8 warps: 0.461; torch 0.598), of 2048 x 5632 1.025 (1.258; 1.686), 48 of 768 x 768 0.064 (0.099; 0.078).
    """
    block, columns = 128 if M >= 512 else 64, 64 if itemsize == 2 else 16
    # On other GPUs 4 warps lack registers, as they do for sizes without a factor of 16, which need masks and an address
    # for each element.
    few = block == 128 and itemsize == 2 and M % 16 == K % 16 == 0 and _is_hopper()
    return {"BLOCK": block, "BLOCK_K": columns, "num_warps": 4 if few else 8}


@functools.cache
def _is_hopper() -> bool:
    """Returns whether the current GPU, or the one that kernels are compiled for, is of the Hopper generation."""
    return not interpreter_is_on() and triton.runtime.driver.active.get_current_target().arch == 90


@triton.jit
def _symmetric_matmul_kernel(
    X, Z, ADD, Y, M, K, row_stride, column_stride, alpha, beta,
    HAS_ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    number, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # Tiles are counted row by row of the triangle, so row i begins with number i (i + 1) / 2. The square root may be
    # off by a rounding.
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    rows = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    columns = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K).to(tl.int64)
    left = X + matrix * M * K + rows[:, None] * row_stride + lanes[None, :] * column_stride
    right = Z + matrix * M * K + columns[None, :] * row_stride + lanes[:, None] * column_stride
    total, step = tl.zeros((BLOCK, BLOCK), tl.float32), tl.full((), BLOCK_K, tl.int64) * column_stride
    for start in range(0, K, BLOCK_K):
        inside = lanes < K - start
        a = tl.load(left, mask=(rows[:, None] < M) & inside[None, :], other=0.0)
        b = tl.load(right, mask=(columns[None, :] < M) & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left, right = left + step, right + step
    if i == j:  # the order of a sum may differ on the two sides of the diagonal
        total = tl.where(rows[:, None] >= columns[None, :], total, tl.trans(total))
    total *= alpha
    mask = (rows[:, None] < M) & (columns[None, :] < M)
    at = matrix * M * M + rows[:, None] * M + columns[None, :]
    if HAS_ADD:
        total += beta * tl.load(ADD + at, mask=mask, other=0.0).to(tl.float32)
    y = total.to(Y.dtype.element_ty)
    tl.store(Y + at, y, mask=mask)
    if i > j:
        mirrored = matrix * M * M + columns[:, None] * M + rows[None, :]
        tl.store(Y + mirrored, tl.trans(y), mask=(columns[:, None] < M) & (rows[None, :] < M))


def _forward(x: Tensor, z: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    B, M, K = x.shape
    y = _forward_fake(x, z, add, alpha, beta)
    if y.numel():
        constants = {"HAS_ADD": add is not None, **program_shape(M, K, x.element_size())}
        tiles = ceil_div(M, constants["BLOCK"])
        grid = (tiles * (tiles + 1) // 2, B)
        tensors = (x, x if z is None else z, x if add is None else add, y)
        numbers = (M, K, x.stride(1), x.stride(2), alpha, beta)
        launch(_symmetric_matmul_kernel, grid, tensors, numbers, constants)
    return y


def _forward_fake(x: Tensor, z: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[1]))


_symmetric_matmul = register(
    "symmetric_matmul(Tensor x, Tensor? z, Tensor? add, float alpha, float beta) -> Tensor", _forward, _forward_fake
)


@register_flop_formula(torch.ops.gptperf.symmetric_matmul)
def _flops(x: torch.Size, *_: Any, **__: Any) -> int:
    return x[0] * x[1] * (x[1] + 1) * x[2]


def symmetric_matmul(
    x: Tensor, z: Tensor | None = None, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Returns alpha x z^T + beta add; see `gptperf.kernels.reference.symmetric_matmul` for arguments and errors."""
    check_symmetric_matmul(x, z, add)
    check_triton("symmetric_matmul", x)
    return _symmetric_matmul(x, z, add, alpha, beta)
