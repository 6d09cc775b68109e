"""ZeRO-1: a process holds its share of the master weights and of the optimizer states.

A process has the elements [rank, rank + 1) * numel / world_size of every bucket: their master weights, reduced
gradients and moments. Its update is gathered from all processes before the model reads it, unit by unit: the
embedding, each block, and what comes after them. So a model that is sharded is compiled block by block or not at all,
and announces its units (`Units`); ZeRO-1 also serves one that does not.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.buckets import BUCKET_NUMEL, Bucket, Layout
from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.replicated import Replicated

__all__ = ["Sharded"]


class Sharded(Replicated):
    """ZeRO-1: every process has all weights and gradients, and updates its share.

    Gradients are reduce-scattered while backward goes on; the updated weights are gathered while the next forward does.

    Args:
        model: as for `Replicated`, with `units` and `blocks`.
        single: as for `Replicated`.
        announces: whether its forward runs `Units`; if not, the weights are gathered before it.
    """

    is_sharded = True

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        collectives: Collectives,
        *,
        bucket_numel: int = BUCKET_NUMEL,
        single: bool = False,
        announces: bool = True,
    ):
        self.last_unit = len(getattr(model, "blocks", ())) + 1
        super().__init__(model, compute_dtype, collectives, bucket_numel=bucket_numel, single=single)
        self._gathers: dict[Bucket, Pending] = {}
        self.model, self.announces = model, announces
        self._needs: list[list[Bucket]] = [[] for _ in range(self.last_unit + 1)]
        for name, place in self.places.items():
            for unit in self._units_of(name):
                if place.bucket not in self._needs[unit]:
                    self._needs[unit].append(place.bucket)
        if announces:
            model.units = self  # type: ignore[assignment]

    def _units_of(self, name: str) -> list[int]:
        """Units that read a parameter: 0 is before the blocks, unit i + 1 is block i, the last one is after them."""
        head, _, rest = name.partition(".")
        if head == "blocks":
            return [int(rest.partition(".")[0]) + 1]
        if head in ("norm", "lm_head"):
            return [self.last_unit]
        tied = head == "wte" and "lm_head.weight" not in self.places
        return [0, self.last_unit] if tied else [0]

    def _own(self, flat: Tensor) -> Tensor:
        """This process's share of a whole buffer."""
        return self.collectives.own(flat)

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        self.collectives.reserve(self._shared_numel(layouts), self._borrowed(layouts), self.wire_dtype)

    def _shared_numel(self, layouts: Sequence[Layout]) -> Counter[torch.dtype]:
        """Elements that the others read, by dtype: gradients and what the model computes with."""
        numel: Counter[torch.dtype] = Counter()
        for layout in layouts:
            numel[torch.float32] += layout.numel
            numel[self.compute_dtype if self._copied(layout.decayed) else torch.float32] += layout.numel
        return numel

    def _held(self, bucket: Bucket) -> tuple[int, int]:
        return self._share_of(bucket)

    def _make_bucket(self, names: list[str], decayed: bool, whole: Tensor) -> Bucket:
        if self.world_size > 1:
            dist.broadcast(whole, 0)  # replicas begin with the same bits
        copied = self._copied(decayed)
        grad = self.collectives.zeros(whole.numel(), torch.float32)
        compute = self.collectives.zeros(whole.numel(), self.compute_dtype if copied else torch.float32).copy_(whole)
        own = self._own(compute)
        master = nn.Parameter(self._own(whole).clone() if copied else own, requires_grad=False)
        return Bucket(names, decayed, master, grad, compute, own if copied else None)

    def _reduce(self, bucket: Bucket) -> None:
        if self.world_size > 1:
            source = self._fill(bucket) if self._travels(bucket) else bucket.grad
            bucket.reduction = self.collectives.reduce_scatter(self._own(bucket.grad), source)

    def _reduced_gradient(self, bucket: Bucket) -> Tensor:
        return self._own(super()._reduced_gradient(bucket))

    def summed(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    @torch.no_grad()
    def publish(self) -> None:
        if self.world_size > 1:
            self.collectives.finish()  # nobody reads the old ones any more
        super().publish()

    def finish_step(self) -> None:
        self.collectives.written()
        for bucket in reversed(self.buckets):  # in the order of forward
            self._gather(bucket)
        if not self.announces:
            self._wait_for_all()

    def share(self) -> None:
        self.publish()

    def _gather(self, bucket: Bucket) -> None:
        """Begin to collect a bucket's weights from all processes."""
        if self.world_size > 1:
            source = bucket.master.data if bucket.copy is None else bucket.copy
            self._gathers[bucket] = self.collectives.all_gather(bucket.compute, source)

    def _wait(self, bucket: Bucket) -> None:
        work = self._gathers.pop(bucket, None)
        if work is not None:
            work.wait()

    def _wait_for_all(self) -> None:
        for bucket in self.buckets:
            self._wait(bucket)

    def enter(self, unit: int) -> None:
        """The model is about to read the weights of a unit."""
        for bucket in self._needs[unit]:
            self._wait(bucket)

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        """The model has computed a block."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._wait_for_all()
        model: Any = self.model
        units, model.units = getattr(model, "units", None), None
        try:
            yield
        finally:
            model.units = units
