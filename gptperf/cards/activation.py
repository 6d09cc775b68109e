"""Cards of the activations."""

from dataclasses import dataclass

from gptperf.cards.quantities import Cost

__all__ = ["GELU", "GELU_TANH", "LEAKY_RELU", "RELU", "RELU_SQUARED", "SILU", "Activation"]


@dataclass(frozen=True)
class Activation:
    """An element-wise function of the standard FFN. It has no parameters; its memory is on the FFN's card."""

    cost: Cost


GELU = Activation(Cost(5, "over sqrt 2, erf, plus 1, times x, over 2"))
GELU_TANH = Activation(Cost(9, "square, times a, plus 1, times x, times b, tanh, plus 1, times x, over 2"))
SILU = Activation(Cost(4, "minus, exp, plus 1, x over that"))
RELU = Activation(Cost(1, "compare"))
LEAKY_RELU = Activation(Cost(2, "compare, times slope"))
RELU_SQUARED = Activation(Cost(2, "compare, square"))
