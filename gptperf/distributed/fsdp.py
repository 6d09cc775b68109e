"""FSDP: a rank holds its shard of weights, gradients and optimizer states, and a unit's weights only while it uses
them.

Units are those of `gptperf.distributed.zero1`: 0 is everything before the blocks, i + 1 is block i, and the last one is
everything after the blocks. The weights of a unit lie in one bucket; small blocks share a bucket. During one
micro-batch:

    forward   `enter(i)`   waits for the weights of i, drops those of i - 1, starts the gather of i + 1
              `leave(i)`   hooks the outputs of unit i
    backward  the hook     is called when the gradient of an output of i exists, which is before the backward of i
                           begins: it waits for the weights of i and starts the gather of i - 1
              `_arrive`    starts the reduce-scatter of i when the last gradient of i exists, and drops its weights

So two units are whole at a time: one that computes, and one that is being gathered. The last block and the head are not
dropped in forward, because backward begins with them. Units 0 and 1 are not dropped in backward before the last
micro-batch, because the next forward begins with them.

Streams. All code here runs on the current stream, on which the model computes; collectives run on streams of their own.
A collective waits for everything that the current stream has enqueued before it, and the current stream waits for the
collective in `Pending.wait`. So it is safe

- to start a gather into memory that earlier kernels still read, because the gather comes after them;
- to free the memory of a bucket whose kernels are enqueued but not done. The allocator gives it to later work of the
  same stream, or to a gather that waits for that stream. But the current stream must first wait for a gather in
  progress (`_drop` does this), which would otherwise write into memory that already has another use.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.bucket_sizes import join_units
from gptperf.distributed.buckets import Bucket, BucketGroup, Layout
from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.zero1 import Sharded

__all__ = ["FullySharded"]


class FullySharded(Sharded):
    """FSDP: a rank has its shard of everything, and the weights of a unit while they are read.

    The weights of a unit are gathered while the unit before it computes, in forward and again in backward, and dropped
    after the unit has used them. With `gather_once` they are gathered in the first forward of an iteration and dropped
    in its last backward. Vectors (norm weights, biases) are a thousandth of a model and stay whole on every rank, as
    under ZeRO-1.

    Args:
        model, compute_dtype, collectives, packed: see `Sharded`.
        min_num_params: a block with fewer parameters shares a bucket with the next blocks.
        reduce_once: keep whole gradients between micro-batches and reduce them in the last one. This costs 4 bytes per
            parameter and saves communication.
        gather_once: keep gathered weights between micro-batches. This costs the memory of all weights in the compute
            dtype and saves communication.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        collectives: Collectives,
        *,
        packed: Mapping[str, tuple[int, ...]] | None = None,
        min_num_params: int = 0,
        reduce_once: bool = False,
        gather_once: bool = False,
    ):
        self.min_num_params, self.reduce_once, self.gather_once = min_num_params, reduce_once, gather_once
        self._arriving: list[Pending] = []  # reduce-scatters in progress, oldest first
        self._with_gradient: set[Bucket] = set()  # buckets whose shard already has a gradient of this step
        super().__init__(model, compute_dtype, collectives, packed=packed)
        for bucket in self.buckets:
            self._drop(bucket)

    def _split(self, matrices: dict[str, nn.Parameter], bucket_numel: int) -> Iterator[list[str]]:
        units: dict[str, list[str]] = {}
        for name in reversed(matrices):  # backward reaches the last matrix first
            head, _, rest = name.partition(".")
            units.setdefault(f"{head}.{rest.partition('.')[0]}" if head == "blocks" else head, []).append(name)
        blocks = [names for unit, names in units.items() if unit.startswith("blocks.")]
        others = {unit: names for unit, names in units.items() if not unit.startswith("blocks.")}
        yield from (names for unit, names in others.items() if unit in ("norm", "lm_head"))
        sizes = {name: parameter.numel() for name, parameter in matrices.items()}
        yield from join_units(blocks, sizes, max(self.min_num_params, self._hidden_numel(matrices)))
        yield from (names for unit, names in others.items() if unit not in ("norm", "lm_head"))

    def _shards(self, group: BucketGroup) -> bool:
        """Returns whether buckets of a group are dropped between uses; the others stay whole on every rank."""
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
        share = self.collectives.zeros(own.numel(), self.compute_dtype).copy_(own)  # the other ranks gather this
        copied = self._copied(group)
        master = nn.Parameter(own.clone() if copied else share, requires_grad=False)
        grad = self.collectives.zeros(whole.numel(), torch.float32) if self.reduce_once else torch.zeros_like(own)
        # Other ranks do not read `compute`, so it needs no memory of the collectives: gathers write into it.
        compute = whole.to(self.compute_dtype) if copied else whole
        return Bucket(names, group, master, grad, compute, share if copied else None)

    # Weights: gathered before a unit, dropped after it.

    def _drop(self, bucket: Bucket) -> None:
        """Frees the memory of a bucket's weights. Kernels that read them may still be running, see "Streams" above."""
        if self._shards(bucket.group):
            self._wait(bucket)  # otherwise a gather in progress would write into memory that has another use
            # The storage is emptied, not replaced: the parameters, and the views of them that autograd has saved in
            # forward, keep pointing to it, and see the weights again once it is refilled.
            bucket.compute.untyped_storage().resize_(0)

    def _gather(self, bucket: Bucket) -> None:
        if self._shards(bucket.group):
            storage = bucket.compute.untyped_storage()
            if storage.size() > 0:
                return  # the weights are here, or a gather of them is in progress
            storage.resize_(bucket.compute.numel() * bucket.compute.element_size())
        super()._gather(bucket)

    def _prefetch(self, unit: int) -> None:
        """Starts the gathers of a unit; does nothing if there is no unit of this number.

        Only `finish_step` gathers the buckets that stay whole, once per step.
        """
        for bucket in self._needs[unit] if 0 <= unit <= self.last_unit else ():
            if self._shards(bucket.group):
                self._gather(bucket)

    def _need(self, unit: int) -> None:
        """Makes the current stream wait for the weights of a unit, and gathers them now if that has not begun."""
        self._prefetch(unit)
        for bucket in self._needs[unit]:
            self._wait(bucket)

    def finish_step(self) -> None:
        self.collectives.written()
        for bucket in self.buckets:
            if self._shards(bucket.group):
                self._drop(bucket)  # an evaluation or the last backward may have left weights from before the update
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
                kept.append(unit - 1)  # the last block, which backward reaches after the head
            # Units are dropped before the next gather begins, so that it can use their memory.
            self._keep_only(kept)
        self._prefetch(unit + 1)

    def _keep_only(self, units: list[int]) -> None:
        """Drops all buckets that none of these units reads. A tied embedding belongs to the first and the last unit."""
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
        # Unit 0 is gathered only for the forward of the next micro-batch: its backward is the backward of the
        # embeddings, which reads no weights. In the last micro-batch it is not gathered, because the optimizer changes
        # the weights before the next forward; `finish_step` gathers them then.
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

    # Gradients: reduced as soon as a unit has all of them or, with `reduce_once`, in the last micro-batch.

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
        # The previous micro-batch did not fill these buckets on this rank, because it did not use all their parameters.
        # Other ranks may have filled and reduced them, so this rank reduces what it has, to make the same collectives.
        # Their weights have not been dropped either, because `_arrive` drops them when the bucket is full.
        for bucket in self.buckets[self._reduced :]:
            if self._travels(bucket):
                self._reduce(bucket)
            if not self._waits_for_next(bucket):
                self._drop(bucket)
        super().start_micro_batch(last)

    def _arrive(self, name: str, parameter: Tensor) -> None:
        super()._arrive(name, parameter)
        bucket = self.places[name].bucket
        # A full bucket has the gradients of all its parameters. Autograd computes the gradients of a layer's input and
        # weight before it accumulates the weight's gradient, so the last kernel of this backward that reads the weights
        # is enqueued, and they may be dropped.
        if bucket.full and (self._last_micro_batch or not self._waits_for_next(bucket)):
            self._drop(bucket)

    def _waits_for_next(self, bucket: Bucket) -> bool:
        """Returns whether a bucket's weights stay for the next forward, which begins with units 0 and 1."""
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
        # Each reduce-scatter in progress keeps the gradients of a whole unit in memory. When the current stream has
        # waited for the oldest one, that memory may be used again.
        self._settle(self.collectives.in_flight)

    def _settle(self, most: int) -> None:
        """Makes the current stream wait until at most `most` reduce-scatters are in progress."""
        while len(self._arriving) > most:
            self._arriving.pop(0).wait()

    def _reduced_gradient(self, bucket: Bucket) -> Tensor:
        if not self._travels(bucket):
            return super()._reduced_gradient(bucket)
        self._settle(0)
        return bucket.grad
