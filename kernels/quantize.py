"""Quantises a matrix to 8-bit floats in one pass: as it is, transposed, or both.

    q = round(clamp(x s))  with one scale s for the whole matrix

A tensor core of Hopper reads both fp8 operands along the dimension that a matmul sums over. The forward pass and the
gradient of the input read rows of x and dy, the gradient of the weight reads their columns; so a matrix that is used in
both ways is written twice and read once. The scale is a number in device memory. If it is 0, `_quantize_amax_kernel`,
which otherwise returns at once, first finds the largest value, and the scale follows from it. The host decides nothing.

Statistics of the input are collected on the way: its largest value, and counts of a sixteenth of its tiles. Each
program writes its part; the caller combines the parts of all matrices at once. Bytes moved for M rows of N columns of
16 bits: 2 M N read, M N written for each layout; with a scale of 0 2 M N more are read.

Eager reference: `gptperf.kernels.float8_reference.quantize`. Source: Micikevicius et al., 2022, section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_quantize, check_triton, interpreter_is_on
from gptperf.kernels.float8 import E4M3, E5M2, FACTORS, INVERSE, PROGRAMS, SCALE_EXPONENT, STATISTICS, format_of
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register

__all__ = ["bits_of", "count", "largest_of", "launch_tiles", "quantize", "read_scale", "save_amax"]
__all__ += ["save_factors", "save_statistics", "store_transposed", "tile_at", "to_float8"]

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]
COUNT_EVERY = tl.constexpr(16)
"""Programs count every so many of their tiles, which lie far apart, in a loop of its own: in the loop that quantises,
counting takes so many registers that half as many programs run."""
BLOCK_PROGRAMS = tl.constexpr(power_of_2(PROGRAMS))
MOST_PROGRAMS = tl.constexpr(PROGRAMS)
LIMIT = tl.constexpr(SCALE_EXPONENT)
FACTORS_SIZE, INVERSE_AT = tl.constexpr(FACTORS), tl.constexpr(INVERSE)
LARGEST_4, LARGEST_5 = tl.constexpr(E4M3.largest), tl.constexpr(E5M2.largest)
TOP_4, TOP_5 = tl.constexpr(E4M3.top), tl.constexpr(E5M2.top)
SHIFT_4, SHIFT_5 = tl.constexpr(23 - E4M3.mantissa), tl.constexpr(23 - E5M2.mantissa)
LEAST_4, LEAST_5 = tl.constexpr(E4M3.least), tl.constexpr(E5M2.least)
HALF_4, HALF_5 = tl.constexpr(E4M3.smallest / 2), tl.constexpr(E5M2.smallest / 2)
# A NaN whose leading bits make one in 8 bits too, as Triton's interpreter cuts the others off.
NAN_4, NAN_5 = tl.constexpr(0x7FF00000), tl.constexpr(0x7FE00000)


def tile_shape(rows: bool, columns: bool) -> dict[str, int]:
    """Returns the tile and the warps of a program, the best of a sweep: a transposed tile has runs of BLOCK_M bytes."""
    if not columns:
        return {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 8}
    return {"BLOCK_M": 32 if rows else 64, "BLOCK_N": 128, "num_warps": 8}


@triton.jit
def bits_of(x):
    """Returns the largest absolute values of groups of float32 x (m, n), as bits (m, n / 8).

    As bits, NaN is larger than every number. A thread holds 8 neighbouring elements, so that threads need not wait for
    each other, and the running maximum takes an eighth of the registers.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(tl.reshape(bits, [x.shape[0], x.shape[1] // 8, 8]), axis=2)


@triton.jit
def largest_of(bits):
    """Returns the largest element of bits (m, n)."""
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def save_amax(AMAX, top):
    """Stores the largest value that this program has seen; the first program stores 0 for those that do not run."""
    programs = tl.arange(0, BLOCK_PROGRAMS)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(AMAX + programs, tl.zeros_like(programs), mask=programs >= tl.num_programs(0))
    tl.store(AMAX + program, top)


@triton.jit
def read_scale(SCALE, AMAX, IS_E5M2: tl.constexpr):
    """Returns the scale, or, if it is 0, the scale of the values in AMAX; see `gptperf.kernels.float8.scale_of`."""
    scale = tl.load(SCALE)
    if scale == 0.0:
        biased = tl.max(tl.load(AMAX + tl.arange(0, BLOCK_PROGRAMS)), axis=0) >> 23
        top = TOP_5 if IS_E5M2 else TOP_4
        exponent = tl.minimum(tl.maximum(top - 1 - (biased - 127), -LIMIT), LIMIT)
        exponent = tl.where(biased == 255, 0, exponent)
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def save_factors(FACTORS, scale):
    """Stores a scale and its inverse, which is exact."""
    if tl.program_id(0) == 0:
        at = tl.arange(0, FACTORS_SIZE)
        tl.store(FACTORS + at, tl.where(at < INVERSE_AT, scale, 1.0 / scale))


@triton.jit
def to_float8(x, scale, dtype: tl.constexpr, IS_E5M2: tl.constexpr, ROUND: tl.constexpr):
    """Returns float32 x times the scale in 8 bits: numbers clamped, infinities as NaN."""
    largest = LARGEST_5 if IS_E5M2 else LARGEST_4
    y = tl.minimum(tl.maximum(x * scale, -largest), largest)
    if ROUND:  # Triton's interpreter does not carry when it rounds: round to the nearest, ties to even, in float32
        least = LEAST_5 if IS_E5M2 else LEAST_4
        exponent = tl.maximum(tl.abs(y).to(tl.int32, bitcast=True) >> 23, least + 127)
        exponent += SHIFT_5 if IS_E5M2 else SHIFT_4
        # Beside this number, float32 has as many bits after the point as the 8-bit format has for y.
        large = (exponent << 23).to(tl.float32, bitcast=True) * 1.5
        y = (y + large) - large
    nan = tl.full((), NAN_5 if IS_E5M2 else NAN_4, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), y, nan).to(dtype)


@triton.jit
def store_transposed(pointers, x, mask, scale, IS_E5M2: tl.constexpr, ROUND: tl.constexpr):
    """Stores the transpose of x (m, n) in 8 bits at pointers (n, m).

    x is transposed in 16 bits and quantised after that, a second time where the rows are stored too. If numbers of 8
    bits are stored and transposed, ptxas of CUDA 12.8 reads single bytes of a register before it writes them, in the
    backward kernel of `gptperf.kernels.quantize_swiglu`.
    """
    q = to_float8(tl.trans(x).to(tl.float32), scale, pointers.dtype.element_ty, IS_E5M2, ROUND)
    tl.store(pointers, q, mask=tl.trans(mask))


@triton.jit
def count(x, scale, mask, IS_E5M2: tl.constexpr):
    """Returns how many elements of float32 x (m, n) are clamped, become 0 without being 0, and are not masked."""
    size = tl.abs(x)
    scaled = size * scale
    saturated = (scaled > (LARGEST_5 if IS_E5M2 else LARGEST_4)) & (size < float("inf"))
    flushed = (scaled <= (HALF_5 if IS_E5M2 else HALF_4)) & (size > 0.0)
    return _total(saturated), _total(flushed), _total(mask)


@triton.jit
def _total(flags):
    return tl.sum(tl.sum(flags.to(tl.float32), axis=1), axis=0)


@triton.jit
def save_statistics(STATISTICS, top, saturated, flushed, counted):
    """Stores the statistics of this program; the first program stores 0 for those that do not run."""
    programs = tl.arange(0, BLOCK_PROGRAMS)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        unused = (programs >= tl.num_programs(0)) & (programs < MOST_PROGRAMS)
        for row in tl.static_range(4):
            tl.store(STATISTICS + row * MOST_PROGRAMS + programs, tl.zeros_like(programs).to(tl.float32), mask=unused)
    tl.store(STATISTICS + program, top.to(tl.float32, bitcast=True))
    tl.store(STATISTICS + MOST_PROGRAMS + program, saturated)
    tl.store(STATISTICS + 2 * MOST_PROGRAMS + program, flushed)
    tl.store(STATISTICS + 3 * MOST_PROGRAMS + program, counted)


@triton.jit
def tile_at(tile, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the rows and columns of a tile; tiles follow each other along the rows."""
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = tl.cast(tile // across, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    return rows, tl.cast(tile % across, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)


@triton.jit
def _quantize_amax_kernel(X, SCALE, AMAX, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if tl.load(SCALE) == 0.0:
        top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
        tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            x = tl.load(X + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            top = tl.maximum(top, bits_of(x))
        save_amax(AMAX, largest_of(top))


@triton.jit
def _quantize_kernel(
    X, SCALE, AMAX, Q, QT, FACTORS, STATISTICS, M,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRESH: tl.constexpr,
    IS_E5M2: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if FRESH:
        scale = read_scale(SCALE, AMAX, IS_E5M2)
        save_factors(FACTORS, scale)
    else:
        scale = tl.load(SCALE)
    top = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    saturated, flushed, counted = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows[:, None] * N + cols[None, :]
        loaded = tl.load(X + at, mask=mask, other=0.0)
        x = loaded.to(tl.float32)
        if ROWS:
            tl.store(Q + at, to_float8(x, scale, Q.dtype.element_ty, IS_E5M2, ROUND), mask=mask)
        if COLUMNS:
            store_transposed(QT + cols[:, None] * M + rows[None, :], loaded, mask, scale, IS_E5M2, ROUND)
        if FRESH:
            top = tl.maximum(top, bits_of(x))
    if FRESH:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0) * COUNT_EVERY):
            rows, cols = tile_at(tile, N, BLOCK_M, BLOCK_N)
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            x = tl.load(X + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            more_saturated, more_flushed, more = count(x, scale, mask, IS_E5M2)
            saturated += more_saturated
            flushed += more_flushed
            counted += more
        save_statistics(STATISTICS, largest_of(top), saturated, flushed, counted)


def launch_tiles(
    kernels: tuple[Any, Any],
    size: tuple[int, int],
    shape: Mapping[str, int],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    constants: Mapping[str, Any],
    e5m2: bool,
    fresh: bool,
) -> None:
    """Launches a kernel that finds the largest value where the scale is 0, then the one that quantises.

    Args:
        kernels: the two kernels; the first takes the inputs and AMAX, the second the outputs too.
        size: rows M and columns N of the matrix that is quantised.
        shape: the tile and the warps.
        inputs: the pointers before AMAX; the last one is SCALE.
        outputs: the pointers after AMAX.
        constants: constants of the second kernel after N.
        e5m2: whether the format is E5M2, else E4M3.
        fresh: whether statistics are collected and the scale may be 0.
    """
    M, N = size if all(size) else (0, 1)  # without a tile, the kernel writes the scale and statistics of nothing
    tiles = ceil_div(M, shape["BLOCK_M"]) * ceil_div(N, shape["BLOCK_N"])
    grid = (max(1, min(tiles, PROGRAMS)),)
    amax = torch.empty(power_of_2(PROGRAMS) if fresh else 1, dtype=torch.int32, device=inputs[0].device)
    if fresh:
        launch(kernels[0], grid, (*inputs, amax), (M,), {"N": N, **shape})
    formats = {"FRESH": fresh, "IS_E5M2": e5m2, "ROUND": interpreter_is_on()}
    constants = {"N": N, **constants, **formats, **shape}
    launch(kernels[1], grid, (*inputs, amax, *outputs), (M,), constants)


def _forward(x: Tensor, scale: Tensor, e5m2: bool, rows: bool, columns: bool, after: Tensor | None) -> Quantized:
    x = x.contiguous()
    outputs = _forward_fake(x, scale, e5m2, rows, columns, after)
    kernels, size = (_quantize_amax_kernel, _quantize_kernel), (x.shape[0], x.shape[1])
    constants = {"ROWS": rows, "COLUMNS": columns}
    launch_tiles(kernels, size, tile_shape(rows, columns), (x, scale), outputs, constants, e5m2, after is None)
    return outputs


def _forward_fake(x: Tensor, scale: Tensor, e5m2: bool, rows: bool, columns: bool, after: Tensor | None) -> Quantized:
    fresh = after is None
    dtype, (M, N) = format_of(e5m2).dtype, x.shape
    q = x.new_empty((M, N) if rows else (0,), dtype=dtype)
    qt = x.new_empty((N, M) if columns else (0,), dtype=dtype)
    factors = scale.new_empty(FACTORS if fresh else 0)
    return q, qt, factors, scale.new_empty((len(STATISTICS), PROGRAMS) if fresh else (0,))


_quantize: Callable[..., Quantized] = register(
    "quantize(Tensor x, Tensor scale, bool e5m2, bool rows, bool columns, Tensor? after) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def quantize(
    x: Tensor,
    scale: Tensor,
    *,
    e5m2: bool = False,
    rows: bool = True,
    columns: bool = False,
    after: Tensor | None = None,
) -> Quantized:
    """Quantises x; see `gptperf.kernels.float8_reference.quantize` for arguments, results and errors."""
    check_quantize(x, scale)
    check_triton("quantize", x)
    return _quantize(x, scale, e5m2, rows, columns, after)
