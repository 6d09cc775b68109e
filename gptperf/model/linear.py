"""The linear layer of the model."""

from torch import Tensor, nn

from gptperf.kernels.float8_linear import Float8State, float8_linear
from gptperf.kernels.linear import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """An nn.Linear that calls `gptperf.kernels.linear`, which decides the precision of every GEMM."""

    float8: Float8State | None = None
    """How the layer is computed in 8 bits, or None; `gptperf.training.float8` sets it."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(..., out_features)` for x `(..., in_features)`."""
        if self.float8 is not None:
            return float8_linear(x, self.weight, self.bias, self.float8)
        return linear(x, self.weight, self.bias)
