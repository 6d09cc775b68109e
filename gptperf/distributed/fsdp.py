"""FSDP: a rank holds its shard of weights, gradients and optimizer states, and a unit's weights only while it uses
them.

Units are those of `gptperf.distributed.zero1`: 0 before the blocks, i + 1 is block i, the last one after the blocks.
The weights of a unit lie in one bucket (those of small blocks share one). In the course of one micro-batch:

    forward   `enter(i)`   waits for the weights of i, drops those of i - 1, starts the gather of i + 1
              `leave(i)`   hooks the outputs of block i
    backward  the hook     is called when the gradient of block i's output exists, that is, before the backward of i: it
                           waits for the weights of i and starts the gather of i - 1
              `_arrive`    when the last gradient of i exists, starts the reduce-scatter of i and drops its weights

So two units are whole at a time: one that computes and one that is gathered meanwhile.

Streams. Everything here runs on the current stream, the one on which the model computes; collectives run on streams of
their own. A collective waits for all that the current stream has enqueued before it, and the current stream waits for
it in `Pending.wait`. So it is safe to

- start a gather into memory that earlier kernels still read: the gather comes after them;
- free the memory of a bucket whose kernels are enqueued but not done: the allocator gives it to later work of the same
  stream, or to a gather that waits for that stream. A gather in progress must be waited for first (`_drop` does), since
  it would write into memory that the current stream already uses for something else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.buckets import Bucket, BucketGroup, Layout, join_units
from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.zero1 import Sharded

__all__ = ["FullySharded"]


class FullySharded(Sharded):
    """FSDP: a rank has its shard of everything, and a unit's weights while they are read.

    The weights of a unit are gathered while the unit before it computes, in forward and again in backward, and dropped
    after it; with `gather_once` they are gathered in the first forward of an iteration and dropped in its last
    backward. Vectors (norm weights, biases) are a thousandth of a model and stay whole on every rank, as under ZeRO-1.

    Args:
        model, compute_dtype, collectives: see `Sharded`.
        min_num_params: blocks with fewer parameters share a bucket with the next ones.
        reduce_once: keep whole gradients between micro-batches and reduce them in the last one: 4 bytes per parameter
            for less communication.
        gather_once: keep gathered weights between micro-batches: those of the whole model, in the compute dtype, for
            less communication.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        collectives: Collectives,
        *,
        min_num_params: int = 0,
        reduce_once: bool = False,
        gather_once: bool = False,
    ):
        self.min_num_params, self.reduce_once, self.gather_once = min_num_params, reduce_once, gather_once
        self._arriving: list[Pending] = []  # reduce-scatters in progress, oldest first
        self._with_gradient: set[Bucket] = set()  # whose shard has a gradient of this step already
        super().__init__(model, compute_dtype, collectives)
        for bucket in self.buckets:
            self._drop(bucket)

    def _split(self, matrices: dict[str, nn.Parameter], bucket_numel: int) -> Iterator[list[str]]:
        units: dict[str, list[str]] = {}
        for name in reversed(matrices):  # backward reaches the last one first
            head, _, rest = name.partition(".")
            units.setdefault(f"{head}.{rest.partition('.')[0]}" if head == "blocks" else head, []).append(name)
        blocks = [names for unit, names in units.items() if unit.startswith("blocks.")]
        others = {unit: names for unit, names in units.items() if not unit.startswith("blocks.")}
        yield from (names for unit, names in others.items() if unit in ("norm", "lm_head"))
        yield from join_units(blocks, matrices, self.min_num_params)
        yield from (names for unit, names in others.items() if unit not in ("norm", "lm_head"))

    def _shards(self, group: BucketGroup) -> bool:
        """Whether buckets of a group are dropped between uses; the others are whole on every rank all the time."""
        return group.fsdp_shards and self.world_size > 1

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        sharded = [layout for layout in layouts if self._shards(layout.group)]
        numel = self._shared_numel([layout for layout in layouts if not self._shards(layout.group)])
        for layout in sharded:
            numel[self.compute_dtype] += layout.numel // self.world_size
            if self.reduce_once:
                numel[torch.float32] += layout.numel
        borrowed = 0 if self.reduce_once else max((layout.numel for layout in sharded), default=0)
        self.collectives.reserve(numel, borrowed, self.wire_dtype)

    def _make_bucket(self, names: list[str], group: BucketGroup, whole: Tensor) -> Bucket:
        if not self._shards(group):
            return super()._make_bucket(names, group, whole)
        dist.broadcast(whole, 0)  # all ranks begin with the same bits
        own = self._own(whole)
        share = self.collectives.zeros(own.numel(), self.compute_dtype).copy_(own)  # what the other ranks gather
        copied = self._copied(group)
        master = nn.Parameter(own.clone() if copied else share, requires_grad=False)
        grad = self.collectives.zeros(whole.numel(), torch.float32) if self.reduce_once else torch.zeros_like(own)
        # Not in memory that other ranks read: it is where a gather puts what it has read from them.
        compute = whole.to(self.compute_dtype) if copied else whole
        return Bucket(names, group, master, grad, compute, share if copied else None)

    # Weights: gathered before a unit, dropped after it.

    def _drop(self, bucket: Bucket) -> None:
        """Frees the memory of a bucket's weights. Kernels that read them may still be enqueued, see above."""
        if self._shards(bucket.group):
            self._wait(bucket)  # a gather in progress would write into memory that is used for something else
            # The storage is emptied, not replaced: parameters, and what autograd has saved of them in forward, are
            # views of it. They keep their pointer to the storage and read the weights again once it is refilled.
            bucket.compute.untyped_storage().resize_(0)

    def _gather(self, bucket: Bucket) -> None:
        if self._shards(bucket.group):
            storage = bucket.compute.untyped_storage()
            if storage.size() > 0:
                return  # the weights are here, or on their way
            storage.resize_(bucket.compute.numel() * bucket.compute.element_size())
        super()._gather(bucket)

    def _prefetch(self, unit: int) -> None:
        """Starts the gathers of a unit; out of range, does nothing.

        Buckets that stay whole are gathered by `finish_step` alone, once per step.
        """
        for bucket in self._needs[unit] if 0 <= unit <= self.last_unit else ():
            if self._shards(bucket.group):
                self._gather(bucket)

    def _need(self, unit: int) -> None:
        """Makes the weights of a unit available to the current stream, gathering them now if nothing did before."""
        self._prefetch(unit)
        for bucket in self._needs[unit]:
            self._wait(bucket)

    def finish_step(self) -> None:
        self.collectives.written()
        for bucket in self.buckets:
            if self._shards(bucket.group):
                self._drop(bucket)  # an evaluation or the last backward may have left the weights before the update
            else:
                super()._gather(bucket)
        self._prefetch(0)
        self._prefetch(1)

    def enter(self, unit: int) -> None:
        self._need(unit)
        training = torch.is_grad_enabled()
        if not (training and self.gather_once):
            kept = [unit, unit + 1]
            if training and unit == self.last_unit:
                kept.append(unit - 1)  # the last block: backward comes to it next
            self._keep_only(kept)
        self._prefetch(unit + 1)

    def _keep_only(self, units: list[int]) -> None:
        """Drops all buckets that none of these units reads. A tied embedding is in the first unit and in the last."""
        kept = [bucket for unit in units if unit <= self.last_unit for bucket in self._needs[unit]]
        for bucket in self.buckets:
            if bucket not in kept:
                self._drop(bucket)

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        """Hooks the outputs of a block: their gradients exist just before the backward of the block begins.

        In evaluation the outputs require no gradient, and there is no backward.
        """
        for x in outputs:
            if x is not None and x.requires_grad:
                x.register_hook(partial(self._before_backward, unit))

    def _before_backward(self, unit: int, _: Tensor) -> None:
        self._need(unit)
        # The backward of unit 0 is that of the embeddings, which reads no weights; its weights are for the forward of
        # the next micro-batch. After the last micro-batch they change before the next forward.
        if unit > 1 or not self._last_micro_batch:
            self._prefetch(unit - 1)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        for bucket in self.buckets:
            if self._shards(bucket.group):
                self._gather(bucket)
        with super().gathered():
            yield
        for bucket in self.buckets:
            self._drop(bucket)

    # Gradients: reduced as soon as a unit has them, unless they wait for the last micro-batch.

    @property
    def _reduces_now(self) -> bool:
        return self._last_micro_batch or not self.reduce_once

    def _travels(self, bucket: Bucket) -> bool:
        return self._shards(bucket.group) and not self.reduce_once

    def start_step(self) -> None:
        super().start_step()
        self._with_gradient.clear()

    @torch.no_grad()
    def start_micro_batch(self, last: bool) -> None:
        # Buckets that the last micro-batch did not fill on this rank, since it did not use all of their parameters.
        # Other ranks may have filled and reduced them, so this rank reduces what it has, to complete the same
        # collectives. And nothing has dropped their weights.
        for bucket in self.buckets[self._reduced :]:
            if self._travels(bucket):
                self._reduce(bucket)
            if not self._waits_for_next(bucket):
                self._drop(bucket)
        super().start_micro_batch(last)

    def _arrive(self, name: str, parameter: Tensor) -> None:
        super()._arrive(name, parameter)
        bucket = self.places[name].bucket
        # With the gradients of all its parameters, the last kernel that reads the weights in this backward is enqueued:
        # autograd computes the gradients of a layer's weight and input before it accumulates the former.
        if bucket.full and (self._last_micro_batch or not self._waits_for_next(bucket)):
            self._drop(bucket)

    def _waits_for_next(self, bucket: Bucket) -> bool:
        """Whether a bucket's weights stay until the next micro-batch: its forward begins with units 0 and 1."""
        return self.gather_once or bucket in (*self._needs[0], *self._needs[1])

    def _reduce(self, bucket: Bucket) -> None:
        if not self._travels(bucket):
            if self._last_micro_batch:
                super()._reduce(bucket)
            return
        whole = self._fill(bucket)
        add = bucket in self._with_gradient
        self._with_gradient.add(bucket)
        self._arriving.append(self.collectives.reduce_scatter(bucket.grad, whole, add=add))
        # Each one in progress holds a whole unit's gradients. Waiting here also frees the borrowed buffer of the
        # oldest.
        self._settle(self.collectives.in_flight)

    def _settle(self, most: int) -> None:
        """Waits until at most `most` reduce-scatters are in progress."""
        while len(self._arriving) > most:
            self._arriving.pop(0).wait()

    def _reduced_gradient(self, bucket: Bucket) -> Tensor:
        if not self._travels(bucket):
            return super()._reduced_gradient(bucket)
        self._settle(0)
        return bucket.grad
