"""Transformer blocks: pre-norm and post-norm. Shapes: B batch, T tokens, C n_embd.

A block passes the output of its last branch and the residual stream on as two tensors, so that the norm that follows
adds them in its own kernel.
"""

from torch import Tensor, nn

from gptperf.config import ModelConfig
from gptperf.model.attention import Attention, KVCache
from gptperf.model.mask import Mask
from gptperf.model.position import NoPosition
from gptperf.ops import Ops
from gptperf.registry import built_in, component

__all__ = ["PostNormBlock", "PreNormBlock"]


@built_in("norm_position", "pre")
class PreNormBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + ffn(norm(x)); the norm of the next block does the second add."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        norm = component("normalization", config.normalization)
        self.norm1 = norm(config, ops)
        self.attention = Attention(config)
        self.norm2 = norm(config, ops)
        self.ffn = component("ffn_type", config.ffn_type)(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        position: NoPosition,
        cache: KVCache | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the block.

        Args:
            x: `(B, T, C)`, the output of the previous branch.
            residual: `(B, T, C)`, the residual stream, or None in the first block. x + residual is the block's input.
            position: the position encoding.
            cache: keys and values of the tokens before x, or None.
            mask: window and documents of the attention, or None.

        Returns:
            The output of the last branch and the residual stream, whose sum is the block's output.
        """
        x, residual = self.norm1(x, residual)
        x = self.dropout(self.attention(x, position, cache, mask))
        x, residual = self.norm2(x, residual)
        return self.dropout(self.ffn(x)), residual


@built_in("norm_position", "post")
class PostNormBlock(PreNormBlock):
    """Computes norm(x + attention(x)), then norm(x + ffn(x)); the output of a norm is also the residual stream."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        position: NoPosition,
        cache: KVCache | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the output of the block `(B, T, C)` from x `(B, T, C)`; the residual is None before and after."""
        x, _ = self.norm1(self.dropout(self.attention(x, position, cache, mask)), x)
        x, _ = self.norm2(self.dropout(self.ffn(x)), x)
        return x, None
