"""Transformer blocks: pre-norm and post-norm. Shapes: B batch, T tokens, C n_embd.

A block passes on a branch and the residual stream apart from each other, so that every residual add runs inside the
norm that follows it.
"""

from torch import Tensor, nn

from gptperf.config import ModelConfig
from gptperf.model.attention import Attention, KVCache
from gptperf.model.position import NoPosition
from gptperf.ops import Ops
from gptperf.registry import built_in, component

__all__ = ["PostNormBlock", "PreNormBlock"]


@built_in("norm_position", "pre")
class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the second add is left to the next norm."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        norm = component("normalization", config.normalization)
        self.norm1 = norm(config, ops)
        self.attention = Attention(config)
        self.norm2 = norm(config, ops)
        self.ffn = component("ffn_type", config.ffn_type)(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, residual: Tensor | None, position: NoPosition, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Branch x and residual `(B, T, C)`, whose sum is the block's input -> those whose sum is its output."""
        x, residual = self.norm1(x, residual)
        x = self.dropout(self.attention(x, position, cache))
        x, residual = self.norm2(x, residual)
        return self.dropout(self.ffn(x)), residual


@built_in("norm_position", "post")
class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + ffn(x)); the residual stream is the last norm's output."""

    def forward(
        self, x: Tensor, residual: Tensor | None, position: NoPosition, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Input x `(B, T, C)`, no residual -> the output, no residual."""
        x, _ = self.norm1(self.dropout(self.attention(x, position, cache)), x)
        x, _ = self.norm2(self.dropout(self.ffn(x)), x)
        return x, None
