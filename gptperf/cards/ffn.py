"""Cards of the feed-forward networks."""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost, Implementation, Matmul, Moved

__all__ = ["STANDARD", "SWIGLU", "FFN", "SwiGLU"]


@dataclass(frozen=True, kw_only=True)
class FFN:
    """The standard FFN: up projection, activation, down projection."""

    activation: str | None = None
    """Name of the FFN's own activation, or None if the FFN applies the configured one."""
    cost: Cost | None = None
    """Element-wise cost of the FFN's own activation, or None if it applies the configured one, which has a card."""
    op: str | None = None
    """The op of `gptperf.ops` that runs everything after the first matmul, or None if there is no such op. An FFN that
    applies the configured activation has it only if the card of that activation names the same op."""
    recomputes: bool = True
    """Whether backward of the op computes its activation again instead of keeping it."""

    def default_width(self, C: int, multiple: int) -> int:
        """Returns the default F, which applies if the configuration has none; `multiple` is `d_ff_multiple`."""
        return 4 * C

    def matmuls(self, C: int, F: int) -> tuple[Matmul, ...]:
        """Returns the linear layers in the order in which they run; the last one computes the output."""
        return Matmul("ffn_up", F, C), Matmul("ffn_out", C, F)

    def parameters(self, C: int, F: int, bias: bool) -> int:
        """Returns the number of parameters of one FFN."""
        matmuls = self.matmuls(C, F)
        return sum(matmul.weight for matmul in matmuls) + (sum(matmul.out for matmul in matmuls) if bias else 0)

    def elements(self, F: int) -> int:
        """Returns the number of elements per token and layer to which the activation's cost applies."""
        return F

    def moved(self, F: int) -> Moved:
        """Returns the elements that everything between the matmuls moves per token and layer."""
        again = F if self.op and self.recomputes else 0  # backward writes the output again, for the down projection
        return Moved(2 * F, 3 * F + again)

    def kept(self, F: int, implementation: Implementation) -> int:
        """Returns the elements kept for backward per token and layer, besides the FFN's input."""
        op = implementation == "triton" and self.op is not None and self.recomputes
        return F if op or implementation == "compiled" else 2 * F  # Inductor and the op compute the activation again

    def backward_peak(self, F: int) -> int:
        """Returns the most elements per token that exist at once between the matmuls of backward.

        Elements kept from the forward pass are not included. With the op, these are the gradients of the activation's
        output and input, and the output if it is recomputed. Without it, the gradient of the output exists, and then
        the gradient of the input, when the output itself is freed.
        """
        return 2 * F + (F if self.recomputes else 0) if self.op else F


class SwiGLU(FFN):
    """SwiGLU: silu(gate) * up, then down. Gate and up are one matmul."""

    def default_width(self, C: int, multiple: int) -> int:
        """Returns 8/3 C rounded up, which gives about as many parameters as the standard FFN has.

        Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
        """
        return -(-8 * C // (3 * multiple)) * multiple

    def matmuls(self, C: int, F: int) -> tuple[Matmul, ...]:
        return Matmul("ffn_gate_up", 2 * F, C, (F, F)), Matmul("ffn_out", C, F)

    def moved(self, F: int) -> Moved:
        # Backward can write the product again, for the gradient of the down projection.
        return Moved(3 * F, 5 * F + (F if self.recomputes else 0))

    def kept(self, F: int, implementation: Implementation) -> int:
        product = 0 if implementation == "triton" and self.recomputes else F  # the op can compute it again
        return 2 * F + product

    def backward_peak(self, F: int) -> int:
        """Returns the elements of the gradients of product, gate and up, and of the product if it is recomputed."""
        return 3 * F + (F if self.recomputes else 0)


STANDARD = FFN(op="activation")
SWIGLU = SwiGLU(activation="silu", cost=Cost(5, "silu of gate, times up"), op="swiglu")
