"""The three matmuls of a linear layer, for the linear layers of the model and for the fused ops.

    forward:    y = x W^T (+ b)
    backward:   dx = dy W  (`dgrad`),   dW = dy^T x  (`wgrad`),   db = sum of dy over its rows  (`bias_grad`)

This file alone decides the precision of a matmul: the operands have one dtype (`operand_dtype`), sums are in float32,
and each result is rounded once to its own dtype. The functions call aten ops and are not registered ops themselves, so
that autograd, torch.compile, selective recomputation and FlopCounterMode see every matmul. Elements moved for M rows of
K columns and N outputs: M K + N K + M N for each matmul.

PyTorch differentiates `linear`, and its gradients have the same bits as those of `dgrad`, `wgrad` and `bias_grad`. An
op with its own backward calls these three functions. Where memory was offered for the gradient of a weight
(`offer_gradient`), backward writes it there, in ops and in `linear`, and the copy to its bucket is saved.

The matmuls of `gptperf.kernels.float8_linear` have operands in 8 bits: `scaled_mm`.

Reference: `torch.nn.functional.linear`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_product", "bias_grad", "dgrad", "linear", "offer_gradient", "operand_dtype", "scaled_mm", "take_offer"]
__all__ += ["weight_grad", "wgrad"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Computes y = x W^T (+ b).

    Args:
        x: `(..., K)`; `(M, K)` with `out`.
        weight: `(N, K)`.
        bias: `(N,)` or None; None with `out`.
        out: `(M, N)`, to which y is written; y then has no gradient.

    Returns:
        y `(..., N)`.
    """
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hasattr(weight, _OFFER):
        return F.linear(x, weight, bias)
    if torch._C._are_functorch_transforms_active():  # torch.func in a plugin, which transforms PyTorch's own ops
        return F.linear(x, weight, bias)
    dtype = operand_dtype(x)
    if weight.dtype != dtype:  # in an autocast of a plugin, whose casts PyTorch differentiates
        return F.linear(x, weight, bias)
    return _Linear.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))


class _Linear(torch.autograd.Function):
    """Computes `linear`; backward writes the gradient of the weight to the memory that was offered for it.

    Backward can be differentiated again, like that of PyTorch; it then takes no offer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dgrad(dy, weight) if needs_x else None
        return dx, weight_grad(dy, x, weight) if needs_weight else None, bias_grad(dy) if needs_bias else None


_OFFER = "offered_gradient"


def offer_gradient(weight: Tensor, place: Tensor) -> None:
    """Offers memory for the gradient of a weight to the next backward.

    Its first `weight_grad` writes there and returns that memory; a second one, of a weight with two uses, does not.
    Whoever calls `take_offer` has to write there.

    Args:
        weight: a parameter.
        place: in the shape and dtype of the weight, contiguous.
    """
    setattr(weight, _OFFER, place)


def weight_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Computes `wgrad` into the memory that was offered for the gradient of the weight, if any is left."""
    place = take_offer(weight) if weight.dtype == dy.dtype == x.dtype else None
    return wgrad(dy, x) if place is None else wgrad(_rows(dy), _rows(x), out=place)


def take_offer(weight: Tensor) -> Tensor | None:
    """Returns the memory that was offered for the gradient of the weight, once, or None.

    A gradient that is differentiated again is no final one, and the matmul into given memory has no derivative.
    """
    place = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else getattr(weight, _OFFER, None)
    if place is None or place.dtype != weight.dtype:
        return None
    setattr(weight, _OFFER, None)
    # A view, because autograd keeps a gradient without a copy only if nothing else holds the tensor.
    return place.view(place.shape)


def dgrad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Computes dx = dy W.

    Args:
        dy: `(..., N)`; `(M, N)` with `out`.
        weight: `(N, K)`.
        out: `(M, K)` in dy's dtype or float32, to which dx is written.

    Returns:
        dx `(..., K)`.
    """
    if out is None:
        return dy @ weight
    return _mm(dy, weight, out, add=False)


def wgrad(dy: Tensor, x: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Computes dW = dy^T x over all rows.

    Args:
        dy: `(..., N)`; `(M, N)` with `out`.
        x: `(..., K)`; `(M, K)` with `out`.
        out: `(N, K)` in dy's dtype or float32, to which dW is written.
        add: add dW to `out` instead of overwriting it.

    Returns:
        dW `(N, K)`.
    """
    if out is None:
        return _rows(dy).t() @ _rows(x)
    return _mm(dy.t(), x, out, add)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    dtype: torch.dtype,
    fast: bool,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes a b^T of 8-bit floats, divided by their scales, (+ bias); on a CPU in float32.

    Args:
        a: `(M, K)`; K is a multiple of 16.
        b: `(N, K)`; N is a multiple of 16.
        a_inverse, b_inverse: the inverse scales, float32 scalars.
        dtype: dtype of the result, to which it is rounded once.
        fast: let Hopper's tensor cores keep partial sums in fewer bits than float32.
        bias: `(N,)` in `dtype`, or None.
        out: `(M, N)` in `dtype`, to which the result is written, or None.

    Returns:
        `(M, N)`.
    """
    if a.is_cuda:
        # Inductor cannot add dimensions to a scalar that is a view of another tensor.
        inverses = a_inverse.view(1, 1), b_inverse.view(1, 1)
        if out is None:
            return torch._scaled_mm(a, b.t(), *inverses, bias, out_dtype=dtype, use_fast_accum=fast)
        return torch._scaled_mm(a, b.t(), *inverses, bias, out_dtype=dtype, use_fast_accum=fast, out=out)
    y = torch.mm(a.float(), b.float().t()) * (a_inverse * b_inverse)
    y = (y if bias is None else y + bias.float()).to(dtype)
    return y if out is None else out.copy_(y)


def bias_grad(dy: Tensor) -> Tensor:
    """Returns db `(N,)`, the sum of dy `(..., N)` over all rows."""
    return _rows(dy).sum(0)


def add_product(x: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """Returns beta x + alpha a b for each matrix of a batch, which an optimizer of whole matrices needs.

    Args:
        x: `(B, M, N)`; ignored if `beta` is 0.
        a: `(B, M, K)`.
        b: `(B, K, N)`.
        beta, alpha: factors.
    """
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the operands of a matmul with x: the dtype of autocast if it is on, else that of x.

    An op with its own autograd function casts the operands itself, because autocast casts only for PyTorch's ops.
    """
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    """Computes out = a b or out += a b, rounded once; out has a's dtype or float32."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not a.is_cuda:  # PyTorch has a matmul with an out_dtype on CUDA only
        return torch.addmm(out, a.float(), b.float(), out=out) if add else torch.mm(a.float(), b.float(), out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
