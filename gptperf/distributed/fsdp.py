"""FSDP: a process holds its share of weights, gradients and moments, and a unit's weights while it reads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.buckets import Bucket, Layout, runs
from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.zero1 import Sharded

__all__ = ["FullySharded"]


class FullySharded(Sharded):
    """FSDP: a process has its share of everything, and a unit's weights while they are read.

    The weights of a unit are gathered while the unit before it computes, in forward and again in backward, and dropped
    after it; with `gather_once` they are gathered in an iteration's first forward and dropped in its last backward.
    Vectors (norm weights, biases) are a thousandth of a model and stay whole in every process.

    Args:
        model, compute_dtype, collectives: as for `Sharded`.
        min_num_params: blocks smaller than this share a unit with the next.
        reduce_once: keep whole gradients between micro-batches and reduce them in the last one: 4 bytes a parameter
            for less communication.
        gather_once: keep gathered weights: those of the whole model, in the compute dtype, for less communication.
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
        self._arriving: list[Pending] = []  # reductions on their way
        self._with_gradient: set[Bucket] = set()  # in this step
        super().__init__(model, compute_dtype, collectives)
        for bucket in self.buckets:
            self._drop(bucket)

    def _split(self, parameters: dict[str, nn.Parameter], bucket_numel: int) -> Iterator[list[str]]:
        units: dict[str, list[str]] = {}
        for name in reversed(parameters):  # backward reaches the last one first
            head, _, rest = name.partition(".")
            units.setdefault(f"{head}.{rest.partition('.')[0]}" if head == "blocks" else head, []).append(name)
        blocks = [names for unit, names in units.items() if unit.startswith("blocks.")]
        rest_of = {unit: names for unit, names in units.items() if not unit.startswith("blocks.")}
        after = [names for unit, names in rest_of.items() if unit in ("norm", "lm_head")]
        before = [names for unit, names in rest_of.items() if unit not in ("norm", "lm_head")]
        yield from after
        yield from runs(blocks, parameters, self.min_num_params)
        yield from before

    def _stays(self, bucket: Bucket) -> bool:
        """Whether a bucket is whole in every process all the time."""
        return not bucket.decayed or self.world_size == 1

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        split = [layout for layout in layouts if layout.decayed and self.world_size > 1]
        numel = self._shared_numel([layout for layout in layouts if not layout.decayed or self.world_size == 1])
        for layout in split:
            numel[self.compute_dtype] += layout.numel // self.world_size
            if self.reduce_once:
                numel[torch.float32] += layout.numel
        borrowed = 0 if self.reduce_once else max((layout.numel for layout in split), default=0)
        self.collectives.reserve(numel, borrowed, self.wire_dtype)

    def _make_bucket(self, names: list[str], decayed: bool, whole: Tensor) -> Bucket:
        if not decayed or self.world_size == 1:
            return super()._make_bucket(names, decayed, whole)
        dist.broadcast(whole, 0)
        own = self._own(whole)
        share = self.collectives.zeros(own.numel(), self.compute_dtype).copy_(own)  # which the others read
        copied = self._copied(decayed)
        master = nn.Parameter(own.clone() if copied else share, requires_grad=False)
        grad = self.collectives.zeros(whole.numel(), torch.float32) if self.reduce_once else torch.zeros_like(own)
        compute = whole.to(self.compute_dtype) if copied else whole
        return Bucket(names, decayed, master, grad, compute, share if copied else None)

    # Weights: gathered before a unit, dropped after it.

    def _drop(self, bucket: Bucket) -> None:
        if not self._stays(bucket):
            self._wait(bucket)
            bucket.compute.untyped_storage().resize_(0)

    def _gather(self, bucket: Bucket) -> None:
        if not self._stays(bucket):
            storage = bucket.compute.untyped_storage()
            if storage.size() > 0:
                return  # it is here, or on its way
            storage.resize_(bucket.compute.numel() * bucket.compute.element_size())
        super()._gather(bucket)

    def _need(self, unit: int) -> None:
        for bucket in self._needs[unit]:
            if not self._stays(bucket):
                self._gather(bucket)
            self._wait(bucket)

    def _prefetch(self, unit: int) -> None:
        for bucket in self._needs[unit] if 0 <= unit <= self.last_unit else ():
            if not self._stays(bucket):
                self._gather(bucket)

    def finish_step(self) -> None:
        self.collectives.written()
        for bucket in self.buckets:
            if self._stays(bucket):
                super()._gather(bucket)
            else:
                self._drop(bucket)  # what an evaluation or the last backward left there is old
        self._prefetch(0)
        self._prefetch(1)

    def enter(self, unit: int) -> None:
        self._need(unit)
        training = torch.is_grad_enabled()
        if not (training and self.gather_once):
            kept = [unit, unit + 1]
            if training and unit == self.last_unit:
                kept.append(unit - 1)  # backward comes to it next
            self._keep_only(kept)
        self._prefetch(unit + 1)

    def _keep_only(self, units: list[int]) -> None:
        kept = [bucket for unit in units if unit <= self.last_unit for bucket in self._needs[unit]]
        for bucket in self.buckets:
            if bucket not in kept:
                self._drop(bucket)

    def leave(self, unit: int, outputs: tuple[Tensor | None, ...]) -> None:
        for x in outputs:
            if x is not None and x.requires_grad:
                x.register_hook(partial(self._before_backward, unit))

    def _before_backward(self, unit: int, _: Tensor) -> None:
        self._need(unit)
        if unit > 1 or not self._last_micro_batch:  # the embedding's are for the next forward, not for its backward
            self._prefetch(unit - 1)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        for bucket in self.buckets:
            if not self._stays(bucket):
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
        return not self._stays(bucket) and not self.reduce_once

    def start_step(self) -> None:
        super().start_step()
        self._with_gradient.clear()

    @torch.no_grad()
    def start_micro_batch(self, last: bool) -> None:
        # What the last micro-batch did not fill, in this process: others may have, and have begun to reduce it.
        for bucket in self.buckets[self._reduced :]:
            if self._travels(bucket):
                self._reduce(bucket)
            if not self._waits_for_next(bucket):
                self._drop(bucket)
        super().start_micro_batch(last)

    def _arrive(self, name: str, parameter: Tensor) -> None:
        super()._arrive(name, parameter)
        bucket = self.places[name].bucket
        if bucket.full and (self._last_micro_batch or not self._waits_for_next(bucket)):
            self._drop(bucket)

    def _waits_for_next(self, bucket: Bucket) -> bool:
        """Whether a bucket is there from one micro-batch to the next, as those with which a forward begins are."""
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
        self._settle(self.collectives.in_flight)

    def _settle(self, most: int) -> None:
        """Wait until at most so many gradients are on their way."""
        while len(self._arriving) > most:
            self._arriving.pop(0).wait()

    def _reduced_gradient(self, bucket: Bucket) -> Tensor:
        if not self._travels(bucket):
            return super()._reduced_gradient(bucket)
        self._settle(0)
        return bucket.grad
