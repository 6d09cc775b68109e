"""The linear layer of the model."""

from torch import Tensor, nn

from gptperf.kernels.linear import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """nn.Linear that calls `gptperf.kernels.linear`, which decides the precision of every GEMM."""

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in_features)` -> `(..., out_features)`."""
        return linear(x, self.weight, self.bias)
