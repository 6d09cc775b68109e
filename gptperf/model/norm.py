"""Norms. Each norm also adds the residual before it normalises. Shapes: B batch, T tokens, C n_embd."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from gptperf.config import ModelConfig
from gptperf.ops import Ops
from gptperf.registry import built_in

__all__ = ["NORMS", "LayerNorm", "LayerNormNoBias", "RMSNorm"]


@built_in("normalization", "rmsnorm")
class RMSNorm(nn.Module):
    """RMSNorm with a weight."""

    center, bias = False, None

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.norm_eps
        self.op = ops.rms_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the norm of x + residual, and that sum, all `(B, T, C)`; without a residual, the norm of x, and x."""
        if residual is None:
            return self.op(x, self.weight, self.eps), x
        return self.op(x, self.weight, self.eps, residual)


@built_in("normalization", "layernorm")
class LayerNorm(nn.Module):
    """LayerNorm with a weight and a bias."""

    center = True
    has_bias: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if self.has_bias else None
        self.eps = config.norm_eps
        self.op = ops.layer_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the norm of x + residual, and that sum, all `(B, T, C)`; without a residual, the norm of x, and x."""
        if residual is None:
            return self.op(x, self.weight, self.bias, self.eps), x
        return self.op(x, self.weight, self.bias, self.eps, residual)


@built_in("normalization", "layernorm_nobias")
class LayerNormNoBias(LayerNorm):
    """LayerNorm with a weight and no bias."""

    has_bias = False


NORMS = {RMSNorm, LayerNorm, LayerNormNoBias}
"""gptperf's own norms, which the op decode_linear includes; a plugin's norm computes itself."""
