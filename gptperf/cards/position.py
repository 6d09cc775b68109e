"""Cards of the position encodings. They include the split of the packed projection into heads, and QK-norm.

The packed projection of a token has (H + 2 K) D elements: queries, keys and values. Queries and keys have (H + K) D.
"""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost, Moved

__all__ = ["LEARNED_ABSOLUTE", "NO_POSITION", "ROPE", "LearnedAbsolute", "PositionEncoding", "RoPE"]


@dataclass(frozen=True, kw_only=True)
class PositionEncoding:
    """No encoding: the split into heads is a view, and QK-norm is a separate op."""

    cost: Cost
    op: str | None = None
    """The op of `gptperf.ops` that splits, normalises and encodes at once, or None if there is no such op."""
    documents: bool = False
    """Whether positions can restart at the documents of a sequence: `embed` takes their first tokens."""

    def parameters(self, T: int, C: int) -> int:
        """Returns the number of parameters that the encoding has in the whole model."""
        return 0

    def elements(self, L: int, C: int, HD: int, KD: int) -> int:
        """Returns the number of elements per token that the encoding changes, over all layers."""
        return 0

    def moved(self, L: int, C: int, HD: int, KD: int, qk_norm: bool) -> Moved:
        """Returns the elements that encoding, split and QK-norm move per token, over all layers."""
        # Backward of the split writes the three gradients into one tensor.
        forward, backward = 0, 2 * (HD + 2 * KD)
        if qk_norm:
            forward, backward = forward + 2 * (HD + KD), backward + 3 * (HD + KD)
        return Moved(L * forward, L * backward)

    def saved_by_packing(self, HD: int, KD: int, qk_norm: bool) -> int:
        """Returns the elements per token and layer of `moved` that the op `packed_attention` does not move."""
        return 0

    def kept(self, HD: int, KD: int, qk_norm: bool) -> int:
        """Returns the elements kept for backward per token and layer: q, k, v, and the input of QK-norm."""
        return HD + 2 * KD + (HD + KD if qk_norm else 0)

    def kept_statistics(self, H: int, K: int, qk_norm: bool) -> int:
        """Returns the float32 numbers kept for backward per token and layer: the statistics of QK-norm."""
        return H + K if qk_norm else 0

    def kept_by_pytorch(self, HD: int, compiled: bool) -> float:
        """Returns the elements per token and layer that PyTorch's own ops keep beyond those that the cards list.

        The numbers were fitted to one run each on an H200 with PyTorch 2.11, llama_1.36b at 16 x 2048 tokens (RoPE) and
        gpt2_124m at 64 x 1024 (no RoPE), with a peak of 86.0 and 28.7 GB compiled, and 111.8 and 64.0 GB not compiled.
        """
        return 0.0 if compiled else 2.0 * HD


class NoPosition(PositionEncoding):
    """The built-in split, which the op `packed_attention` knows."""

    def saved_by_packing(self, HD: int, KD: int, qk_norm: bool) -> int:
        return 0 if qk_norm else 2 * (HD + 2 * KD)


class LearnedAbsolute(NoPosition):
    """A table of T vectors that are added to the token embeddings."""

    def parameters(self, T: int, C: int) -> int:
        return T * C

    def elements(self, L: int, C: int, HD: int, KD: int) -> int:
        return C

    def moved(self, L: int, C: int, HD: int, KD: int, qk_norm: bool) -> Moved:
        forward, backward = super().moved(L, C, HD, KD, qk_norm)
        return Moved(forward + 2 * C, backward + C)  # backward sums the gradient over the batch


class RoPE(PositionEncoding):
    """RoPE: one op does split, QK-norm and rotation. With QK-norm its backward reads queries and keys again."""

    def elements(self, L: int, C: int, HD: int, KD: int) -> int:
        return L * (HD + KD)

    def moved(self, L: int, C: int, HD: int, KD: int, qk_norm: bool) -> Moved:
        packed = HD + 2 * KD
        return Moved(L * 2 * packed, L * (2 * packed + (HD + KD if qk_norm else 0)))

    def saved_by_packing(self, HD: int, KD: int, qk_norm: bool) -> int:
        return 4 * KD  # the values, forward and backward

    def kept(self, HD: int, KD: int, qk_norm: bool) -> int:
        packed = HD + 2 * KD
        return packed + (packed if qk_norm else 0)  # QK-norm reads the packed tensor, and the op writes v once more

    def kept_statistics(self, H: int, K: int, qk_norm: bool) -> int:
        return 0  # backward computes them again

    def kept_by_pytorch(self, HD: int, compiled: bool) -> float:
        return float(HD) if compiled else 6.5 * HD


NO_POSITION = NoPosition(cost=Cost(0, "no position encoding"), documents=True)
LEARNED_ABSOLUTE = LearnedAbsolute(cost=Cost(1, "plus, of an embedding"), documents=True)
ROPE = RoPE(cost=Cost(3, "four products and two sums for two elements of a query or key"), op="rope", documents=True)
