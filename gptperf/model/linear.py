"""The linear layer of the model."""

from torch import Tensor, nn

from gptperf.kernels.linear import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """An nn.Linear that calls `gptperf.kernels.linear`, which decides the precision of every GEMM."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(..., out_features)` for x `(..., in_features)`."""
        return linear(x, self.weight, self.bias)
