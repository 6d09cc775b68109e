"""Cards of the blocks: where the norms are (`norm_position`)."""

from dataclasses import dataclass

from gptperf.cards.quantities import Moved

__all__ = ["POST_NORM", "PRE_NORM", "Block", "PostNorm"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Pre-norm: one attention and one FFN, each behind a norm that also adds the residual."""

    norms: int = 2
    """Norms in a block."""
    passes_residual: bool = True
    """Whether blocks pass on branch and residual as two tensors of C elements, or one sum."""

    @property
    def inputs(self) -> int:
        """Tensors of C elements that come into a block."""
        return 2 if self.passes_residual else 1

    def moved(self, L: int, C: int) -> Moved:
        """Elements moved for one token by all norms, the last one included, and by sums of residual gradients.

        2 L norms add a residual (4 C forward), one does not (2 C). In backward a norm moves 3 C elements, and 4 C where
        the sum that it wrote has a gradient too: all norms but the first and the last. The sum of the two gradients
        that meet at the first block's input moves 3 C.
        """
        return Moved((4 * 2 * L + 2) * C, (4 * (2 * L - 1) + 3 * 2 + 3) * C)


class PostNorm(Block):
    """Post-norm: the norms follow the residual adds."""

    def moved(self, L: int, C: int) -> Moved:
        """As in pre-norm, but no norm's sum has a gradient, and two gradients meet at every attention and FFN."""
        return Moved((4 * 2 * L + 2) * C, (3 * (2 * L + 1) + 3 * 2 * L) * C)


PRE_NORM = Block()
POST_NORM = PostNorm(passes_residual=False)
