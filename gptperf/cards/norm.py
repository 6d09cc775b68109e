"""Cards of the norms."""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost

__all__ = ["LAYERNORM", "LAYERNORM_NOBIAS", "RMSNORM", "Norm"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm over the C elements of a token. Its memory traffic depends on the residual adds: see the block's card."""

    cost: Cost
    statistics: int
    """Number of float32 statistics per row that are kept for backward, such as mean and 1 / std."""
    bias: bool = False
    """Whether the norm has a bias besides the weight."""
    op: str | None = None
    """The op of `gptperf.ops` that runs the norm, or None if there is no such op."""

    def parameters(self, C: int) -> int:
        """Returns the number of parameters of one norm."""
        return (2 if self.bias else 1) * C


LAYERNORM = Norm(
    cost=Cost(7, "sum, minus mean, square, sum, times 1 / std, times weight, plus bias"),
    statistics=2,
    bias=True,
    op="layer_norm",
)
LAYERNORM_NOBIAS = Norm(cost=Cost(6, "as layernorm, without the bias"), statistics=2, op="layer_norm")
RMSNORM = Norm(
    cost=Cost(4, "square, sum, times 1 / rms, times weight; QK-norm too"),
    statistics=1,
    op="rms_norm",
)
