"""RMSNorm with a weight, with or without the residual add in the same kernel.

    y = s / sqrt(mean(s^2) + eps) * w  with s = x (+ residual)

`gptperf.kernels.norm` has the kernels, the formulas of backward, the precision and the elements moved.

Eager reference: `gptperf.kernels.reference.rms_norm`. Source: Zhang and Sennrich, 2019, eq. 4.
"""

from typing import Any

import torch
from torch import Tensor

from gptperf.kernels import reference
from gptperf.kernels.checks import check_norm, check_triton
from gptperf.kernels.launch import register
from gptperf.kernels.norm import MAX_N, norm_backward, norm_forward, warn_too_wide

__all__ = ["rms_norm"]


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = norm_forward(x, residual, weight, None, eps, center=False)
    return y, total, rstd


def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = norm_backward(dy, dsum, x, weight, rstd.new_empty(0), rstd, bias_dtype=None)
    return dx, dweight


def _backward_fake(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, rstd)


def _differentiate(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight = _rms_norm_backward(dy, dsum if ctx.has_residual else None, x, weight, rstd)
    return dx, dx if ctx.has_residual else None, dweight, None


_rms_norm_backward = register(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_rms_norm = register(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _differentiate,
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes RMSNorm over the last dimension; see `gptperf.kernels.reference.rms_norm` for arguments and errors.

    Rows wider than 16384 run in the reference, with one warning.
    """
    check_norm("rms_norm", x, weight, None, residual)
    check_triton("rms_norm", x)
    if x.shape[-1] > MAX_N:
        warn_too_wide("rms_norm", x.shape[-1])
        return reference.rms_norm(x, weight, eps, residual)
    y, total, _ = _rms_norm(x, residual, weight, eps)
    return y if residual is None else (y, total)
