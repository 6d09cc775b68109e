"""The activation of an FFN, optionally with the down projection that follows: of one input, or of a packed gate and up.

    activation:  y = f(x),         backward  dx = dy f'(x)
    swiglu:      y = silu(g) u,    backward  dg = dy u silu'(g),  du = dy silu(g)

Backward can write y again in the same pass, so that the down projection need not keep y in memory. Backward of swiglu
writes dg and du into the packed gradient. The arithmetic is in float32, and each output is rounded once. Elements moved
for M rows of F columns: activation forward 2 M F, backward 3 M F, and 4 M F with y; swiglu 3 M F, 5 M F and 6 M F.

Eager references: `activation` and `swiglu` in `gptperf.kernels.reference`. Sources: Hendrycks and Gimpel, 2016 (GELU);
So et al., 2021 (squared ReLU); Shazeer, 2020, eq. 6 (SwiGLU).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptperf.kernels.checks import check_activation, check_swiglu, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register
from gptperf.kernels.linear import bias_grad, dgrad, linear, operand_dtype, weight_grad

__all__ = ["activation", "activation_backward", "swiglu"]


def program_shape(F: int) -> dict[str, int]:
    """Returns the columns and warps of a program, which has one row.

    512 to 4096 columns are within 1% of each other on an H200 (swiglu).
    """
    return {"BLOCK_N": min(1024, max(16, power_of_2(F))), "num_warps": 4}


@triton.jit
def _place(F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the row and the columns of this program."""
    blocks: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)


@triton.jit
def _normal_below(x, PRECISE: tl.constexpr):
    """Returns the probability that a standard normal variable is below x, as GELU needs it.

    erf takes 35 instructions for each element of a forward pass, more than an H200 has time for while it moves 16-bit
    elements. So those get 2 to the power of a polynomial, the logarithm of the tail, which takes 17. Its relative error
    is below 1e-4 for every x, less than the error of rounding to float16.
    """
    if PRECISE:
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        a = tl.abs(x)
        log = 1.762885e-09 * a - 1.3289479e-07
        log = log * a + 4.3759122e-06
        log = log * a - 8.325595e-05
        log = log * a + 0.0010247099
        log = log * a - 0.0087184129
        log = log * a + 0.054182978
        log = log * a + 0.45837606
        log = log * a + 1.1512495
        log = log * a + 1.0
        tail = tl.exp2(-log)
        below = tl.where(x < 0.0, tail, 1.0 - tail)
    return below


@triton.jit
def _tanh_below(x):
    """Returns the approximation of `_normal_below` with tanh, (1 + tanh(z / 2)) / 2 = sigmoid(z), and its derivative.

    exp of -|z| neither overflows nor leaves a difference of two almost equal numbers in the derivative.
    """
    t = tl.exp2(-1.4426950408889634 * tl.abs(x * (1.5957691216057308 + 0.07135481627260025 * x * x)))
    s = 1.0 / (1.0 + t)
    below = tl.where(x < 0.0, t * s, s)
    return below, t * s * s * (1.5957691216057308 + 0.21406444881780073 * x * x)


@triton.jit
def _value(x, NAME: tl.constexpr, PRECISE: tl.constexpr):
    """Returns f(x). Comparisons are such that NaN stays NaN."""
    if NAME == "gelu":
        y = x * _normal_below(x, PRECISE)
    elif NAME == "gelu_tanh":
        below, _ = _tanh_below(x)
        y = x * below
    elif NAME == "silu" or NAME == "swiglu":
        y = x * tl.sigmoid(x)
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "leaky_relu":
        y = tl.where(x < 0.0, 0.01 * x, x)
    else:
        tl.static_assert(NAME == "relu_squared")
        y = tl.where(x < 0.0, 0.0, x * x)
    return y


@triton.jit
def _gradient(dy, x, NAME: tl.constexpr, PRECISE: tl.constexpr):
    """Returns dy f'(x)."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
        dx = dy * (_normal_below(x, PRECISE) + x * density)
    elif NAME == "gelu_tanh":
        below, slope = _tanh_below(x)
        dx = dy * (below + x * slope)
    elif NAME == "silu" or NAME == "swiglu":
        sigmoid = tl.sigmoid(x)
        dx = dy * (sigmoid + x * sigmoid * (1.0 - sigmoid))
    elif NAME == "relu":
        dx = tl.where(x <= 0.0, 0.0, dy)
    elif NAME == "leaky_relu":
        dx = tl.where(x <= 0.0, 0.01 * dy, dy)
    else:
        tl.static_assert(NAME == "relu_squared")
        dx = tl.where(x <= 0.0, 0.0, 2.0 * dy * x)
    return dx


@triton.jit
def _activation_forward_kernel(X, Y, F: tl.constexpr, NAME: tl.constexpr, BLOCK_N: tl.constexpr):
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = 2 * F if NAME == "swiglu" else F
    row, cols = _place(F, BLOCK_N)
    mask = cols < F
    x = tl.load(X + row * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    y = _value(x, NAME, PRECISE)
    if NAME == "swiglu":
        y *= tl.load(X + row * WIDTH + F + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + row * F + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _activation_backward_kernel(
    DY, X, DX, Y, F: tl.constexpr, NAME: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr
):
    PRECISE: tl.constexpr = X.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = 2 * F if NAME == "swiglu" else F
    row, cols = _place(F, BLOCK_N)
    mask = cols < F
    x = tl.load(X + row * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    y = _value(x, NAME, PRECISE)
    if NAME == "swiglu":
        up = tl.load(X + row * WIDTH + F + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * WIDTH + F + cols, (dy * y).to(DX.dtype.element_ty), mask=mask)
        y *= up
        dy *= up
    tl.store(DX + row * WIDTH + cols, _gradient(dy, x, NAME, PRECISE).to(DX.dtype.element_ty), mask=mask)
    if PRODUCT:
        tl.store(Y + row * F + cols, y.to(Y.dtype.element_ty), mask=mask)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], y: Tensor, **constants: Any) -> None:
    """Runs a kernel with a program for each row and block of columns of a tensor like y."""
    if y.numel():
        width = y.shape[-1]
        shape = program_shape(width)
        programs = y.numel() // width * ceil_div(width, shape["BLOCK_N"])
        launch(kernel, (programs,), tensors, (), {"F": width, **constants, **shape})


def _forward(x: Tensor, name: str) -> Tensor:
    x = x.contiguous()
    y = _forward_fake(x, name)
    _launch(_activation_forward_kernel, (x, y), y, NAME=name)
    return y


def _forward_fake(x: Tensor, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2) if name == "swiglu" else x.shape)


def _backward(dy: Tensor, x: Tensor, name: str, product: bool) -> tuple[Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dx, y = _backward_fake(dy, x, name, product)
    _launch(_activation_backward_kernel, (dy, x, dx, y), dy, NAME=name, PRODUCT=product)
    return dx, y


def _backward_fake(dy: Tensor, x: Tensor, name: str, product: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(dy.shape if product else (0,))


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.name = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return activation_backward(dy, ctx.saved_tensors[0], ctx.name, False)[0], None


activation_backward = register(
    "activation_backward(Tensor dy, Tensor x, str name, bool product) -> (Tensor, Tensor)", _backward, _backward_fake
)
_activation = register("activation(Tensor x, str name) -> Tensor", _forward, _forward_fake, _save, _differentiate)


class _ActivationLinear(torch.autograd.Function):
    """Computes y and its down projection; backward can recompute y instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, weight: Tensor, bias: Tensor | None, recompute: bool) -> Tensor:
        y = _activation(x, name)
        ctx.save_for_backward(x, weight, *(() if recompute else (y,)))
        ctx.name = name
        return linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx, y = activation_backward(dgrad(dout, weight), x, ctx.name, needs_weight and not kept)
        dweight = weight_grad(dout, kept[0] if kept else y, weight) if needs_weight else None
        return dx, None, dweight, bias_grad(dout) if needs_bias else None, None


def _apply(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, recompute: bool) -> Tensor:
    if weight is None:
        return _activation(x, name)
    dtype = operand_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _ActivationLinear.apply(x.to(dtype), name, weight.to(dtype), bias, recompute)


def activation(
    x: Tensor, name: str, weight: Tensor | None = None, bias: Tensor | None = None, recompute: bool = True
) -> Tensor:
    """Applies an activation; see `gptperf.kernels.reference.activation` for arguments, results and errors.

    With a weight and `recompute`, backward recomputes the activation instead of keeping it, which saves M F elements
    of memory and moves M F more elements. The results have the same bits.
    """
    check_activation(x, name, weight, bias)
    check_triton("activation", x)
    return _apply(x, name, weight, bias, recompute)


def swiglu(gate_up: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, recompute: bool = True) -> Tensor:
    """Computes silu(gate) * up; see `gptperf.kernels.reference.swiglu` for arguments, results and errors.

    With a weight, backward recomputes the product or keeps it, as in `activation`.
    """
    check_swiglu(gate_up, weight, bias)
    check_triton("swiglu", gate_up)
    return _apply(gate_up, "swiglu", weight, bias, recompute)
