"""Cards of the activations."""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost

__all__ = ["GELU", "GELU_TANH", "LEAKY_RELU", "RELU", "RELU_SQUARED", "SILU", "Activation"]


@dataclass(frozen=True)
class Activation:
    """An element-wise function of the standard FFN. It has no parameters; its memory is on the FFN's card."""

    cost: Cost
    op: str | None = None
    """The op of `gptperf.ops` that runs it under its name with the down projection, or None if PyTorch runs it."""


GELU = Activation(Cost(5, "over sqrt 2, erf, plus 1, times x, over 2"), "activation")
GELU_TANH = Activation(
    Cost(9, "square, times a, plus 1, times x, times b, tanh, plus 1, times x, over 2"), "activation"
)
SILU = Activation(Cost(4, "minus, exp, plus 1, x over that"), "activation")
RELU = Activation(Cost(1, "compare"), "activation")
LEAKY_RELU = Activation(Cost(2, "compare, times slope"), "activation")
RELU_SQUARED = Activation(Cost(2, "compare, square"), "activation")
