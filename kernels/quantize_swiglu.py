"""silu(gate) * up in 8 bits, and its backward, which writes both operands of the matmuls that follow.

Forward:    q = round(clamp(y s)),  y = silu(gate) up.
Backward:   dg and du as in `gptperf.kernels.activation`, in 8 bits: as they are for the gradient of the input, and
    transposed for the gradient of the up projection; and y again, transposed, for the gradient of the down projection.

The arithmetic is in float32; its results are rounded to 16 bits, as if they were stored in between, and then to 8 bits.
The product is not kept for backward. `gptperf.kernels.quantize` explains scales and statistics. Bytes moved for M rows
of F columns of 16 bits: forward 5 M F, backward 11 M F; with results in 16 bits, forward 6 M F and backward 12 M F.

Eager references: `quantize_swiglu` and `quantize_swiglu_backward` in `gptperf.kernels.float8_reference`. Source:
Shazeer, 2020, eq. 6.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_swiglu, check_triton
from gptperf.kernels.float8 import E4M3, FACTORS, PROGRAMS, STATISTICS, format_of
from gptperf.kernels.launch import register
from gptperf.kernels.quantize import (
    COUNT_EVERY,
    bits_of,
    count,
    largest_of,
    launch_tiles,
    read_scale,
    save_amax,
    save_factors,
    save_statistics,
    store_transposed,
    tile_at,
    to_float8,
)

__all__ = ["quantize_swiglu", "quantize_swiglu_backward"]

FORWARD_TILE = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8}
BACKWARD_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8}
"""Tiles and warps of a program, the best of a sweep; transposed tiles have runs of BLOCK_M bytes."""


@triton.jit
def _load_gate_up(GATE_UP, rows, cols, mask, N: tl.constexpr):
    at = rows[:, None] * (2 * N) + cols[None, :]
    gate = tl.load(GATE_UP + at, mask=mask, other=0.0).to(tl.float32)
    return gate, tl.load(GATE_UP + at + N, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _product(gate, up, dtype: tl.constexpr):
    return (gate * tl.sigmoid(gate) * up).to(dtype)


@triton.jit
def _gradients(gate, up, dy, dtype: tl.constexpr):
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = (dy * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
    return dgate, (dy * silu).to(dtype), (silu * up).to(dtype)


@triton.jit
def _quantize_product_amax_kernel(
    GATE_UP, SCALE, AMAX, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    if tl.load(SCALE) == 0.0:
        top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
        tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
            top = tl.maximum(top, bits_of(_product(gate, up, GATE_UP.dtype.element_ty).to(tl.float32)))
        save_amax(AMAX, largest_of(top))


@triton.jit
def _quantize_product_kernel(
    GATE_UP, SCALE, AMAX, Q, FACTORS, STATISTICS, M,
    N: tl.constexpr, FRESH: tl.constexpr,
    IS_E5M2: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tl.static_assert(FRESH)
    scale = read_scale(SCALE, AMAX, IS_E5M2)
    save_factors(FACTORS, scale)
    top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    saturated, flushed, counted = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
        y = _product(gate, up, GATE_UP.dtype.element_ty).to(tl.float32)
        q = to_float8(y, scale, Q.dtype.element_ty, IS_E5M2, ROUND)
        tl.store(Q + rows[:, None] * N + cols[None, :], q, mask=mask)
        top = tl.maximum(top, bits_of(y))
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0) * COUNT_EVERY):
        rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
        y = _product(gate, up, GATE_UP.dtype.element_ty).to(tl.float32)
        more_saturated, more_flushed, more = count(y, scale, mask, IS_E5M2)
        saturated += more_saturated
        flushed += more_flushed
        counted += more
    save_statistics(STATISTICS, largest_of(top), saturated, flushed, counted)


@triton.jit
def _quantize_gradient_amax_kernel(
    DY, GATE_UP, PRODUCT_SCALE, SCALE, AMAX, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    if tl.load(SCALE) == 0.0:
        top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
        tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
            dy = tl.load(DY + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dgate, dup, _ = _gradients(gate, up, dy, DY.dtype.element_ty)
            top = tl.maximum(top, tl.maximum(bits_of(dgate.to(tl.float32)), bits_of(dup.to(tl.float32))))
        save_amax(AMAX, largest_of(top))


@triton.jit
def _quantize_gradient_kernel(
    DY, GATE_UP, PRODUCT_SCALE, SCALE, AMAX, Q, QT, YT, FACTORS, STATISTICS, M,
    N: tl.constexpr, FRESH: tl.constexpr,
    IS_E5M2: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tl.static_assert(FRESH)
    scale = read_scale(SCALE, AMAX, IS_E5M2)
    save_factors(FACTORS, scale)
    product_scale = tl.load(PRODUCT_SCALE)
    top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    saturated, flushed, counted = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
        dy = tl.load(DY + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dgate, dup, y = _gradients(gate, up, dy, DY.dtype.element_ty)
        at, columns = rows[:, None] * (2 * N) + cols[None, :], cols[:, None] * M + rows[None, :]
        q = to_float8(dgate.to(tl.float32), scale, Q.dtype.element_ty, IS_E5M2, ROUND)
        tl.store(Q + at, q, mask=mask)
        store_transposed(QT + columns, dgate, mask, scale, IS_E5M2, ROUND)
        q = to_float8(dup.to(tl.float32), scale, Q.dtype.element_ty, IS_E5M2, ROUND)
        tl.store(Q + at + N, q, mask=mask)
        store_transposed(QT + tl.cast(M, tl.int64) * N + columns, dup, mask, scale, IS_E5M2, ROUND)
        store_transposed(YT + columns, y, mask, product_scale, False, ROUND)
        top = tl.maximum(top, tl.maximum(bits_of(dgate.to(tl.float32)), bits_of(dup.to(tl.float32))))
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0) * COUNT_EVERY):
        rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        gate, up = _load_gate_up(GATE_UP, rows, cols, mask, N)
        dy = tl.load(DY + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dgate, dup, _ = _gradients(gate, up, dy, DY.dtype.element_ty)
        gate_saturated, gate_flushed, more = count(dgate.to(tl.float32), scale, mask, IS_E5M2)
        up_saturated, up_flushed, _ = count(dup.to(tl.float32), scale, mask, IS_E5M2)
        saturated += gate_saturated + up_saturated
        flushed += gate_flushed + up_flushed
        counted += 2.0 * more
    save_statistics(STATISTICS, largest_of(top), saturated, flushed, counted)


def _forward(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    outputs = _forward_fake(gate_up, scale)
    kernels = (_quantize_product_amax_kernel, _quantize_product_kernel)
    launch_tiles(
        kernels, (gate_up.shape[0], gate_up.shape[1] // 2), FORWARD_TILE, (gate_up, scale), outputs, {}, False, True
    )
    return outputs


def _forward_fake(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=E4M3.dtype)
    return q, scale.new_empty(FACTORS), scale.new_empty((len(STATISTICS), PROGRAMS))


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward(dy: Tensor, gate_up: Tensor, scale: Tensor, product_scale: Tensor, e5m2: bool) -> _Gradients:
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    outputs = _backward_fake(dy, gate_up, scale, product_scale, e5m2)
    inputs = (dy, gate_up, product_scale, scale)
    kernels = (_quantize_gradient_amax_kernel, _quantize_gradient_kernel)
    launch_tiles(kernels, (dy.shape[0], dy.shape[1]), BACKWARD_TILE, inputs, outputs, {}, e5m2, True)
    return outputs


def _backward_fake(dy: Tensor, gate_up: Tensor, scale: Tensor, product_scale: Tensor, e5m2: bool) -> _Gradients:
    (M, F), dtype = dy.shape, format_of(e5m2).dtype
    q, columns = gate_up.new_empty((M, 2 * F), dtype=dtype), gate_up.new_empty((2 * F, M), dtype=dtype)
    product = gate_up.new_empty((F, M), dtype=E4M3.dtype)
    return q, columns, product, scale.new_empty(FACTORS), scale.new_empty((len(STATISTICS), PROGRAMS))


_quantize_swiglu = register(
    "quantize_swiglu(Tensor gate_up, Tensor scale) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_quantize_swiglu_backward = register(
    "quantize_swiglu_backward(Tensor dy, Tensor gate_up, Tensor scale, Tensor product_scale, bool e5m2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def quantize_swiglu(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the product; see `gptperf.kernels.float8_reference.quantize_swiglu` for arguments and results."""
    check_swiglu(gate_up, None, None)
    check_triton("quantize_swiglu", gate_up)
    return _quantize_swiglu(gate_up, scale)


def quantize_swiglu_backward(
    dy: Tensor, gate_up: Tensor, scale: Tensor, product_scale: Tensor, *, e5m2: bool
) -> _Gradients:
    """Computes the gradients; see `gptperf.kernels.float8_reference.quantize_swiglu_backward`."""
    check_swiglu(gate_up, None, None)
    check_triton("quantize_swiglu", gate_up)
    return _quantize_swiglu_backward(dy, gate_up, scale, product_scale, e5m2)
