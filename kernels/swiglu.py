"""silu(gate) * up on the packed projection, optionally with the down projection that follows.

Forward, with s = 1 / (1 + exp(-g)):    y = g s u.
Backward:    dg = dy u s (1 + g (1 - s)),  du = dy g s.

Backward writes dg and du into the packed gradient. It can write y again in the same pass, so that the down projection
does not keep y in memory. The arithmetic is in float32, and each output is rounded once. Elements moved for M rows of
F columns: forward 3 M F, backward 5 M F, and 6 M F with y.

Eager reference: `gptperf.kernels.reference.swiglu`. Source: Shazeer, 2020, eq. 6.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptperf.kernels.checks import check_swiglu, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register
from gptperf.kernels.linear import bias_grad, dgrad, linear, operand_dtype, wgrad

__all__ = ["swiglu", "swiglu_backward"]


def program_shape(F: int) -> dict[str, int]:
    """Returns the columns and warps of a program, which has one row.

    512 to 4096 columns are within 1% of each other on an H200.
    """
    return {"BLOCK_N": min(1024, max(16, power_of_2(F))), "num_warps": 4}


@triton.jit
def _place(F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the row and the columns of this program."""
    blocks: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)


@triton.jit
def _swiglu_forward_kernel(GATE_UP, Y, F: tl.constexpr, BLOCK_N: tl.constexpr):
    row, cols = _place(F, BLOCK_N)
    mask = cols < F
    gate = tl.load(GATE_UP + row * (2 * F) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * (2 * F) + F + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + row * F + cols, (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(DY, GATE_UP, DGATE_UP, Y, F: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr):
    row, cols = _place(F, BLOCK_N)
    mask = cols < F
    gate = tl.load(GATE_UP + row * (2 * F) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * (2 * F) + F + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(DGATE_UP + row * (2 * F) + cols, dgate.to(DY.dtype.element_ty), mask=mask)
    tl.store(DGATE_UP + row * (2 * F) + F + cols, (dy * silu).to(DY.dtype.element_ty), mask=mask)
    if PRODUCT:
        tl.store(Y + row * F + cols, (silu * up).to(DY.dtype.element_ty), mask=mask)


def _forward(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    y = _forward_fake(gate_up)
    if y.numel():
        width = y.shape[-1]
        shape = program_shape(width)
        programs = y.numel() // width * ceil_div(width, shape["BLOCK_N"])
        launch(_swiglu_forward_kernel, (programs,), (gate_up, y), (), {"F": width, **shape})
    return y


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    dgate_up, y = _backward_fake(dy, gate_up, product)
    if dy.numel():
        width = dy.shape[-1]
        shape = program_shape(width)
        programs = dy.numel() // width * ceil_div(width, shape["BLOCK_N"])
        constants = {"F": width, "PRODUCT": product, **shape}
        launch(_swiglu_backward_kernel, (programs,), (dy, gate_up, dgate_up, y), (), constants)
    return dgate_up, y


def _backward_fake(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dy.shape if product else (0,))


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    return swiglu_backward(dy, ctx.saved_tensors[0], False)[0]


swiglu_backward = register(
    "swiglu_backward(Tensor dy, Tensor gate_up, bool product) -> (Tensor, Tensor)", _backward, _backward_fake
)
_swiglu = register("swiglu(Tensor gate_up) -> Tensor", _forward, _forward_fake, _save, _differentiate)


class _SwiGLULinear(torch.autograd.Function):
    """Computes the product and its down projection; backward recomputes the product instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        return linear(_swiglu(gate_up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weight = ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        dgate_up, product = swiglu_backward(dgrad(dout, weight), gate_up, needs_weight)
        dweight = wgrad(dout, product) if needs_weight else None
        return dgate_up, dweight, bias_grad(dout) if needs_bias else None


def swiglu(gate_up: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Computes silu(gate) * up; arguments, results and errors are those of `gptperf.kernels.reference.swiglu`.

    With a weight, backward recomputes the product instead of keeping it, which saves M F elements of memory and moves
    M F more elements.
    """
    check_swiglu(gate_up, weight, bias)
    check_triton("swiglu", gate_up)
    if weight is None:
        return _swiglu(gate_up)
    dtype = operand_dtype(gate_up)
    bias = None if bias is None else bias.to(dtype)
    return _SwiGLULinear.apply(gate_up.to(dtype), weight.to(dtype), bias)
