"""The ops that quantise to 8-bit floats in eager PyTorch: the fallback, and the oracle of the tests.

The arithmetic is in float32 (in float64 for float64 input). What swiglu computes is rounded to the dtype of its input,
as if it were stored in between, and then to 8 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf.kernels.checks import check_quantize, check_swiglu
from gptperf.kernels.float8 import INVERSE, PROGRAMS, format_of, scale_of

__all__ = ["quantize", "quantize_swiglu", "quantize_swiglu_backward", "swiglu_backward"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu_backward(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    """Computes the gradient of `swiglu` without a weight, and its product again.

    Args:
        dy: `(..., F)`, the gradient of the product.
        gate_up: `(..., 2 F)`, like the argument of `swiglu`.
        product: whether the product is wanted.

    Returns:
        The gradient of gate_up, like gate_up, and the product, like dy; it is empty if it is not wanted.
    """
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    dy, sigmoid = dy.to(gate.dtype), gate.sigmoid()
    silu = gate * sigmoid
    dgate_up = torch.cat([dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu], -1)
    return dgate_up.to(gate_up.dtype), (silu * up if product else silu.new_empty(0)).to(gate_up.dtype)


def quantize(
    x: Tensor,
    scale: Tensor,
    *,
    e5m2: bool = False,
    rows: bool = True,
    columns: bool = False,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantises a matrix to 8-bit floats: q = round(clamp(x s)); infinities become NaN.

    Args:
        x: `(M, N)`.
        scale: float32, of which the first element is s; 0 stands for the scale of x's own largest value.
        e5m2: whether the format is E5M2, else E4M3.
        rows, columns: whether q and its transpose are wanted.
        after: None in the first use of x in a step. A later use, in backward, gives the scale that the first one has
            returned and gets no statistics; it gives a tensor of backward here, without which torch.compile would move
            it to the forward pass, and keep q until backward.

    Returns:
        q `(M, N)`, q transposed `(N, M)`, factors `(FACTORS,)` float32 with the scale at 0 and its inverse at
        `INVERSE`, and the statistics of x in `PROGRAMS` parts, `(4, PROGRAMS)` float32. What is not wanted is empty.
        `gptperf.kernels.float8` defines the names in capitals.

    Raises:
        ValueError: x is not a matrix of floating-point numbers, or the scale does not fit.

    Source: Micikevicius et al., 2022, section 3.
    """
    check_quantize(x, scale)
    fresh = after is None
    form, wide = format_of(e5m2), _wide(x)
    size = wide.abs()
    amax = size.max().float() if x.numel() else scale.new_zeros(())
    used = torch.where(scale.flatten()[0] == 0, scale_of(amax, form.top), scale.flatten()[0]) if fresh else scale[0]
    q = torch.where(size < torch.inf, (wide * used).clamp(-form.largest, form.largest), torch.nan).to(form.dtype)
    scaled, nothing = size * used, q.new_empty(0)
    saturated = ((scaled > form.largest) & (size < torch.inf)).sum()
    flushed = ((scaled <= form.smallest / 2) & (size > 0)).sum()
    counts = torch.stack([amax, saturated.float(), flushed.float(), torch.full_like(amax, x.numel())])
    parts = F.pad(counts[:, None], (0, PROGRAMS - 1))
    factors = torch.stack([used, 1 / used]).repeat_interleave(INVERSE) if fresh else scale.new_empty(0)
    transposed = q.t().contiguous() if columns else nothing
    return q if rows else nothing, transposed, factors, parts if fresh else scale.new_empty(0)


def quantize_swiglu(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes silu(gate) * up in E4M3.

    Args:
        gate_up: `(M, 2 F)`: F gate columns, then F up columns.
        scale: see `quantize`.

    Returns:
        The product `(M, F)`, its factors, and its statistics, as from `quantize`.

    Raises:
        ValueError: gate_up or the scale does not fit.
    """
    check_swiglu(gate_up, None, None)
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    q, _, factors, statistics = quantize((gate * gate.sigmoid() * up).to(gate_up.dtype), scale)
    return q, factors, statistics


def quantize_swiglu_backward(
    dy: Tensor, gate_up: Tensor, scale: Tensor, product_scale: Tensor, *, e5m2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradient of gate_up in 8 bits, and the product of `quantize_swiglu` again, transposed.

    Args:
        dy: `(M, F)`, the gradient of the product.
        gate_up: `(M, 2 F)`.
        scale: of the gradient, see `quantize`.
        product_scale: the scale that `quantize_swiglu` has returned.
        e5m2: whether the format of the gradient is E5M2, else E4M3.

    Returns:
        The gradient `(M, 2 F)` and transposed `(2 F, M)`, the product transposed `(F, M)`, and the gradient's
        factors and statistics, as from `quantize`.

    Raises:
        ValueError: gate_up or a scale does not fit.
    """
    check_swiglu(gate_up, None, None)
    dgate_up, product = swiglu_backward(dy, gate_up, True)
    q, columns, factors, statistics = quantize(dgate_up, scale, e5m2=e5m2, columns=True)
    return q, columns, quantize(product, product_scale, rows=False, columns=True, after=dy)[1], factors, statistics
