"""Cards of the blocks: where the norms are (`norm_position`)."""

from dataclasses import dataclass

from gptperf.cards.quantities import Moved

__all__ = ["POST_NORM", "PRE_NORM", "Block", "PostNorm"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Pre-norm: one attention and one FFN, each after a norm that also adds the residual."""

    norms: int = 2
    """Number of norms in a block."""
    passes_residual: bool = True
    """Whether a block passes branch and residual on as two tensors of C elements; otherwise it passes their sum."""
    windows: bool = False
    """Whether the block passes a window on to its attention: `forward` takes a mask."""
    documents: bool = False
    """Whether the block passes the documents on to its attention: `forward` takes a mask."""

    @property
    def inputs(self) -> int:
        """Number of input tensors of a block, each with C elements per token."""
        return 2 if self.passes_residual else 1

    def moved(self, L: int, C: int) -> Moved:
        """Returns the elements that all norms, the final one included, and sums of residual gradients move per token.

        2 L norms add a residual (4 C forward), and one norm does not (2 C). In backward a norm moves 3 C elements, or
        4 C if the sum that it wrote has a gradient too, as for all norms but the first and the last. Adding the two
        gradients that meet at the first block's input moves 3 C.
        """
        return Moved((4 * 2 * L + 2) * C, (4 * (2 * L - 1) + 3 * 2 + 3) * C)


class PostNorm(Block):
    """Post-norm: the norms follow the residual adds."""

    def moved(self, L: int, C: int) -> Moved:
        """Returns the same count for post-norm.

        It differs from pre-norm in backward: no norm's sum has a gradient, and two gradients meet at the input of every
        attention and FFN.
        """
        return Moved((4 * 2 * L + 2) * C, (3 * (2 * L + 1) + 3 * 2 * L) * C)


PRE_NORM = Block(windows=True, documents=True)
POST_NORM = PostNorm(passes_residual=False, windows=True, documents=True)
