"""LayerNorm with a weight and an optional bias, with or without the residual add in the same kernel.

    y = (s - mean(s)) / sqrt(var(s) + eps) * w (+ b)  with s = x (+ residual)

`gptperf.kernels.norm` has the kernels, the formulas of backward, the precision and the elements moved.

Eager reference: `gptperf.kernels.reference.layer_norm`. Source: Ba, Kiros and Hinton, 2016, eq. 4.
"""

from typing import Any

import torch
from torch import Tensor

from gptperf.kernels import reference
from gptperf.kernels.checks import check_norm, check_triton
from gptperf.kernels.launch import register
from gptperf.kernels.norm import MAX_N, norm_backward, norm_forward, warn_too_wide

__all__ = ["layer_norm"]


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm_forward(x, residual, weight, bias, eps, center=True)


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, total, mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0 if bias_dtype is None else weight.shape[0], dtype=bias_dtype or weight.dtype)
    return dx, weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dsum = dsum if ctx.has_residual else None
    dx, dweight, dbias = _layer_norm_backward(dy, dsum, x, weight, mean, rstd, ctx.bias_dtype)
    return dx, dx if ctx.has_residual else None, dweight, None if ctx.bias_dtype is None else dbias, None


_layer_norm_backward = register(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    norm_backward,
    _backward_fake,
)
_layer_norm = register(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _differentiate,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes LayerNorm over the last dimension; see `gptperf.kernels.reference.layer_norm` for arguments and errors.

    Rows wider than 16384 run in the reference, with one warning.
    """
    check_norm("layer_norm", x, weight, bias, residual)
    check_triton("layer_norm", x)
    if x.shape[-1] > MAX_N:
        warn_too_wide("layer_norm", x.shape[-1])
        return reference.layer_norm(x, weight, bias, eps, residual)
    y, total, _, _ = _layer_norm(x, residual, weight, bias, eps)
    return y if residual is None else (y, total)
