"""Cards of the position encodings. They include the split of the packed projection into heads, and QK-norm.

The packed projection of a token has C + 2 K D elements: queries, keys and values. Queries and keys have C + K D.
"""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost, Moved

__all__ = ["LEARNED_ABSOLUTE", "NO_POSITION", "ROPE", "LearnedAbsolute", "PositionEncoding", "RoPE"]


@dataclass(frozen=True, kw_only=True)
class PositionEncoding:
    """No encoding: the split into heads is a view, and QK-norm is an op of its own."""

    cost: Cost
    op: str | None = None
    """The op of `gptperf.ops` that splits, normalizes and encodes at once; None where there is no such op."""

    def parameters(self, T: int, C: int) -> int:
        """Parameters of the whole model's encoding."""
        return 0

    def elements(self, L: int, C: int, KD: int) -> int:
        """Elements of a token that the encoding changes, over all layers."""
        return 0

    def moved(self, L: int, C: int, KD: int, qk_norm: bool) -> Moved:
        """Elements moved for one token by encoding, split and QK-norm, over all layers."""
        # Backward of the split writes the three gradients into one tensor.
        forward, backward = 0, 2 * (C + 2 * KD)
        if qk_norm:
            forward, backward = forward + 2 * (C + KD), backward + 3 * (C + KD)
        return Moved(L * forward, L * backward)

    def kept(self, C: int, KD: int, qk_norm: bool) -> int:
        """Elements of a token and layer kept for backward: q, k, v, and what QK-norm reads."""
        return C + 2 * KD + (C + KD if qk_norm else 0)

    def kept_statistics(self, H: int, K: int, qk_norm: bool) -> int:
        """float32 numbers of a token and layer kept for backward: those of QK-norm."""
        return H + K if qk_norm else 0

    def kept_by_pytorch(self, C: int, compiled: bool) -> float:
        """Elements of a token and layer that PyTorch's own ops keep in a block beyond those that the cards list.

        Fitted to one run each on an H200 with PyTorch 2.11, llama_1.36b at 16 x 2048 tokens (RoPE) and gpt2_124m at
        64 x 1024 (no RoPE): compiled 86.0 and 28.7 GB at their peak, not compiled 111.8 and 64.0.
        """
        return 0.0 if compiled else 2.0 * C


class LearnedAbsolute(PositionEncoding):
    """A table of T vectors, added to the token embedding."""

    def parameters(self, T: int, C: int) -> int:
        return T * C

    def elements(self, L: int, C: int, KD: int) -> int:
        return C

    def moved(self, L: int, C: int, KD: int, qk_norm: bool) -> Moved:
        forward, backward = super().moved(L, C, KD, qk_norm)
        return Moved(forward + 2 * C, backward + C)  # backward sums the gradient over the batch


class RoPE(PositionEncoding):
    """One op for split, QK-norm and rotation; with QK-norm its backward reads queries and keys again."""

    def elements(self, L: int, C: int, KD: int) -> int:
        return L * (C + KD)

    def moved(self, L: int, C: int, KD: int, qk_norm: bool) -> Moved:
        packed = C + 2 * KD
        return Moved(L * 2 * packed, L * (2 * packed + (C + KD if qk_norm else 0)))

    def kept(self, C: int, KD: int, qk_norm: bool) -> int:
        packed = C + 2 * KD
        return packed + (packed if qk_norm else 0)  # QK-norm reads the packed tensor, and the op writes v once more

    def kept_statistics(self, H: int, K: int, qk_norm: bool) -> int:
        return 0  # backward computes them again

    def kept_by_pytorch(self, C: int, compiled: bool) -> float:
        return float(C) if compiled else 6.5 * C


NO_POSITION = PositionEncoding(cost=Cost(0, "no position encoding"))
LEARNED_ABSOLUTE = LearnedAbsolute(cost=Cost(1, "plus, of an embedding"))
ROPE = RoPE(cost=Cost(3, "four products and two sums for two elements of a query or key"), op="rope")
