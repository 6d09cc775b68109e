"""Linear layers whose matmuls have operands in 8-bit floats, alone and as a SwiGLU FFN.

    forward:    y = x W^T (+ b)           x and W in E4M3
    backward:   dx = dy W,  dW = dy^T x   dy in GRADIENTS, with level "forward+dgrad" dx alone, with "forward" neither

An autograd function quantises its own input and, in backward, its own incoming gradient: a tensor in 8 bits that passed
from one function to another would make PyTorch cast its gradient to 8 bits. So the FFN is one function, in which the
product and the gradient of gate and up are never written in 16 bits. A tensor core of Hopper reads both operands along
the dimension of the sum, so a weight is read transposed for dx, and x and dy for dW; `gptperf.kernels.quantize` writes
both forms at once.

Backward keeps x in 8 bits, transposed, or x itself where something else keeps it anyway (`Float8State.keeps_input`); W
is quantised again. Scales are delayed: they come from the largest values of the steps before, and the statistics of
this micro-batch are the gradient of `Float8State.probe`. A gradient is the one way out of a graph that torch.compile,
recomputation and CUDA graphs all leave open, and an evaluation, which has none, leaves no trace.

Expected time of quantisation for M = 32768 tokens of llama_1.36b on an H200, for a layer of C columns, in units of M C
bytes (16 us by copy): 4 for x of qkv and 4 for x of gate and up (read 2, write 1 + 1), 6 for x of the output
projection, 12 for dy of qkv, and 4 for dy of each output projection. The product takes 2.75 less in forward and in
backward. The sum is 28.5 units: 0.45 ms per layer and 11 ms per step, beside 160 ms that the matmuls save. A norm that
writes 8 bits itself would save 3 units for each of two norms; a rope that does, 12.

Eager reference: the same functions over `gptperf.kernels.float8_reference`, on a CPU. Source: Micikevicius et al.,
2022.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptperf.kernels import float8_reference
from gptperf.kernels.float8 import E5M2, INVERSE, PROGRAMS, STATISTICS
from gptperf.kernels.linear import bias_grad, dgrad, operand_dtype, scaled_mm, take_offer, weight_grad

__all__ = ["GRADIENTS", "LEVELS", "OPERANDS", "Float8State", "float8_linear", "float8_swiglu"]

LEVELS = ("forward", "forward+dgrad", "full")
OPERANDS = ("x", "weight", "dy")
"""The tensors of a linear layer that are quantised, in the order of their scales and statistics."""
GRADIENTS = E5M2
"""Format of gradients: E4M3 has a bit more, E5M2 2^13 times the range, and the matmuls are equally fast on an H200."""
FAST_FORWARD, FAST_BACKWARD = True, False
"""Whether sums are kept in fewer bits (`gptperf.kernels.linear.scaled_mm`). On an H200 that makes the matmuls of a
forward pass 5 to 9% faster and those of backward 1 to 5%, where the gradient of a weight sums over all tokens."""
_IS_E5M2 = GRADIENTS is E5M2


class Float8State(NamedTuple):
    """How a linear layer is computed in 8 bits."""

    scales: tuple[Tensor, Tensor, Tensor]
    """The scales of x, W and dy, each the first element of a float32 tensor whose address is a multiple of 16; 0 stands
    for the scale of the tensor's own largest value."""
    probe: Tensor
    """A leaf of zeros `(3, 4, PROGRAMS)`, whose gradient is the statistics of x, W and dy in this micro-batch."""
    level: str = "full"
    """One of `LEVELS`."""
    keeps_input: bool = False
    """Whether backward keeps x as it is, because something else keeps it too."""
    triton: bool = False
    """Whether Triton's kernels quantise, else eager PyTorch."""

    @staticmethod
    def probe_like(scale: Tensor) -> Tensor:
        """Returns a probe on the device of a scale."""
        return scale.new_zeros(len(OPERANDS), len(STATISTICS), PROGRAMS).requires_grad_()


def _quantize(triton: bool, x: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if triton:
        from gptperf.kernels.quantize import quantize  # not above, because eager PyTorch runs without triton

        return quantize(x, scale, **options)
    return float8_reference.quantize(x, scale, **options)


def _quantize_swiglu(triton: bool, gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from gptperf.kernels.quantize_swiglu import quantize_swiglu

        return quantize_swiglu(gate_up, scale)
    return float8_reference.quantize_swiglu(gate_up, scale)


def _quantize_swiglu_backward(triton: bool, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if triton:
        from gptperf.kernels.quantize_swiglu import quantize_swiglu_backward

        return quantize_swiglu_backward(*tensors, e5m2=_IS_E5M2)
    return float8_reference.quantize_swiglu_backward(*tensors, e5m2=_IS_E5M2)


def _swiglu_backward(triton: bool, dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if triton:
        from gptperf.kernels.activation import activation_backward

        return activation_backward(dy, gate_up, "swiglu", True)
    return float8_reference.swiglu_backward(dy, gate_up, True)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[Tensor, ...], columns: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, x transposed in 8 bits (empty unless `columns`), and factors and statistics of x and W."""
    q, qt, x_factors, x_statistics = _quantize(triton, x, scales[0], columns=columns)
    w, _, w_factors, w_statistics = _quantize(triton, weight, scales[1])
    y = scaled_mm(q, w, x_factors[INVERSE], w_factors[INVERSE], x.dtype, FAST_FORWARD, bias)
    return y, qt, x_factors, x_statistics, w_factors, w_statistics


def _dgrad(triton: bool, dy: Tensor, inverse: Tensor, weight: Tensor, w_factors: Tensor) -> Tensor:
    """Returns dx = dy W for dy in 8 bits."""
    _, wt, _, _ = _quantize(triton, weight, w_factors, rows=False, columns=True, after=inverse)
    return scaled_mm(dy, wt, inverse, w_factors[INVERSE], weight.dtype, FAST_BACKWARD)


def _wgrad(dy: Tensor, x: Tensor, dy_inverse: Tensor, x_inverse: Tensor, weight: Tensor) -> Tensor:
    """Returns dW = dy^T x for dy and x in 8 bits and transposed, in the memory that was offered for it, if any."""
    return scaled_mm(dy, x, dy_inverse, x_inverse, weight.dtype, FAST_BACKWARD, out=take_offer(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor,
        x_scale: Tensor, w_scale: Tensor, dy_scale: Tensor, level: str, keeps_input: bool, triton: bool,
    ) -> Tensor:  # fmt: skip
        ctx.level, ctx.keeps_input, ctx.triton = level, keeps_input, triton
        columns = level == "full" and not keeps_input
        y, qt, x_factors, x_stats, w_factors, w_stats = _forward(x, weight, bias, (x_scale, w_scale), columns, triton)
        ctx.save_for_backward(qt if columns else x, weight, x_factors, w_factors, x_stats, w_stats, dy_scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_factors, w_factors, x_stats, w_stats, dy_scale = ctx.saved_tensors
        level, triton = ctx.level, ctx.triton
        dbias = bias_grad(dy) if ctx.needs_input_grad[2] else None
        if level == "forward":
            probe = torch.stack([x_stats, w_stats, torch.zeros_like(x_stats)])
            return dgrad(dy, weight), weight_grad(dy, x, weight), dbias, probe, *[None] * 6
        q, qt, factors, stats = _quantize(triton, dy, dy_scale, e5m2=_IS_E5M2, columns=level == "full")
        dx = _dgrad(triton, q, factors[INVERSE], weight, w_factors)
        if level == "full":
            if ctx.keeps_input:
                x = _quantize(triton, x, x_factors, rows=False, columns=True, after=factors)[1]
            dweight = _wgrad(qt, x, factors[INVERSE], x_factors[INVERSE], weight)
        else:
            dweight = weight_grad(dy, x, weight)
        return dx, dweight, dbias, torch.stack([x_stats, w_stats, stats]), *[None] * 6


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: Float8State) -> Tensor:
    """Computes y = x W^T (+ b) in 8 bits.

    Args:
        x: `(..., K)`; K and, for the gradient of the weight, the number of rows are multiples of 16.
        weight: `(N, K)`; N is a multiple of 16.
        bias: `(N,)` or None.
        state: scales, level and options.

    Returns:
        y `(..., N)`.
    """
    dtype = operand_dtype(x)
    rows, weight, bias = (
        x.reshape(-1, x.shape[-1]).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    if torch.is_grad_enabled():
        options = (state.level, state.keeps_input, state.triton)
        y = _Linear.apply(rows, weight, bias, state.probe, *state.scales, *options)
    else:
        y = _forward(rows, weight, bias, state.scales, False, state.triton)[0]
    return y.view(*x.shape[:-1], weight.shape[0])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        up_probe: Tensor, down_probe: Tensor, x_scale: Tensor, up_scale: Tensor, dup_scale: Tensor,
        y_scale: Tensor, down_scale: Tensor, dy_scale: Tensor, level: str, triton: bool,
    ) -> Tensor:  # fmt: skip
        ctx.level, ctx.triton = level, triton
        columns = level == "full"
        gate_up, qt, *up_known = _forward(x, up, up_bias, (x_scale, up_scale), columns, triton)
        out, down_known = _down(gate_up, down, down_bias, (y_scale, down_scale), triton)
        scales = (dup_scale, dy_scale)
        ctx.save_for_backward(qt if columns else x, gate_up, up, down, *up_known, *down_known, *scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, up, down, x_factors, x_stats, up_factors, up_stats, *rest = ctx.saved_tensors
        y_factors, y_stats, down_factors, down_stats, dup_scale, dy_scale = rest
        level, triton, needs = ctx.level, ctx.triton, ctx.needs_input_grad
        stats = dup_stats = torch.zeros_like(x_stats)
        full, dup_bias = level == "full", None
        if level == "forward":
            dgate_up, y = _swiglu_backward(triton, dgrad(dout, down), gate_up)
            dx = dgrad(dgate_up, up)
        else:
            q, qt, factors, stats = _quantize(triton, dout, dy_scale, e5m2=_IS_E5M2, columns=full)
            dy = _dgrad(triton, q, factors[INVERSE], down, down_factors)
            known = (dy, gate_up, dup_scale, y_factors)
            if full and not needs[2]:
                dq, dqt, y, dup_factors, dup_stats = _quantize_swiglu_backward(triton, *known)
            else:  # also for the gradient of a bias, which 8 bits would spoil
                dq, dqt, y, dup_factors, dup_stats, dgate_up = _in_parts(triton, *known, full)
            dx = _dgrad(triton, dq, dup_factors[INVERSE], up, up_factors)
        if full:
            ddown = _wgrad(qt, y, factors[INVERSE], y_factors[INVERSE], down)
            dup = _wgrad(dqt, x, dup_factors[INVERSE], x_factors[INVERSE], up)
        else:
            dup, ddown = weight_grad(dgate_up, x, up), weight_grad(dout, y, down)
        if needs[2]:
            dup_bias = bias_grad(dgate_up)
        probes = torch.stack([x_stats, up_stats, dup_stats]), torch.stack([y_stats, down_stats, stats])
        return dx, dup, dup_bias, ddown, bias_grad(dout) if needs[4] else None, *probes, *[None] * 8


def _in_parts(
    triton: bool, dy: Tensor, gate_up: Tensor, dup_scale: Tensor, y_factors: Tensor, full: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what `_quantize_swiglu_backward` does, and the gradient of gate_up before it is quantised.

    The product is in 8 bits and transposed with `full`, else in 16 bits.
    """
    dgate_up, y = _swiglu_backward(triton, dy, gate_up)
    dq, dqt, factors, stats = _quantize(triton, dgate_up, dup_scale, e5m2=_IS_E5M2, columns=full)
    if full:
        y = _quantize(triton, y, y_factors, rows=False, columns=True, after=dy)[1]
    return dq, dqt, y, factors, stats, dgate_up


def _down(
    gate_up: Tensor, down: Tensor, bias: Tensor | None, scales: tuple[Tensor, ...], triton: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Returns the down projection of the product, and factors and statistics of the product and the weight."""
    y, y_factors, y_stats = _quantize_swiglu(triton, gate_up, scales[0])
    w, _, w_factors, w_stats = _quantize(triton, down, scales[1])
    out = scaled_mm(y, w, y_factors[INVERSE], w_factors[INVERSE], gate_up.dtype, FAST_FORWARD, bias)
    return out, (y_factors, y_stats, w_factors, w_stats)


def float8_swiglu(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up_state: Float8State,
    down_state: Float8State,
) -> Tensor:
    """Computes the SwiGLU FFN (silu(gate) * up) down^T with [gate, up] = x up^T in 8 bits.

    Args:
        x: `(..., C)`.
        up: `(2 F, C)`, the weight of gate and up; C and F are multiples of 16.
        up_bias: `(2 F,)` or None.
        down: `(C, F)`, the weight of the down projection.
        down_bias: `(C,)` or None.
        up_state, down_state: scales and options of the two projections; the level of the first one counts.

    Returns:
        `(..., C)`.
    """
    dtype = operand_dtype(x)
    rows, up, down = x.reshape(-1, x.shape[-1]).to(dtype), up.to(dtype), down.to(dtype)
    biases = [None if bias is None else bias.to(dtype) for bias in (up_bias, down_bias)]
    triton = up_state.triton
    if torch.is_grad_enabled():
        probes, scales = (up_state.probe, down_state.probe), (*up_state.scales, *down_state.scales)
        y = _SwiGLU.apply(rows, up, biases[0], down, biases[1], *probes, *scales, up_state.level, triton)
    else:
        gate_up = _forward(rows, up, biases[0], up_state.scales, False, triton)[0]
        y = _down(gate_up, down, biases[1], down_state.scales, triton)[0]
    return y.view(*x.shape[:-1], down.shape[0])
