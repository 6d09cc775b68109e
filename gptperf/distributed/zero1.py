"""ZeRO-1: each rank holds a shard of the master weights and of the optimizer states.

Rank r of n holds the elements [r, r + 1) * numel / n of every bucket: their master weights, reduced gradients and
optimizer states. It updates its shard; before the model reads the weights, the updated shards of all ranks are
gathered.

The gathers overlap with the next forward. To allow this, the model is divided into units: 0 is everything before the
blocks, i + 1 is block i, and the last one is everything after the blocks. The model announces each unit before it reads
its weights (`gptperf.model.gpt.Units`), and the current stream then waits only for the buckets of that unit. A model
that is compiled as one graph cannot announce units, so the stream waits for all gathers before forward.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.buckets import BUCKET_NUMEL, Bucket, BucketGroup, Layout
from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.replicated import Replicated

__all__ = ["Sharded"]


class Sharded(Replicated):
    """ZeRO-1: every rank has all weights and gradients, and updates its shard.

    Gradients are reduce-scattered during backward, and the updated weights are gathered during the next forward.

    Args:
        model, compute_dtype, collectives, bucket_numel, single, packed: see `Replicated`; the model has `units` and
            `blocks`.
        announces: whether the model's forward calls `enter` and `leave`. If not, `finish_step` waits for all gathers.
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
        packed: Mapping[str, tuple[int, ...]] | None = None,
        announces: bool = True,
    ):
        self.last_unit = len(getattr(model, "blocks", ())) + 1
        super().__init__(model, compute_dtype, collectives, bucket_numel=bucket_numel, single=single, packed=packed)
        self._gathers: dict[Bucket, Pending] = {}  # gathers that the current stream has not waited for
        self.model, self.announces = model, announces
        self._needs: list[list[Bucket]] = [[] for _ in range(self.last_unit + 1)]  # buckets by unit
        for name, place in self.places.items():
            for unit in self._units_of(name):
                if place.bucket not in self._needs[unit]:
                    self._needs[unit].append(place.bucket)
        if announces:
            model.units = self  # type: ignore[assignment]

    def _units_of(self, name: str) -> list[int]:
        """Returns the units that read a parameter."""
        head, _, rest = name.partition(".")
        if head == "blocks":
            return [int(rest.partition(".")[0]) + 1]
        if head in ("norm", "lm_head"):
            return [self.last_unit]
        tied = head == "wte" and "lm_head.weight" not in self.places
        return [0, self.last_unit] if tied else [0]

    def _own(self, flat: Tensor) -> Tensor:
        """Returns the shard of this rank of a whole buffer, as a view."""
        return self.collectives.own(flat)

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        self.collectives.reserve(self._shared_numel(layouts), self._borrowed(layouts), self.wire_dtype)

    def _shared_numel(self, layouts: Sequence[Layout]) -> Counter[torch.dtype]:
        """Returns the number of elements of gradients and compute weights, which other ranks read, by dtype."""
        numel: Counter[torch.dtype] = Counter()
        for layout in layouts:
            numel[torch.float32] += layout.numel
            numel[self.compute_dtype if self._copied(layout.group) else torch.float32] += layout.numel
        return numel

    def _held(self, bucket: Bucket) -> tuple[int, int]:
        return self._share_of(bucket)

    def _make_bucket(self, names: list[str], group: BucketGroup, whole: Tensor) -> Bucket:
        if self.world_size > 1:
            # All ranks must begin with the same bits. `share` cannot do this later, when each rank has only its shard.
            dist.broadcast(whole, 0)
        copied = self._copied(group)
        grad = self.collectives.zeros(whole.numel(), torch.float32)
        compute = self.collectives.zeros(whole.numel(), self.compute_dtype if copied else torch.float32).copy_(whole)
        own = self._own(compute)
        # Without a copy, the master weights are a view of the weights that the model reads, so nothing is stored twice.
        master = nn.Parameter(self._own(whole).clone() if copied else own, requires_grad=False)
        return Bucket(names, group, master, grad, compute, own if copied else None)

    def _reduce(self, bucket: Bucket) -> None:
        if self.world_size > 1:
            source = self._fill(bucket) if self._travels(bucket) else bucket.grad
            bucket.reduction = self.collectives.reduce_scatter(self._own(bucket.grad), source)

    def gather_updates(self, flats: Sequence[Tensor]) -> None:
        """Does nothing: this rank needs the updates of its share alone, and has computed them."""

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
            self.collectives.finish()  # after it no rank reads the old shard of this rank, which is overwritten next
        super().publish()

    def finish_step(self) -> None:
        self.collectives.written()  # the gathers below wait until the optimizers of all ranks have written their shards
        # Buckets are in the order of backward. In reverse, the vectors come first, which nearly all units read, then
        # the matrices in the order of forward.
        for bucket in reversed(self.buckets):
            self._gather(bucket)
        if not self.announces:
            self._wait_for_all()

    def share(self) -> None:
        # Rank 0 has only its own shard and cannot broadcast the others. It need not: `_make_bucket` has broadcast the
        # initial weights, and every rank reads its shard of a checkpoint.
        self.publish()

    def _gather(self, bucket: Bucket) -> None:
        """Starts the all-gather of a bucket's weights."""
        if self.world_size > 1:
            source = bucket.master.data if bucket.copy is None else bucket.copy
            self._gathers[bucket] = self.collectives.all_gather(bucket.compute, source)

    def _wait(self, bucket: Bucket) -> None:
        """Makes the current stream wait for the all-gather of a bucket, if one is in progress."""
        work = self._gathers.pop(bucket, None)
        if work is not None:
            work.wait()

    def _wait_for_all(self) -> None:
        for bucket in self.buckets:
            self._wait(bucket)

    # The interface of `gptperf.model.gpt.Units`.

    def enter(self, unit: int) -> None:
        """Makes the weights of a unit available; the model calls it before it reads them."""
        for bucket in self._needs[unit]:
            self._wait(bucket)

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        """Does nothing: the weights stay. The model calls it after each block, with the block's outputs."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._wait_for_all()
        # A rank that runs the model alone must not start collectives, so the model must not announce units here.
        model: Any = self.model
        units, model.units = getattr(model, "units", None), None
        try:
            yield
        finally:
            model.units = units
