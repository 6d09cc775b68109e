"""AdamW on flat float32 master weights. Source: Loshchilov and Hutter, 2019, algorithm 2."""

import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gptperf.config import OptimizerConfig
from gptperf.distributed.bucket_sizes import ALIGN
from gptperf.distributed.buckets import Bucket, Piece
from gptperf.kernels import reference
from gptperf.kernels.checks import SEED_NUMEL
from gptperf.training.optimizers.base import Optimizer

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """AdamW in one pass over each bucket, which also clips and writes the copy that the model reads.

    Args:
        buckets: all buckets of the weights.
        config: hyperparameters.
        op: the update, with the signature of `gptperf.kernels.reference.adamw`.
        pieces_of: `Replicated.pieces_of` of the weights; needed for moments in bfloat16.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        config: OptimizerConfig,
        op: Callable[..., None],
        pieces_of: Callable[[Bucket, Tensor], Iterable[Piece]] | None = None,
    ):
        super().__init__(buckets, config.learning_rate)
        self.config, self._op = config, op
        self._states = {bucket: self._new_states(bucket) for bucket in self.buckets}
        self._seeds: dict[Bucket, Tensor] = {}
        if self._dtype == torch.bfloat16:
            assert pieces_of is not None
            self._seeds = {
                bucket: _seeds(bucket, pieces_of) for bucket in self.buckets if "exp_avg" in self._states[bucket]
            }

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the moments."""
        dtype: torch.dtype = getattr(torch, self.config.optimizer_state_dtype)
        return dtype

    def _new_states(self, bucket: Bucket) -> dict[str, Tensor]:
        return {key: torch.zeros_like(bucket.master.data, dtype=self._dtype) for key in ("exp_avg", "exp_avg_sq")}

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
            seeds = [self._seeds[bucket]] if self._seeds else []
            self._op(*rows, scalars, config.beta1, config.beta2, config.adam_eps, weight_decay, *seeds)
            if self.observe is not None and before is not None:
                self.observe(bucket, before)


def _seeds(bucket: Bucket, pieces_of: Callable[[Bucket, Tensor], Iterable[Piece]]) -> Tensor:
    """Returns a seed for each `SEED_NUMEL` elements of a bucket that this rank holds, `(rows,)` int32.

    A seed depends on the name of the parameter and on the place in it. So an element gets the same random bits in every
    layout of the weights over buckets and ranks.
    """
    master = bucket.master
    seeds = torch.zeros(master.numel() // SEED_NUMEL, dtype=torch.int64, device=master.device)
    for piece in pieces_of(bucket, torch.empty(master.numel(), device="meta")):
        assert piece.start % SEED_NUMEL == 0
        rows = torch.arange(-(-piece.values.numel() // SEED_NUMEL), device=master.device) + piece.start // SEED_NUMEL
        first = piece.values.storage_offset() // SEED_NUMEL
        seeds[first : first + len(rows)] = zlib.crc32(piece.name.encode()) + rows * 0x9E3779B1
    return ((seeds + 2**31) % 2**32 - 2**31).to(torch.int32)
