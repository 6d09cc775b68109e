"""Cards of the attention backends, and the parts of attention that no backend changes."""

from dataclasses import dataclass

from gptperf.cards.quantities import Matmul

__all__ = ["FLASH_ATTN", "MANUAL", "SDPA", "AttentionBackend", "causal_pairs", "projections"]


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """A backend runs softmax(Q K^T) V. All backends have the FLOPs of `causal_pairs`."""

    kept_score_matrices: int = 0
    """`(T, T)` matrices of a head that are kept for backward."""

    def kept(self, T: int, H: int) -> int:
        """Elements of a token and layer kept for backward, besides q, k, v and the output."""
        return self.kept_score_matrices * H * T

    def kept_statistics(self, H: int) -> int:
        """float32 numbers of a token and layer kept for backward: the log-sum-exp of every head."""
        return H


SDPA = AttentionBackend()
FLASH_ATTN = AttentionBackend()
MANUAL = AttentionBackend(kept_score_matrices=2)


def projections(C: int, KD: int) -> tuple[Matmul, Matmul]:
    """The packed projection to queries, keys and values, and the output projection."""
    return Matmul("qkv", C + 2 * KD, C), Matmul("out", C, C)


def causal_pairs(T: int) -> int:
    """(query, key) pairs of a head and sequence: token t attends to t tokens, itself among them."""
    return T * (T + 1) // 2
