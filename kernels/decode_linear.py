"""A linear layer of a few rows, as a step of text generation has them, with the norm before it and what follows it.

    y = f(norm(x) W^T (+ b)) (+ residual)

The time is that of reading W. So a program takes a few rows of W and loads all of them at once, 16 bytes at a time. x
is small, and every program normalises it again, which costs less than a kernel of its own. A GPU that launches a kernel
early loads W while the previous kernel still computes x.

Sums are in float32, in one order for any number of rows, and y is rounded once. Elements moved for M rows: N K of W;
M K of x for each program come from the cache.

Eager reference: `gptperf.kernels.reference.decode_linear`. There is no backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.activation import _value
from gptperf.kernels.checks import check_decode_linear, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register, wait_for_previous

__all__ = ["decode_linear"]

BYTES = 128
"""Bytes of W that a thread holds."""
PROGRAMS = 264
"""A program takes fewer rows of W where there would be fewer programs: two for each multiprocessor of an H200."""


def program_shape(N: int, K: int, element_size: int, matrices: int) -> dict[str, int]:
    """Returns the rows, columns and warps of a program.

    Args:
        N: rows of y.
        K: columns of W.
        element_size: bytes of an element of W.
        matrices: 2 where a program takes rows of both halves of W, else 1.
    """
    block_k = max(16, power_of_2(K))
    warps = 4 if block_k <= 2048 else 8 if block_k <= 8192 else 16
    block_n = max(1, BYTES * 32 * warps // (matrices * block_k * element_size))
    while block_n > 1 and ceil_div(N, block_n) < PROGRAMS:
        block_n //= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}


@triton.jit
def _decode_linear_kernel(
    X, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, RESIDUAL, Y, N, eps,
    M: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NAME: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    cols = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    n = tl.cast(N, tl.int64)
    real, inside = rows < n, cols < K
    at, mask = rows[:, None] * K + cols, real[:, None] & inside
    weight = tl.load(WEIGHT + at, mask=mask, other=0.0, cache_modifier=".cg")
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(BIAS + rows, mask=real, other=0.0).to(tl.float32)
    if NAME == "swiglu":  # the second half of W
        second = tl.load(WEIGHT + n * K + at, mask=mask, other=0.0, cache_modifier=".cg")
        second_offset = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS:
            second_offset += tl.load(BIAS + n + rows, mask=real, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.load(NORM_WEIGHT + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_NORM_BIAS:
            shift = tl.load(NORM_BIAS + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            offset += tl.sum(weight.to(tl.float32) * shift, axis=1)
            if NAME == "swiglu":
                second_offset += tl.sum(second.to(tl.float32) * shift, axis=1)
    wait_for_previous(EARLY)  # above are weights alone
    for row in tl.static_range(M):
        start = row * K
        x = tl.load(X + start + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        rstd = tl.full((1,), 1.0, tl.float32)
        if NORM:
            if CENTER:
                x = tl.where(inside, x - (tl.sum(x, axis=1) / K)[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)
            x *= factor
        # The factor rstd comes after the product, so that the sums of both do not wait for each other.
        y = tl.sum(weight.to(tl.float32) * x, axis=1) * rstd + offset
        if NAME == "swiglu":
            y = _value(y, NAME, PRECISE) * (tl.sum(second.to(tl.float32) * x, axis=1) * rstd + second_offset)
        elif NAME != "":
            y = _value(y, NAME, PRECISE)
        place = n * row + rows
        if HAS_RESIDUAL:
            y += tl.load(RESIDUAL + place, mask=real, other=0.0).to(tl.float32)
        tl.store(Y + place, y.to(Y.dtype.element_ty), mask=real)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    center: bool,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    early = all(z is None or z.is_contiguous() for z in (weight, bias, norm_weight, norm_bias))  # else copied just now
    x, weight = x.contiguous(), weight.contiguous()
    y = _fake(x, weight, None, None, None, eps, center, activation)
    N, K = y.shape[-1], x.shape[-1]
    M = x.numel() // max(K, 1)
    if not y.numel():
        return y
    optional = [x if z is None else z.contiguous() for z in (bias, norm_weight, norm_bias, residual)]
    flags = {"NORM": norm_weight is not None, "CENTER": center, "HAS_NORM_BIAS": norm_bias is not None}
    flags |= {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    shape = program_shape(N, K, weight.element_size(), weight.shape[0] // N)
    constants = {"M": M, "K": K, **flags, "NAME": activation, "EARLY": early, **shape}
    grid = (ceil_div(N, shape["BLOCK_N"]),)
    launch(_decode_linear_kernel, grid, (x, weight, *optional, y), (N, eps), constants)
    return y


def _fake(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    N = weight.shape[0]
    return x.new_empty((*x.shape[:-1], N // 2 if others[5] == "swiglu" else N))


_decode_linear = register(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "bool center, str activation, Tensor? residual) -> Tensor",
    _forward,
    _fake,
)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    center: bool = False,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Computes a linear layer of a few rows; see `gptperf.kernels.reference.decode_linear` for arguments and errors.

    On a GPU that launches kernels early, no kernel that may still run must write the weights; see `wait_for_previous`.
    """
    check_decode_linear(x, weight, bias, norm_weight, norm_bias, center, activation, residual)
    check_triton("decode_linear", x)
    return _decode_linear(x, weight, bias, norm_weight, norm_bias, eps, center, activation, residual)
