"""Position encodings. Shapes: B batch, T tokens, C n_embd, H query heads, K key and value heads, D head_dim."""

import math

import torch
from torch import Tensor, nn

from gptperf.config import ModelConfig
from gptperf.ops import Ops
from gptperf.registry import built_in

__all__ = ["LearnedAbsolute", "NoPosition", "RoPE", "frequencies"]


@built_in("position_encoding", "none")
class NoPosition(nn.Module):
    """No position encoding. The module only splits the heads, and applies QK-norm to queries and keys."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.heads = (config.n_head, config.kv_heads)
        self.eps = config.norm_eps
        self.norm = ops.rms_norm
        self.decode_attention = ops.decode_attention
        ours = type(self).__module__ == __name__  # a plugin may split the heads in another way
        self.packed_attention = ops.packed_attention if ours else None

    def embed(self, x: Tensor, start: int | Tensor, starts: Tensor | None = None) -> Tensor:
        """Returns the model's input `(B, T, C)` from x `(B, T, C)`, the token embeddings of positions start, ...

        With `starts`, `(B, T)`, the positions of a document count from its first token, at `starts`. If T is 1, start
        may also be the position of each sequence's token, `(B,)` int64.
        """
        return x

    def split(self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, start: int) -> tuple[Tensor, ...]:
        """Splits the packed projection of the positions from start on into heads.

        Args:
            qkv: `(B, T, (H + 2K) D)`: H query heads, then K key heads, then K value heads.
            q_weight, k_weight: `(D,)`, the weights of QK-norm, or None without it.
            start: position of the first token.

        Returns:
            q `(B, T, H, D)`, k and v `(B, T, K, D)`.
        """
        H, K = self.heads
        q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)
        if q_weight is not None:
            q, k = self.norm(q, q_weight, self.eps), self.norm(k, k_weight, self.eps)
        return q, k, v

    def attend(self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> Tensor | None:
        """Computes causal attention of the packed projection of the positions from 0 on; the op overwrites it.

        Args:
            qkv, q_weight, k_weight: as for `split`.

        Returns:
            `(B, T, H, D)`, or None where the op cannot run; then qkv is as it was.
        """
        if self.packed_attention is None:
            return None
        (cos, sin), interleaved = self.tables()
        return self.packed_attention(qkv, cos, sin, *self.heads, q_weight, k_weight, self.eps, interleaved)

    def decode(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cache: tuple[Tensor, Tensor],
        positions: Tensor,
        window: int,
    ) -> Tensor:
        """Computes attention for one new token of each sequence, and adds its key and value to the cache.

        Args:
            qkv, q_weight, k_weight: as for `split`, with T = 1.
            cache: keys and values, `(B, S, K, D)`.
            positions: position of each new token, `(B,)` int64.
            window: tokens that a token attends to, itself included; 0: all before it.

        Returns:
            `(B, 1, H D)`.
        """
        tables, interleaved = self.tables()
        return self.decode_attention(qkv, positions, *cache, *tables, q_weight, k_weight, self.eps, interleaved, window)

    def tables(self) -> tuple[tuple[Tensor | None, Tensor | None], bool]:
        """Returns cosines and sines by which heads are rotated, or None twice; and whether pairs are interleaved."""
        return (None, None), False


@built_in("position_encoding", "learned_absolute")
class LearnedAbsolute(NoPosition):
    """Adds a learned vector for each position to the token embedding."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__(config, ops)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: Tensor, start: int | Tensor, starts: Tensor | None = None) -> Tensor:
        if isinstance(start, Tensor):
            return x + self.wpe(start)[:, None].to(x.dtype)
        if starts is not None:
            return x + self.wpe(torch.arange(x.shape[1], device=x.device) - starts).to(x.dtype)
        return x + self.wpe.weight[start : start + x.shape[1]].to(x.dtype)


def frequencies(config: ModelConfig) -> Tensor:
    """Returns the angles of RoPE from one position to the next, `(D/2,)` float64.

    Linear scaling divides all angles by `rope_factor` (Chen et al., 2023). The scaling of LLaMA 3.1 counts how many
    waves of an angle fit into the original block. It divides angles with fewer than `rope_low_freq_factor` waves, keeps
    angles with more than `rope_high_freq_factor`, and in between takes a mean of both results, with weights that are
    linear in the waves.
    """
    D = config.head_width
    found = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if config.rope_scaling == "none":
        return found
    scaled = found / config.rope_factor
    if config.rope_scaling == "linear":
        return scaled
    waves = config.rope_original_block_size * found / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return kept * found + (1 - kept) * scaled


@built_in("position_encoding", "rope")
class RoPE(NoPosition):
    """Rotary position encoding of queries and keys (Su et al., 2021); the model has one pair of float32 tables.

    Scores depend on the distance of two tokens alone, so a document may start at any position.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__(config, ops)
        self.interleaved = config.rope_pairs == "interleaved"
        self.op = ops.rope
        angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequencies(config)  # (T, D/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def split(self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, start: int) -> tuple[Tensor, ...]:
        H, K = self.heads
        return self.op(qkv, self.cos[start:], self.sin[start:], H, K, q_weight, k_weight, self.eps, self.interleaved)

    def tables(self) -> tuple[tuple[Tensor | None, Tensor | None], bool]:
        return (self.cos, self.sin), self.interleaved
