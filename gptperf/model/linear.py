"""The linear layer of the model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gptperf.kernels.checks import DECODE_ROWS, DECODE_WIDTH
from gptperf.kernels.float8_linear import Float8State, float8_linear
from gptperf.kernels.linear import linear, operand_dtype

__all__ = ["Linear", "decode_layer"]


class Linear(nn.Linear):
    """An nn.Linear that calls `gptperf.kernels.linear`, which decides the precision of every GEMM.

    Args:
        in_features, out_features, bias: see `nn.Linear`.
        packed: rows of the matrices that are packed in the weight, such as those of gate and up, which an optimizer of
            whole matrices updates one by one; default: the weight is one matrix.
    """

    float8: Float8State | None = None
    """How the layer is computed in 8 bits, or None; `gptperf.training.float8` sets it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, packed: tuple[int, ...] = ()):
        super().__init__(in_features, out_features, bias)
        assert sum(packed) in (0, out_features), f"{packed} rows are not {out_features}"
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(..., out_features)` for x `(..., in_features)`."""
        if self.float8 is not None:
            return float8_linear(x, self.weight, self.bias, self.float8)
        return linear(x, self.weight, self.bias)

    def decodes(self, x: Tensor) -> bool:
        """Returns whether the op decode_linear computes this layer for as many rows as x has, in x's dtype."""
        fits = x.numel() <= DECODE_ROWS * x.shape[-1] and self.in_features <= DECODE_WIDTH
        return fits and self.float8 is None and x.dtype == self.weight.dtype == operand_dtype(x)


def decode_layer(
    op: Callable[..., Tensor],
    x: Tensor,
    layer: Linear,
    norm: nn.Module | None = None,
    activation: str = "",
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Calls the op decode_linear with the parameters of a layer and of the norm before it, one of gptperf's own."""
    before: tuple[Any, ...] = (None, None, 0.0, False)
    if norm is not None:
        before = norm.weight, norm.bias, norm.eps, norm.center
    return op(x, layer.weight, layer.bias, *before, activation, residual)
