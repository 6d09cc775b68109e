"""Cards of the attention backends, and the parts of attention that no backend changes."""

from dataclasses import dataclass

from gptperf.cards.quantities import Matmul

__all__ = ["FLASH_ATTN", "MANUAL", "SDPA", "AttentionBackend", "causal_pairs", "projections"]


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """A backend computes softmax(Q K^T) V. All backends have the same FLOPs, which follow from `causal_pairs`."""

    kept_score_matrices: int = 0
    """Number of `(T, T)` matrices per head that autograd keeps for backward."""
    windows: bool = False
    """Whether the backend can limit attention to a window: `forward` takes a mask."""
    documents: bool = False
    """Whether the backend can keep attention inside a document: `forward` takes a mask."""
    block_masks: bool = False
    """Whether windows and documents run in FlexAttention, where it can: without dropout, with T a multiple of 128."""

    def kept(self, T: int, H: int) -> int:
        """Returns the elements kept for backward per token and layer, besides q, k, v and the output."""
        return self.kept_score_matrices * H * T

    def kept_mask(self, T: int, dropout: bool) -> int:
        """Returns the elements of a mask of windows or documents that are kept per query and layer."""
        return T if self.block_masks and (dropout or T % 128 > 0) else 0

    def kept_statistics(self, H: int) -> int:
        """Returns the float32 numbers kept for backward per token and layer: the log-sum-exp of every head."""
        return H


SDPA = AttentionBackend(windows=True, documents=True, block_masks=True)
FLASH_ATTN = AttentionBackend(windows=True)
MANUAL = AttentionBackend(kept_score_matrices=2, windows=True, documents=True)


def projections(C: int, HD: int, KD: int) -> tuple[Matmul, Matmul]:
    """Returns the packed projection to queries, keys and values, and the output projection."""
    return Matmul("qkv", HD + 2 * KD, C), Matmul("out", C, HD)


def causal_pairs(T: int, window: int) -> int:
    """Returns the (query, key) pairs per head and sequence: the t-th token attends to min(t, window) tokens."""
    w = min(T, window)
    return w * (w + 1) // 2 + (T - w) * w
