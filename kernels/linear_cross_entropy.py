"""Computes lm_head and the mean cross-entropy without all (M, V) logits in memory.

    z = x W^T,  logits = z, or c tanh(z / c) with a softcap c,  loss = sum(logsumexp(logits) - logits[target]) / count
    d = (softmax(logits) - onehot(target)) dlogits/dz,  dx = d W,  dW = d^T x,  both times dloss / count

Forward takes the rows in chunks. For each chunk it computes the logits; one kernel turns them into the loss of each row
and overwrites them with d; then it computes dx and adds to dW. Backward only scales dx and dW. If V is not a multiple
of 8, the op copies W and appends rows of zeros up to the next multiple, because cuBLAS's fast matmuls need it; the
logits then have columns of zeros, which the kernel does not touch.

Log-sum-exp, losses and dW are in float32; logits, d and dx are in x's dtype. In float16 d is stored times 2^14, so that
small probabilities do not vanish, and dx is in float32. FLOPs: three GEMMs of 2 M C V with gradients, one without.
Elements moved: the kernel reads and writes M V each, and every chunk reads and writes dW, which has V C elements.

Eager reference: `gptperf.kernels.reference.linear_cross_entropy`. Source of the running maximum and sum: Milakov and
Gimelshein, 2018, algorithm 3.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gptperf.kernels.checks import check_linear_cross_entropy, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register
from gptperf.kernels.linear import dgrad, linear, operand_dtype, wgrad
from gptperf.kernels.logit_chunks import chunk_rows, padded

__all__ = ["linear_cross_entropy"]

LOG2_E = tl.constexpr(math.log2(math.e))


def program_shape(V: int) -> dict[str, int]:
    """Returns the columns that a program takes at a time, the columns of the tail, and the warps.

    Measured on an H200, as a fraction of the speed of a copy: V = 32000 .90, 50304 .89 (.87 with 16384 columns at a
    time), 128256 .80 (.75 with 16384). A small vocabulary is one tail, and a warp is enough for 256 columns.
    """
    if V < 4096:
        block = max(power_of_2(V), 8)
        warps = max(block // 256, 1)
    else:
        block, warps = (4096, 16) if V <= 32768 else (8192, 32) if V <= 65536 else (32768, 32)
    return {"BLOCK_V": block, "BLOCK_TAIL": power_of_2(V % block) if V % block else 0, "num_warps": warps}


@triton.jit
def _softmax_step(x, top, total):
    """Adds x (..., n) to the running maximum and sum of exp2((x - maximum) log2 e) of each row, both (...)."""
    higher = tl.maximum(top, tl.max(x, axis=len(x.shape) - 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
    terms = tl.exp2((x - tl.expand_dims(base, len(x.shape) - 1)) * LOG2_E)
    return higher, total * tl.exp2((top - base) * LOG2_E) + tl.sum(terms, axis=len(x.shape) - 1)


@triton.jit
def _capped(z, cap, HAS_CAP: tl.constexpr):
    """Returns cap tanh(z / cap), or z without a cap."""
    if HAS_CAP:
        u = z / cap
        e = tl.exp2(tl.abs(u) * (-2.0 * LOG2_E))
        # (1 - e) / (1 + e) loses digits near 0; there the series up to u^9 is exact to float32.
        square = u * u
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        far = tl.where(u < 0, e - 1.0, 1.0 - e) / (1.0 + e)
        z = cap * tl.where(square < 0.0625, u * series, far)
    return z


@triton.jit
def _slope(z, cap):
    """Returns the derivative of `_capped`, 1 - tanh^2 = 4 e / (1 + e)^2, which loses no digits where it is small."""
    e = tl.exp2(tl.abs(z / cap) * (-2.0 * LOG2_E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _cross_entropy_kernel(
    LOGITS, TARGETS, LOSS, ignore_index, log2_scale, cap, HAS_CAP: tl.constexpr,
    V: tl.constexpr, STRIDE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * STRIDE
    target = tl.load(TARGETS + row)
    counts = (target >= 0) & (target < V) & (target != ignore_index)
    target_z = tl.load(LOGITS + tl.where(counts, target, 0)).to(tl.float32)
    target_logit = _capped(target_z, cap, HAS_CAP)
    # A whole block is a tile whose rows are 8 neighbouring columns; one thread can hold such a row, because STRIDE is a
    # multiple of 8. Each thread keeps its own maximum and sum, and all are joined once, after the last block.
    WHOLE: tl.constexpr = V // BLOCK_V * BLOCK_V
    lanes = tl.arange(0, BLOCK_V // 8).to(tl.int64)[:, None] * 8 + tl.arange(0, 8).to(tl.int64)[None, :]
    tail = WHOLE + tl.arange(0, max(BLOCK_TAIL, 1)).to(tl.int64)
    top = tl.full((BLOCK_V // 8,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V // 8,), tl.float32)
    for start in range(0, WHOLE, BLOCK_V):
        z = tl.load(LOGITS + start + lanes, eviction_policy="evict_last").to(tl.float32)
        top, total = _softmax_step(_capped(z, cap, HAS_CAP), top, total)
    peak = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2((top - tl.where(peak == float("-inf"), 0.0, peak)) * LOG2_E), axis=0)
    if BLOCK_TAIL:
        rest_z = tl.load(LOGITS + tail, mask=tail < V, other=float("-inf")).to(tl.float32)
        rest = tl.where(tail < V, _capped(rest_z, cap, HAS_CAP), float("-inf"))
        peak, total = _softmax_step(rest, peak, total)
    missing = tl.where(target == ignore_index, 0.0, float("nan"))  # NaN for a target out of range
    tl.store(LOSS + row, tl.where(counts, tl.log(total) + (peak - target_logit), missing))
    if GRADIENT:
        tl.debug_barrier()  # every thread must have read the target's logit before one of them overwrites it
        shift = log2_scale - tl.log2(total)
        if BLOCK_TAIL:
            rest = tl.where(counts, tl.exp2((rest - peak) * LOG2_E + shift), 0.0)
            if HAS_CAP:
                rest *= _slope(rest_z, cap)
            tl.store(LOGITS + tail, rest.to(LOGITS.dtype.element_ty), mask=tail < V)
        for start in range(0, WHOLE, BLOCK_V):  # from the last block on, which is still in the L2 cache
            block = LOGITS + (WHOLE - BLOCK_V - start) + lanes
            z = tl.load(block, eviction_policy="evict_first").to(tl.float32)
            x = tl.where(counts, tl.exp2((_capped(z, cap, HAS_CAP) - peak) * LOG2_E + shift), 0.0)
            if HAS_CAP:
                x *= _slope(z, cap)
            tl.store(block, x.to(LOGITS.dtype.element_ty))
        if counts:
            tl.debug_barrier()  # the target's probability must be written before it is overwritten
            d = (tl.exp2((target_logit - peak) * LOG2_E) - total) / total  # exact if the target is the maximum
            if HAS_CAP:
                d *= _slope(target_z, cap)
            tl.store(LOGITS + target, (d * tl.exp2(log2_scale)).to(LOGITS.dtype.element_ty))


@triton.jit
def _scale_kernel(X, Y, DLOSS, SCALE, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * (tl.load(DLOSS) * tl.load(SCALE))).to(Y.dtype.element_ty), mask=at < n)


def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_x: bool,
    needs_weight: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss, the unscaled dx `(M, C)` and dW `(V, C)` (empty if not needed), and their scale."""
    M, V = x.shape[0], weight.shape[0]
    x, targets = x.contiguous(), targets.contiguous()
    weight = F.pad(weight, (0, 0, 0, padded(V) - V)) if padded(V) > V else weight.contiguous()
    _, dx, dweight, _ = _forward_fake(x, weight, targets, ignore_index, needs_x, needs_weight)
    rows = chunk_rows(V, x.element_size())
    buffer, losses = x.new_empty((min(rows, M), padded(V))), x.new_empty(M, dtype=torch.float32)
    log2_scale = 14.0 if x.dtype == torch.float16 else 0.0
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, M, rows):
            part = slice(start, min(start + rows, M))
            logits = linear(x[part], weight, out=buffer[: part.stop - start])
            constants = {
                "HAS_CAP": softcap > 0,
                "V": V,
                "STRIDE": padded(V),
                "GRADIENT": needs_x or needs_weight,
                **program_shape(V),
            }
            tensors = (logits, targets[part], losses[part])
            launch(
                _cross_entropy_kernel, (len(logits),), tensors, (ignore_index, log2_scale, float(softcap)), constants
            )
            if needs_x:
                dgrad(logits, weight, out=dx[part])
            if needs_weight:
                wgrad(logits, x[part], out=dweight, add=start > 0)
    if not M:
        dweight.zero_()
    count = (targets != ignore_index).sum().clamp(min=1)
    loss = losses.sum() / count
    return loss, dx, dweight[:V], torch.full_like(loss, 2.0**-log2_scale) / count


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_x: bool,
    needs_weight: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    dx = x.new_empty(x.shape if needs_x else (0,), dtype=dtype)
    dweight = x.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dweight, x.new_empty((), dtype=torch.float32)


def _backward(dloss: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grads = _backward_fake(dloss, scale, dx, dweight, dtype)
    for unscaled, grad in zip((dx, dweight), grads, strict=True):
        if grad.numel():
            programs = ceil_div(grad.numel(), 2048)
            tensors = (unscaled, grad, dloss, scale)
            launch(_scale_kernel, (programs,), tensors, (grad.numel(),), {"BLOCK": 2048, "num_warps": 8})
    return grads


def _backward_fake(
    dloss: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return dx.new_empty(dx.shape, dtype=dtype), dweight.new_empty(dweight.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, _, ctx.needs_x, ctx.needs_weight, *_ = inputs
    _, dx, dweight, scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dx, dweight, scale)
    ctx.dtype = x.dtype
    ctx.save_for_backward(scale, dx, dweight)


def _differentiate(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dx = dweight = None
    if dloss is not None:
        dx, dweight = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return dx if ctx.needs_x else None, dweight if ctx.needs_weight else None, None, None, None, None, None


_linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor dloss, Tensor scale, Tensor dx, Tensor dweight, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear_cross_entropy = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool needs_x, bool needs_weight, "
    "float softcap=0.0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _differentiate,
)


@register_flop_formula(torch.ops.gptperf.linear_cross_entropy)
def _flops(
    x: torch.Size,
    weight: torch.Size,
    targets: torch.Size,
    ignore_index: int,
    needs_x: bool,
    needs_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * x[0] * weight[0] * weight[1] * (1 + needs_x + needs_weight)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float = 0.0
) -> Tensor:
    """Returns the mean loss; see `gptperf.kernels.reference.linear_cross_entropy` for arguments and errors.

    Forward computes the gradients of x and weight, if they need any; backward only scales them.
    """
    check_linear_cross_entropy(x, weight, targets, ignore_index)
    check_triton("linear_cross_entropy", x)
    dtype = operand_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    return _linear_cross_entropy(
        x.flatten(0, -2) if x.dim() > 1 else x[None], weight, targets.flatten(), ignore_index, *needs, softcap
    )[0]
