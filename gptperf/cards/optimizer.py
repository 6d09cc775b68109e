"""Cards of the optimizers."""

from dataclasses import dataclass

from gptperf.cards.quantities import FP32_BYTES

__all__ = ["OPTIMIZERS", "Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer that updates float32 master weights in one pass."""

    states: int
    """float32 tensors of the size of the weights that it keeps."""

    def state_bytes(self, parameters: int) -> int:
        """Bytes of the states of so many parameters."""
        return FP32_BYTES * self.states * parameters

    def update_bytes(self, copy_bytes: int) -> int:
        """Bytes moved for one parameter by one update.

        Gradient, weight and states are read, weight and states are written, and the copy in the compute dtype with
        them.

        Args:
            copy_bytes: bytes of an element of that copy; 0 where the model reads the master weights.
        """
        read, written = 2 + self.states, 1 + self.states
        return FP32_BYTES * (read + written) + copy_bytes


OPTIMIZERS: dict[str, Optimizer] = {"adamw": Optimizer(states=2)}
"""Name -> card."""
