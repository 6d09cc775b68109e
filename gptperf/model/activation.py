"""Activations of the standard FFN: functions from a tensor of any shape and floating-point dtype to one like it."""

import torch.nn.functional as F
from torch import Tensor

from gptperf.registry import built_in

__all__ = ["gelu_tanh", "relu_squared"]

built_in("activation", "gelu")(F.gelu)
built_in("activation", "silu")(F.silu)
built_in("activation", "relu")(F.relu)
built_in("activation", "leaky_relu")(F.leaky_relu)


@built_in("activation", "gelu_tanh")
def gelu_tanh(x: Tensor) -> Tensor:
    """Computes GELU in its tanh approximation, as the released GPT-2 does (Hendrycks and Gimpel, 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


@built_in("activation", "relu_squared")
def relu_squared(x: Tensor) -> Tensor:
    """Computes relu(x)^2 (So et al., 2021, Primer)."""
    return F.relu(x).square()
