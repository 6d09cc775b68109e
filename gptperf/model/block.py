"""Transformer blocks: pre-norm and post-norm. Shapes: B batch, T tokens, C n_embd.

A block passes the output of its last branch and the residual stream on as two tensors, so that the norm that follows
adds them in its own kernel. In a step of text generation with a few sequences, norms, activations and adds are part of
the linear layers (`gptperf.kernels.decode_linear`), so that the step has few kernels.
"""

from typing import Any

from torch import Tensor, nn

from gptperf.config import ModelConfig
from gptperf.kernels.checks import ACTIVATIONS
from gptperf.model.attention import Attention, KVCache
from gptperf.model.ffn import StandardFFN, SwiGLU
from gptperf.model.linear import Linear, decode_layer
from gptperf.model.mask import Mask
from gptperf.model.norm import NORMS
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
        self.decode_linear = ops.decode_linear

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
        if cache is not None and self._decodes(x, cache):
            return self._decode(x if residual is None else x + residual, position, cache, mask), None
        x, residual = self.norm1(x, residual)
        x = self.dropout(self.attention(x, position, cache, mask))
        x, residual = self.norm2(x, residual)
        return self.dropout(self.ffn(x)), residual

    def _decodes(self, x: Tensor, cache: KVCache) -> bool:
        """Returns whether this is a step of a few sequences, and all components are gptperf's own."""
        ours = {type(self.norm1), type(self.norm2)} <= NORMS and type(self.ffn) in (StandardFFN, SwiGLU)
        if self.training or cache.positions is None or not ours or type(self.attention) is not Attention:
            return False
        layers = (self.attention.qkv, self.attention.out, *self.ffn.projections)
        known = self.ffn.name == SwiGLU.name or self.ffn.name in ACTIVATIONS
        return known and all(type(layer) is Linear and layer.decodes(x) for layer in layers)

    def _decode(self, x: Tensor, position: NoPosition, cache: KVCache, mask: Mask | None) -> Tensor:
        """Returns the output of the block `(B, 1, C)` for one token of each sequence."""
        up, down = self.ffn.projections
        y = self.attention.decode(self._linear(x, self.attention.qkv, self.norm1), position, cache, mask)
        x = self._linear(y, self.attention.out, residual=x)
        return self._linear(self._linear(x, up, self.norm2, self.ffn.name), down, residual=x)

    def _linear(self, *arguments: Any, residual: Tensor | None = None) -> Tensor:
        return decode_layer(self.decode_linear, *arguments, residual=residual)


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
        if cache is not None and self._decodes(x, cache):
            return self._decode(x, position, cache, mask), None
        x, _ = self.norm1(self.dropout(self.attention(x, position, cache, mask)), x)
        x, _ = self.norm2(self.dropout(self.ffn(x)), x)
        return x, None

    def _decode(self, x: Tensor, position: NoPosition, cache: KVCache, mask: Mask | None) -> Tensor:
        up, down = self.ffn.projections
        y = self.attention.decode(self._linear(x, self.attention.qkv), position, cache, mask)
        x, _ = self.norm1(self._linear(y, self.attention.out, residual=x))
        return self.norm2(self._linear(self._linear(x, up, None, self.ffn.name), down, residual=x))[0]
