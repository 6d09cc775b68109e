"""Cards of the optimizers."""

from dataclasses import dataclass

from gptperf.cards.quantities import FP32_BYTES

__all__ = ["OPTIMIZERS", "Muon", "Optimizer"]

_MUON_STEPS, _LONG = 5, 1.5


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, which updates float32 master weights in one pass."""

    states: int = 2
    """Number of state tensors, each with the size of the weights."""
    element_bytes: int = FP32_BYTES
    """Bytes of an element of AdamW's states; Muon's states are float32."""

    def state_bytes(self, parameters: int, hidden: int = 0, rows: int = 0) -> int:
        """Returns the bytes of the states.

        Args:
            parameters: number of all parameters.
            hidden: how many of them belong to the matrices of the blocks.
            rows: rows of these matrices.
        """
        return self.element_bytes * self.states * parameters

    def update_bytes(self, parameters: int, hidden: int, copy_bytes: int, gradient_bytes: int = FP32_BYTES) -> int:
        """Returns the bytes that one update moves.

        The update reads gradient, weight and states, and writes weight, states and the copy of the weight in the
        compute dtype.

        Args:
            parameters: number of all parameters.
            hidden: how many of them belong to the matrices of the blocks.
            copy_bytes: bytes of an element of that copy, or 0 if the model reads the master weights.
            gradient_bytes: bytes of an element of a gradient.
        """
        return parameters * (gradient_bytes + 2 * FP32_BYTES + 2 * self.element_bytes * self.states + copy_bytes)

    def flops(self, rows: int, columns: int, halved: bool) -> int:
        """Returns the FLOPs of the matrix products that update one matrix of a block; none here."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for the hidden matrices, which has one state; AdamW for the rest."""

    row_states: int = 0
    """Number of float32 numbers for each row of a hidden matrix."""

    def state_bytes(self, parameters: int, hidden: int = 0, rows: int = 0) -> int:
        return super().state_bytes(parameters - hidden) + FP32_BYTES * (hidden + self.row_states * rows)

    def update_bytes(self, parameters: int, hidden: int, copy_bytes: int, gradient_bytes: int = FP32_BYTES) -> int:
        """Returns the bytes that are moved outside the matrix products.

        Momentum reads gradient and state, and writes the state. The update reads and writes the weight. Between the two
        the momentum is written, gathered in batches, scattered back and read, in the dtype of the copy; NorMuon gathers
        and scatters once more. Then the copy is written.
        """
        scratch = copy_bytes or FP32_BYTES
        passes = 6 + (4 if self.row_states else 0)
        own = hidden * (gradient_bytes + 4 * FP32_BYTES + passes * scratch + copy_bytes)
        return super().update_bytes(parameters - hidden, 0, copy_bytes, gradient_bytes) + own

    def flops(self, rows: int, columns: int, halved: bool) -> int:
        """Returns the FLOPs of the matrix products that update one matrix of a block.

        With M the smaller and N the larger side, each of five steps computes A = X X^T, B = b A + c A^2 and B X. Steps
        of a long matrix are joined: 2 and 3 steps compute A and multiply X once, with 5 and 9 symmetric products of
        M x M matrices.

        Args:
            rows, columns: shape of the matrix; those in packed weights count one by one.
            halved: whether only half of a symmetric product is computed, as the Triton op does.
        """
        M, N = sorted((rows, columns))
        symmetric = M * (M + 1) if halved else 2 * M * M
        if N >= _LONG * M:
            return symmetric * (2 * N + 14 * M) + 2 * 2 * M * M * N
        return _MUON_STEPS * (symmetric * (N + M) + 2 * M * M * N)


OPTIMIZERS: dict[str, Optimizer] = {"adamw": Optimizer(), "muon": Muon(), "normuon": Muon(row_states=1)}
"""Optimizer name -> card."""
