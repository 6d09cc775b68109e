"""The optimizer protocol: everything that training step, checkpoint and plan know about an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptperf.distributed.buckets import Bucket

__all__ = ["Optimizer", "clip_scale"]


class Optimizer(ABC):
    """Updates the master weights of flat buckets from their gradients, and the copies that the model reads.

    Every number that varies from step to step is a float32 scalar on the device, in the same memory for the whole run.
    `step` reads them there and decides nothing on the host, so that a CUDA graph can replay it.

    `grad_scale` and `found_inf` have the names that `torch.amp.GradScaler` expects. It assigns both before it calls
    `step`, and deletes them afterwards. An assignment writes the value into the static scalar, and a deletion writes
    the neutral value.

    Args:
        buckets: all buckets of the weights. The group of a bucket says how it is updated.
        learning_rate: initial value of the scalar.
    """

    _step_supports_amp_scaling = True  # GradScaler then always calls `step`, which skips the update by itself

    learning_rate: Tensor
    """Learning rate of the next step; written with `fill_`."""
    steps: Tensor
    """Number of updates made, without the skipped ones; saved in checkpoints."""
    observe: Callable[[Bucket, Tensor], None] | None = None
    """If set, `step` calls it with each bucket and a copy of its master weights from before the update."""

    def __init__(self, buckets: Sequence[Bucket], learning_rate: float):
        self.buckets = list(buckets)
        self.steps = torch.zeros((), device=self.buckets[0].master.device)
        self.learning_rate = torch.full_like(self.steps, learning_rate)
        self._grad_scale, self._found_inf = torch.ones_like(self.steps), torch.zeros_like(self.steps)

    @abstractmethod
    def states(self, bucket: Bucket) -> dict[str, Tensor]:
        """Returns the optimizer states of a bucket by name, each float32, or AdamW's in `optimizer_state_dtype`.

        A state has the shape of `bucket.master`, or `(rows, 1)` with a number for each row of the matrices that this
        rank holds of the bucket.
        """

    @abstractmethod
    def step(self) -> None:
        """Updates all buckets from `bucket.master.grad`, divided by `grad_scale`, unless `found_inf` is not 0."""

    @abstractmethod
    def compile(self) -> None:
        """Compiles the update if it consists of several PyTorch ops; a run with `compile` calls this once."""

    @property
    def grad_scale(self) -> Tensor:
        """Divisor of the gradients."""
        return self._grad_scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor) -> None:
        self._grad_scale.copy_(value)

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self._grad_scale.fill_(1)

    @property
    def found_inf(self) -> Tensor:
        """Not 0 if the gradients are not finite; the update is then skipped."""
        return self._found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self._found_inf.copy_(value)

    @found_inf.deleter
    def found_inf(self) -> None:
        self._found_inf.zero_()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The master weights in the form in which `GradScaler.unscale_` looks for gradients."""
        return [{"params": [bucket.master for bucket in self.buckets]}]


def clip_scale(norm: Tensor, grad_clip: float) -> tuple[Tensor, Tensor]:
    """Returns `grad_scale` and `found_inf` of a step that clips gradients to a largest norm.

    Args:
        norm: global gradient norm, a float32 scalar on the device.
        grad_clip: largest norm; 0 turns clipping off.

    Returns:
        The divisor max(norm / grad_clip, 1), a float32 scalar, and whether the norm is not finite, a boolean scalar.
    """
    divisor = (norm / grad_clip).clamp(min=1.0) if grad_clip > 0 else torch.ones_like(norm)
    # x - x is 0 or, where x is not finite, NaN. PyTorch's isfinite takes four launches.
    return divisor, (norm - norm).ne(0)
