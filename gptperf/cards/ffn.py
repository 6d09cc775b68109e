"""Cards of the feed-forward networks."""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost, Implementation, Matmul, Moved

__all__ = ["STANDARD", "SWIGLU", "FFN", "SwiGLU"]


@dataclass(frozen=True, kw_only=True)
class FFN:
    """The standard FFN: up, activation, down."""

    activation: str | None = None
    """Name of the FFN's own activation; None where it applies the configured one."""
    cost: Cost | None = None
    """Element-wise cost of its own activation; None where it applies the configured one, which has a card."""
    op: str | None = None
    """The op of `gptperf.ops` that runs it."""

    def default_width(self, C: int, multiple: int) -> int:
        """F where the configuration names none; `multiple` is `d_ff_multiple`."""
        return 4 * C

    def matmuls(self, C: int, F: int) -> tuple[Matmul, ...]:
        """The linear layers in the order in which they run; the last one gives the output."""
        return Matmul("ffn_up", F, C), Matmul("ffn_out", C, F)

    def parameters(self, C: int, F: int, bias: bool) -> int:
        """Parameters of one FFN."""
        matmuls = self.matmuls(C, F)
        return sum(matmul.weight for matmul in matmuls) + (sum(matmul.out for matmul in matmuls) if bias else 0)

    def elements(self, F: int) -> int:
        """Elements of a token and layer that `cost`, or that of the configured activation, is counted of."""
        return F

    def moved(self, F: int) -> Moved:
        """Elements moved for one token and layer by everything between the matmuls."""
        return Moved(2 * F, 3 * F)

    def kept(self, F: int, implementation: Implementation) -> int:
        """Elements of a token and layer kept for backward, besides the FFN's input."""
        output = 0 if implementation == "compiled" else F  # Inductor computes the activation again
        return F + output

    def backward_peak(self, F: int) -> int:
        """Elements of a token that exist at once between the matmuls of backward, besides what was kept.

        The gradient of the activation's output, then that of its input, when the output itself is freed.
        """
        return F


class SwiGLU(FFN):
    """silu(gate) * up, down; gate and up are one matmul, and the Triton op keeps no product."""

    def default_width(self, C: int, multiple: int) -> int:
        """8/3 C rounded up: as many parameters as the standard FFN (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
        return -(-8 * C // (3 * multiple)) * multiple

    def matmuls(self, C: int, F: int) -> tuple[Matmul, ...]:
        return Matmul("ffn_gate_up", 2 * F, C), Matmul("ffn_out", C, F)

    def moved(self, F: int) -> Moved:
        return Moved(3 * F, 6 * F)  # backward writes the product again, for the gradient of the last weight

    def kept(self, F: int, implementation: Implementation) -> int:
        product = 0 if implementation == "triton" else F  # the op computes it again
        return 2 * F + product

    def backward_peak(self, F: int) -> int:
        """The gradients of product, gate and up, and the product again."""
        return 4 * F


STANDARD = FFN()
SWIGLU = SwiGLU(activation="silu", cost=Cost(5, "silu of gate, times up"), op="swiglu")
