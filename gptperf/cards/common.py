"""Element-wise costs that do not depend on the components of a model."""

from gptperf.cards.quantities import Cost

__all__ = ["COMMON_COSTS"]

COMMON_COSTS: dict[str, Cost] = {
    "residual": Cost(1, "plus"),
    "bias": Cost(1, "plus, of a linear output"),
    "softmax": Cost(6, "of a causal pair: times 1 / sqrt(D), maximum, minus, exp, sum, over sum"),
    "loss": Cost(4, "of a logit: maximum, minus, exp, sum"),
    "softcap": Cost(3, "of a logit: over cap, tanh, times cap"),
    "dropout": Cost(2, "times mask, times scale"),
}
"""Part -> cost. Operations that run once per row are not counted."""
