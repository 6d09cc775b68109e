"""The three matrix products of a linear layer, in plain PyTorch: every GEMM of the model and of the fused ops is one.

    forward:    y = x W^T (+ b)
    backward:   dx = dy W  (`dgrad`),   dW = dy^T x  (`wgrad`),   db = sum of dy over its rows  (`bias_grad`)

This file alone decides the precision of a product: the operands have one dtype (`operand_dtype`), sums are in float32,
and each result is rounded once to its own dtype. The functions are compositions of aten
ops instead of an op of their own, so autograd, torch.compile, selective recomputation and FlopCounterMode see every
matrix product. Elements moved for M rows of K columns and N outputs: M K + N K + M N for each of the three.

PyTorch differentiates `linear`, by the products that `dgrad` and `wgrad` compute, to the bit; an op that has a backward
of its own calls these two. Reference: `torch.nn.functional.linear`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bias_grad", "dgrad", "linear", "operand_dtype", "wgrad"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y = x W^T (+ b).

    Args:
        x: `(..., K)`; `(M, K)` with `out`.
        weight: `(N, K)`.
        bias: `(N,)` or None; None with `out`.
        out: `(M, N)`, where y is written; there is no gradient then.

    Returns:
        y `(..., N)`.
    """
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out)


def dgrad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx = dy W.

    Args:
        dy: `(..., N)`; `(M, N)` with `out`.
        weight: `(N, K)`.
        out: `(M, K)` in dy's dtype or float32, where dx is written.

    Returns:
        dx `(..., K)`.
    """
    if out is None:
        return dy @ weight
    return _mm(dy, weight, out, add=False)


def wgrad(dy: Tensor, x: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """dW = dy^T x, summed over all rows.

    Args:
        dy: `(..., N)`; `(M, N)` with `out`.
        x: `(..., K)`; `(M, K)` with `out`.
        out: `(N, K)` in dy's dtype or float32, where dW is written.
        add: add dW to what `out` holds.

    Returns:
        dW `(N, K)`.
    """
    if out is None:
        return _rows(dy).t() @ _rows(x)
    return _mm(dy.t(), x, out, add)


def bias_grad(dy: Tensor) -> Tensor:
    """The gradient `(N,)` of the bias: the sum of dy `(..., N)` over its rows."""
    return _rows(dy).sum(0)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the operands of a product with x enter it: that of autocast where it is on, else x's.

    An op with an autograd function of its own casts to it, because autocast casts for PyTorch's own ops only.
    """
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    """out = a b, or out += a b; out has a's dtype or float32, and is rounded once."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not a.is_cuda:  # PyTorch has a product with an out_dtype on CUDA only
        return torch.addmm(out, a.float(), b.float(), out=out) if add else torch.mm(a.float(), b.float(), out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
