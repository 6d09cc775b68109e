"""The kernels of rms_norm and layer_norm: one forward and one backward, over rows of N elements.

Forward, with s = x (+ residual):    h = (s - mean(s)) r,  r = 1 / sqrt(mean((s - mean(s))^2) + eps),  y = h w (+ b).
RMSNorm has 0 in place of mean(s).
Backward, with g = dy w:    ds = r (g - mean(g) - h mean(g h)) (+ the gradient of s as an output),
    dw = sum(dy h),  db = sum(dy).  RMSNorm has no mean(g).

Statistics and sums are in float32, and each output is rounded once. The sum s is rounded to x's dtype before it is
normalised, as in eager PyTorch. Elements moved for M rows: forward 2 M N, with the add 4 M N; backward 3 M N, with the
add 4 M N, because the gradients of x and of the residual are one tensor. A program of the backward kernel takes tiles
of rows at a fixed distance, loads the next rows while it works on the current ones, and at its end writes one row of
partial sums of dw and db.

Eager references: `gptperf.kernels.reference.rms_norm` and `layer_norm`. Sources: Ba, Kiros and Hinton, 2016, eq. 4;
Zhang and Sennrich, 2019, eq. 4.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.column_sum import column_sum
from gptperf.kernels.launch import ceil_div, launch, power_of_2

__all__ = ["MAX_N", "norm_backward", "norm_forward", "warn_too_wide"]

MAX_N = 16384
"""The widest row that a program holds in registers."""
SHARED_BYTES = 98304
"""Shared memory in bytes that the backward pipeline may use: the 99 KB that a program has on Ada and on the small
Blackwells, less what reductions take."""


def forward_shape(N: int, center: bool, has_residual: bool) -> dict[str, int | bool]:
    """Returns the rows, warps and registers of a program, and whether it reads its rows twice (`AGAIN`).

    A program takes several narrow rows or one wide row. Measured on an H200, as a fraction of the speed of a copy:

    - up to 1024 columns: 4096 elements in 4 warps .98 and LayerNorm .965, one row in one or two warps .975 and .957
    - 2048 and 4096 columns: RMSNorm .976 and .978 with a warp for 512, .972 and .959 for 1024; LayerNorm .965 and .960
      for 1024, .952 and .895 for 512; with the add .989 and .967 for 256
    - 8192 columns: RMSNorm .989 in 16 warps that read twice, the best of 216 variants, with registers for four programs
      on a multiprocessor, and .933 with two registers more, for three; LayerNorm .885 with three and .953 with four
    """
    block_n = power_of_2(N)
    shape = {"BLOCK_M": max(1, 512 // block_n), "BLOCK_N": block_n, "AGAIN": False}
    if has_residual:
        return {**shape, "num_warps": min(max(1, block_n // 256), 16)}
    if block_n <= 1024:
        return {**shape, "BLOCK_M": 4096 // block_n, "num_warps": 4}
    if center:
        return {**shape, "num_warps": min(block_n // 1024, 16), **({"maxnreg": 64} if block_n == 8192 else {})}
    if block_n >= 8192:
        return {**shape, "AGAIN": True, "num_warps": 16, **({"maxnreg": 32} if block_n == 8192 else {})}
    return {**shape, "num_warps": block_n // 512}


def backward_shape(M: int, N: int, element_size: int, center: bool, has_dsum: bool) -> tuple[int, dict[str, int]]:
    """Returns the number of programs, and the rows, warps and pipeline stages of each.

    A pipeline stage holds a tile of every tensor that is read, in shared memory. The number of programs is one to three
    times the number of an H200's multiprocessors on every GPU, so that every GPU gives the same bits. The best of
    eleven shapes on an H200, as a fraction of the speed of a copy, for RMSNorm and LayerNorm and then for both with the
    add, compared with 264 programs of 4096 elements with four stages:

    - 65536x512: .911 .895 .939 .926, instead of .877 .845 .916 .883
    - 65536x768: .963 .916 .964 .953, instead of .880 .960 .953 .949; LayerNorm without the add keeps the latter
    - 65536x1024: .972 .960 .985 .978, instead of .875 .848 .958 .944; with a fourth stage no better than that
    - 16384x4096: LayerNorm takes 102 us with 132 programs of 8192 elements, 108 with 264
    """
    block_n = power_of_2(N)
    if block_n <= 256:  # a thread has elements of several rows, which takes more registers per element
        tile, warps, most, stages = 2048, 4, 264, 4
    elif block_n == 512:
        tile, warps, most, stages = 2048, 2, 396, 4
    elif block_n == 1024 and N < 1024 and center and not has_dsum:
        tile, warps, most, stages = 4096, 4, 264, 4
    elif block_n == 1024:
        tile, warps, most, stages = 2048, 4, 396, 4 if N < 1024 else 3
    else:
        tile, warps, most, stages = 8192, 8, 132, 3
    if block_n > tile:
        tile, warps = block_n, 16
    block_m = tile // block_n
    stages = max(1, min(stages, 1 + SHARED_BYTES // (tile * element_size * (3 if has_dsum else 2))))
    programs = min(ceil_div(M, block_m), most)
    return programs, {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


@triton.jit
def _norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD, M, eps,
    N: tl.constexpr, CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not (AGAIN and (CENTER or HAS_RESIDUAL)), "what is read again is x, neither centred nor a sum")
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    # A thread has 4 neighbouring columns, 16 bytes of float32 weights and 8 bytes of x, in one layout for both.
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), 4).to(tl.int64)[None, :]
    mask = cols < N
    if BLOCK_M > 1:
        mask &= (rows < M)[:, None]
    at = rows[:, None] * N + cols
    if AGAIN:
        x = tl.load(X + at, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        x = tl.load(X + at, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        x = (x.to(tl.float32) + residual).to(X.dtype.element_ty)
        tl.store(SUM + at, x, mask=mask)
    h = x.to(tl.float32)
    if CENTER:
        mean = tl.sum(h, axis=1) / N
        tl.store(MEAN + rows, mean, mask=rows < M)
        h = tl.where(mask, h - mean[:, None], 0.0)  # a masked column does not count in the variance
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / N + eps)
    tl.store(RSTD + rows, rstd, mask=rows < M)
    if AGAIN:  # read the row from the cache instead of holding a wide row in registers
        h = tl.load(X + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # The weights are loaded late, because earlier they would take registers from other programs, and they stay in the
    # L1 cache, which the loads of x bypass.
    weight = tl.load(WEIGHT + cols, mask=cols < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = h * rstd[:, None] * weight
    if HAS_BIAS:
        y += tl.load(BIAS + cols, mask=cols < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _norm_backward_kernel(
    DY, DSUM, X, WEIGHT, MEAN, RSTD, DX, PARTIAL, M,
    N: tl.constexpr, CENTER: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    weight = tl.load(WEIGHT + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows[:, None] * N + cols[None, :]
        h = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=rows < M, other=0.0)[:, None]
        if HAS_DSUM:
            dsum = tl.load(DSUM + at, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            h -= tl.load(MEAN + rows, mask=rows < M, other=0.0)[:, None]
        h *= rstd
        g = dy * weight  # dy is 0 in a masked column, so h does not matter there
        if CENTER:
            gh, g_sum = tl.reduce((g * h, g), 1, _add_pairs)
            dx = g - (g_sum / N)[:, None] - h * (gh / N)[:, None]
        else:
            dx = g - h * (tl.sum(g * h, axis=1) / N)[:, None]
        dx *= rstd
        if HAS_DSUM:
            dx += dsum
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        dweight += dy * h
        if HAS_BIAS:
            dbias += dy
    row = tl.program_id(0).to(tl.int64) * (N * (1 + HAS_BIAS))
    tl.store(PARTIAL + row + cols, tl.sum(dweight, axis=0), mask=cols < N)
    if HAS_BIAS:
        tl.store(PARTIAL + row + N + cols, tl.sum(dbias, axis=0), mask=cols < N)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the forward kernel.

    Args:
        x, residual: `(..., N)` in one dtype; residual may be None.
        weight, bias: `(N,)`; bias may be None.
        eps: added to the variance.
        center: True for LayerNorm, False for RMSNorm.

    Returns:
        y and s like x, and mean and rstd `(...)` float32. Without a residual s is empty; without `center` mean is.
    """
    N = x.shape[-1]
    M = x.numel() // max(N, 1)
    x, weight = x.contiguous(), weight.contiguous()
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = torch.empty_like(rstd) if center else rstd.new_empty(0)
    if x.numel():
        shape = forward_shape(N, center, residual is not None)
        flags = {"CENTER": center, "HAS_RESIDUAL": residual is not None, "HAS_BIAS": bias is not None}
        residual = x if residual is None else residual.contiguous()
        tensors = (x, residual, weight, weight if bias is None else bias.contiguous(), y, total, mean, rstd)
        grid = (ceil_div(M, shape["BLOCK_M"]),)
        launch(_norm_forward_kernel, grid, tensors, (M, eps), {"N": N, **flags, **shape})
    return y, total, mean, rstd


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernel and adds up its partial sums.

    Args:
        dy: the gradient of y, `(..., N)`.
        dsum: the gradient of s as an output, like dy, or None.
        x: the tensor that was normalised: s where there was a residual, else x.
        weight: `(N,)`.
        mean: the mean from `norm_forward`; empty for RMSNorm.
        rstd: the rstd from `norm_forward`.
        bias_dtype: the dtype of the bias, or None if there is no bias.

    Returns:
        The gradient of s like x, that of the weight like the weight, and that of the bias `(N,)`, which is empty if
        there is no bias.
    """
    N = x.shape[-1]
    M = x.numel() // max(N, 1)
    dtypes = (weight.dtype, bias_dtype or weight.dtype)
    if not x.numel():
        dbias = weight.new_zeros(0 if bias_dtype is None else N, dtype=dtypes[1])
        return torch.zeros_like(x), torch.zeros_like(weight), dbias
    x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    programs, shape = backward_shape(M, N, x.element_size(), mean.numel() > 0, dsum is not None)
    partial = rstd.new_empty((programs, N if bias_dtype is None else 2 * N))
    flags = {"CENTER": mean.numel() > 0, "HAS_DSUM": dsum is not None, "HAS_BIAS": bias_dtype is not None}
    dsum = dy if dsum is None else dsum.contiguous()
    tensors = (dy, dsum, x, weight, mean, rstd, dx, partial)
    launch(_norm_backward_kernel, (programs,), tensors, (M,), {"N": N, **flags, **shape})
    return dx, *column_sum(partial, N, *dtypes)


def warn_too_wide(op: str, N: int) -> None:
    """Warns, once for each width, that the op runs in eager PyTorch; no warning is possible in a compiled graph."""
    if not torch.compiler.is_compiling():
        _warn_too_wide(op, N)


@functools.cache
def _warn_too_wide(op: str, N: int) -> None:
    message = f"{op}: found rows of {N}, wanted at most {MAX_N} for the Triton kernel; eager PyTorch runs instead"
    warnings.warn(message, stacklevel=4)
