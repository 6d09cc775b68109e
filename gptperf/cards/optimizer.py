"""Cards of the optimizers."""

from dataclasses import dataclass

from gptperf.cards.quantities import FP32_BYTES

__all__ = ["OPTIMIZERS", "Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer that updates float32 master weights in one pass."""

    states: int
    """Number of state tensors, each with the size of the weights."""
    element_bytes: int = FP32_BYTES
    """Bytes of an element of a state."""

    def state_bytes(self, parameters: int) -> int:
        """Returns the bytes of the states of this number of parameters."""
        return self.element_bytes * self.states * parameters

    def update_bytes(self, copy_bytes: int) -> int:
        """Returns the bytes that one update moves per parameter.

        The update reads gradient, weight and states, and writes weight, states and the copy of the weight in the
        compute dtype.

        Args:
            copy_bytes: bytes of an element of that copy, or 0 if the model reads the master weights.
        """
        return FP32_BYTES * 3 + self.element_bytes * 2 * self.states + copy_bytes


OPTIMIZERS: dict[str, Optimizer] = {"adamw": Optimizer(states=2)}
"""Optimizer name -> card."""
