"""AdamW on flat float32 master weights. Source: Loshchilov and Hutter, 2019, algorithm 2."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptperf.config import OptimizerConfig
from gptperf.distributed.buckets import ALIGN, Bucket
from gptperf.kernels import reference
from gptperf.training.optimizers.base import Optimizer

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """AdamW in one pass over each bucket, which also clips and writes the copy that the model reads.

    Args:
        buckets: all buckets of the weights.
        config: hyperparameters.
        op: the update, with the signature of `gptperf.kernels.reference.adamw`.
    """

    def __init__(self, buckets: Sequence[Bucket], config: OptimizerConfig, op: Callable[..., None]):
        super().__init__(buckets, config.learning_rate)
        self.config, self._op = config, op
        self._states = {bucket: self._new_states(bucket) for bucket in self.buckets}

    def _new_states(self, bucket: Bucket) -> dict[str, Tensor]:
        return {key: torch.zeros_like(bucket.master.data) for key in ("exp_avg", "exp_avg_sq")}

    def states(self, bucket: Bucket) -> dict[str, Tensor]:
        return self._states[bucket]

    def compile(self) -> None:
        if self._op is reference.adamw:  # the Triton op is one kernel already
            self._op = torch.compile(self._op)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += self.found_inf == 0
        self._step_adamw(self.buckets)

    def _step_adamw(self, buckets: Sequence[Bucket]) -> None:
        config = self.config
        t = self.steps.clamp(min=1)  # if the very first step is skipped, the corrections below must not be 0
        corrections = 1 - config.beta1**t, 1 - config.beta2**t
        scalars = torch.stack([self.learning_rate, t, *corrections, self.grad_scale, self.found_inf])
        for bucket in buckets:
            states, master = self._states[bucket], bucket.master.data
            before = None if self.observe is None else master.clone()
            tensors = (master, bucket.master.grad, states["exp_avg"], states["exp_avg_sq"], bucket.copy)
            rows = (None if x is None else x.view(-1, ALIGN) for x in tensors)
            weight_decay = config.weight_decay if bucket.group.has_weight_decay else 0.0
            self._op(*rows, scalars, config.beta1, config.beta2, config.adam_eps, weight_decay)
            if self.observe is not None and before is not None:
                self.observe(bucket, before)
