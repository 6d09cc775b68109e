"""Data parallelism (DDP), and the interface of every parallel strategy.

Under every strategy master weights and gradients are float32, and with the optimizer states in flat buckets; the model
computes with a copy in the compute dtype. A gradient to which nothing is added stays in the compute dtype. `Replicated`
keeps all of them on every rank. `gptperf.distributed.zero1` and `gptperf.distributed.fsdp` override what they shard.
Training step and checkpoint use this interface and do not know the strategy.

One step, as `train_step` drives it:

    start_step
    start_micro_batch(last), forward, backward     once per micro-batch; backward calls `_arrive` for each parameter
    finish_gradients                               puts the reduced gradients into `bucket.master.grad`
    gradient_norm, the optimizer's step            writes `bucket.master` and `bucket.copy`
    finish_step                                    gives the other ranks what the optimizer wrote
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.access import Access
from gptperf.distributed.bucket_sizes import ALIGN, cut_between, least_numel
from gptperf.distributed.buckets import (
    BUCKET_NUMEL,
    Accumulate,
    Bucket,
    BucketGroup,
    Layout,
    Place,
    add_gradients,
    by_size,
    gaps,
    group_of,
)
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.matrices import elements_of
from gptperf.kernels.linear import offer_gradient

__all__ = ["Replicated"]


class Replicated(Access):
    """All weights on every rank: a single process, or data parallelism (DDP).

    The model's parameters become views of flat buckets. Matrices are copied to the compute dtype; vectors (norm
    weights, biases) stay float32 and are read as they are. When backward produces a gradient, it is added to the
    float32 gradient of the bucket and dropped. In the last micro-batch each bucket is reduced as soon as it is full,
    while backward continues. (A model compiled as one graph returns all gradients at the end of backward, so nothing
    overlaps.) Frozen parameters stay as they are.

    Args:
        model: a model with float32 parameters on their device, equal on every rank.
        compute_dtype: dtype of the matrices that the model computes with.
        collectives: the collectives between the ranks; default: those of a single rank.
        bucket_numel: elements at which a bucket is closed.
        single: whether every step has one micro-batch. A single process then keeps gradients in their own dtype, and
            backward writes those of the linear layers to their place in the bucket. With several ranks, if the
            collectives can widen gradients, they travel in their own dtype, and the reduction adds them up in float32.
        packed: for an optimizer of whole matrices, which then updates the hidden matrices: name of each parameter that
            packs several matrices -> the rows of each. Their buckets are cut between matrices. None: anywhere.
    """

    is_sharded = False
    """Whether a rank holds only its shard of master weights, reduced gradients and optimizer states."""

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        collectives: Collectives | None = None,
        *,
        bucket_numel: int = BUCKET_NUMEL,
        single: bool = False,
        packed: Mapping[str, tuple[int, ...]] | None = None,
    ):
        device = next(model.parameters()).device
        self.collectives = Collectives(1, 0, device) if collectives is None else collectives
        super().__init__(self.collectives.world_size, self.collectives.rank, packed)
        self.compute_dtype = compute_dtype
        self.single = single and self.collectives.widens and self.wire_dtype.itemsize < 4
        # With float16, GradScaler looks for float32 gradients.
        self.direct = single and self.world_size == 1 and not self.is_sharded and compute_dtype != torch.float16
        self.accumulate: Accumulate | None = None
        self._last_micro_batch = False
        # Number of buckets whose reduction has begun in this micro-batch: always the first ones, see `_arrive`.
        self._reduced = 0
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # has a tied weight once
        # Matrices are in the order in which backward reaches them, so that reductions begin in the order in which
        # buckets fill. Vectors come last: each layer has some, so their bucket is full only when backward ends.
        vectors = {name: p for name, p in parameters.items() if group_of(name, p) is BucketGroup.VECTOR}
        matrices = {name: p for name, p in parameters.items() if name not in vectors}
        self._slots: list[tuple[nn.Parameter, Tensor]] = []
        named = [*self._split(matrices, bucket_numel), *by_size(vectors, bucket_numel)]
        layouts = [self._lay_out({name: parameters[name] for name in names}) for names in named]
        # All buffers that other ranks read are reserved at once: copy engines map them as one region.
        self._reserve(layouts)
        for layout in layouts:
            self._add_bucket(layout)
        self._reduced = len(self.buckets)

    def _split(self, matrices: dict[str, nn.Parameter], bucket_numel: int) -> Iterator[list[str]]:
        """Yields the names of the matrices of each bucket, in the order in which backward reaches them."""
        return by_size(matrices, bucket_numel, self._hidden_numel(matrices))

    def _hidden_numel(self, matrices: dict[str, nn.Parameter]) -> int:
        """Returns the least elements of a bucket that is cut between matrices, or 0 if buckets are cut anywhere."""
        if self.packed is None or self.world_size == 1:
            return 0
        blocks: Counter[str] = Counter()
        for name, parameter in matrices.items():
            if group_of(name, parameter) is BucketGroup.HIDDEN:
                blocks[name.split(".")[1]] += parameter.numel()
        return least_numel(max(blocks.values(), default=0), self.world_size)

    def _lay_out(self, parameters: dict[str, nn.Parameter]) -> Layout:
        groups = {group_of(name, parameter) for name, parameter in parameters.items()}
        assert len(groups) == 1, f"{sorted(parameters)} are of several groups"
        if self.packed is not None and groups == {BucketGroup.HIDDEN}:
            sizes = [elements_of(name, parameter.shape, self.packed) for name, parameter in parameters.items()]
            offsets, share = cut_between(sizes, self.world_size)
            return Layout(parameters, groups.pop(), offsets, share * self.world_size)
        offsets, numel = [], 0
        for parameter in parameters.values():
            offsets.append(numel)
            numel += -(-parameter.numel() // ALIGN) * ALIGN
        unit = ALIGN * self.world_size  # so that every rank has an equal shard, which starts aligned
        return Layout(parameters, groups.pop(), offsets, -(-numel // unit) * unit)

    def _gathers_updates(self, group: BucketGroup) -> bool:
        """Returns whether each rank computes a share of the updates of a group, which the others gather from it."""
        return self.packed is not None and group is BucketGroup.HIDDEN and self.world_size > 1

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        """Registers the buffers that later collectives use."""
        numel = Counter({torch.float32: sum(layout.numel for layout in layouts)})
        for layout in layouts:
            if self._gathers_updates(layout.group) and self._copied(layout.group):
                numel[self.compute_dtype] += layout.numel
        self.collectives.reserve(numel, self._borrowed(layouts), self.wire_dtype)

    def _borrowed(self, layouts: Sequence[Layout]) -> int:
        """Returns the number of elements of the largest gradient that travels in a borrowed buffer."""
        travelling = [layout.numel for layout in layouts if layout.group.uses_compute_dtype]
        return max(travelling, default=0) if self.single else 0

    @property
    def wire_dtype(self) -> torch.dtype:
        """Dtype in which the gradients of one micro-batch travel before they are accumulated."""
        return self.collectives.wire_dtype(self.compute_dtype)

    def _travels(self, bucket: Bucket) -> bool:
        """Returns whether the gradient of a micro-batch is reduced by itself, in its own dtype, from a borrowed buffer.

        Otherwise it is first accumulated in `bucket.grad`, which is then reduced.
        """
        return self.single and bucket.group.uses_compute_dtype

    def _copied(self, group: BucketGroup) -> bool:
        """Returns whether the model reads a copy of the master weights, in the compute dtype."""
        return group.uses_compute_dtype and self.compute_dtype != torch.float32

    @torch.no_grad()
    def _add_bucket(self, layout: Layout) -> None:
        device = next(iter(layout.parameters.values())).device
        whole = torch.zeros(layout.numel, dtype=torch.float32, device=device)
        for parameter, offset in zip(layout.parameters.values(), layout.offsets, strict=True):
            whole[offset : offset + parameter.numel()].copy_(parameter.view(-1))
        bucket = self._make_bucket(list(layout.parameters), layout.group, whole)
        self.buckets.append(bucket)
        for (name, parameter), offset in zip(layout.parameters.items(), layout.offsets, strict=True):
            place = self.places[name] = Place(bucket, offset, parameter.shape)
            # From here on the model reads the bucket; the parameter's own memory is freed.
            parameter.data = place.view(bucket.compute)
            if self.direct and bucket.grad.dtype == parameter.dtype:
                self._slots.append((parameter, place.view(bucket.grad)))
            parameter.register_post_accumulate_grad_hook(partial(_deliver, weakref.ref(self), name))

    def _make_bucket(self, names: list[str], group: BucketGroup, whole: Tensor) -> Bucket:
        """Makes the buffers of a bucket.

        Args:
            names: names of the parameters.
            group: group of the parameters.
            whole: initial weights of the bucket, `(numel,)` float32; becomes part of the bucket.
        """
        copied = self._copied(group)
        compute = whole.to(self.compute_dtype) if copied else whole
        if copied and self._gathers_updates(group):
            compute = self.collectives.zeros(whole.numel(), self.compute_dtype).copy_(whole)
        master = nn.Parameter(whole, requires_grad=False)
        grad = self.collectives.zeros(whole.numel(), compute.dtype if self.direct else torch.float32)
        master.grad_dtype = grad.dtype
        return Bucket(names, group, master, grad, compute, compute if copied else None)

    # Gradients: accumulated as they arrive, reduced bucket by bucket.

    def start_step(self) -> None:
        """Forgets the gradients of the last step: the first gradient of each parameter overwrites them."""
        for bucket in self.buckets:
            bucket.started.clear()
            bucket.arrived.clear()  # there are some if an error ended the last backward

    @torch.no_grad()
    def start_micro_batch(self, last: bool) -> None:
        """Prepares for one forward and backward.

        Args:
            last: whether this is the last micro-batch of the step, in which gradients are reduced.
        """
        self._last_micro_batch = last
        self._reduced = 0
        for parameter, place in self._slots:
            offer_gradient(parameter, place)
        for bucket in self.buckets:
            bucket.full = False
            # `_arrive` collects a bucket when it is full. A bucket with a parameter that the previous micro-batch did
            # not use never got full, and its other gradients are collected here.
            self._collect(bucket)

    @torch.no_grad()
    def _arrive(self, name: str, parameter: Tensor) -> None:
        """Takes the gradient of one parameter. With the last one of a bucket, all its gradients are accumulated.

        Autograd calls this when the gradient is complete: once for a tied weight, with the sum over its uses.
        """
        assert parameter.grad is not None
        bucket = self.places[name].bucket
        bucket.arrived[name], parameter.grad = parameter.grad, None
        if len(bucket.arrived) < len(bucket.names):
            return
        self._collect(bucket)
        bucket.full = True
        # Collectives are matched between ranks by their order, so every rank must reduce the same bucket next. The
        # order in which buckets fill may differ between ranks (a model may use its layers in another order); the order
        # of `buckets` does not. So a full bucket waits for those before it, and the first `_reduced` buckets in this
        # order have been reduced.
        while self._reduces_now and self._reduced < len(self.buckets) and self.buckets[self._reduced].full:
            self._reduce(self.buckets[self._reduced])
            self._reduced += 1

    def bookkeeping(self) -> Any:
        """Returns what the host knows about the gradients of this step, for `set_bookkeeping`."""
        return [(frozenset(bucket.started), bucket.full) for bucket in self.buckets], self._reduced

    def set_bookkeeping(self, known: Any) -> None:
        """Sets what the host knows about the gradients, after work on the device that Python did not launch."""
        buckets, self._reduced = known
        for bucket, (started, full) in zip(self.buckets, buckets, strict=True):
            bucket.started, bucket.full = set(started), full
            bucket.arrived.clear()

    @property
    def _reduces_now(self) -> bool:
        """Whether the gradients of this micro-batch are reduced as soon as a bucket is full."""
        return self._last_micro_batch

    def _collect(self, bucket: Bucket) -> None:
        """Adds the gradients that have arrived to the bucket's; the first one of a step overwrites it."""
        if self._travels(bucket):
            return  # `_fill` takes them
        # Ops over lists need one launch per bucket and reach 1.75 times the bandwidth of Tensor.copy_ (bench/NOTES.md).
        first = [name for name in bucket.arrived if name not in bucket.started]
        more = [name for name in bucket.arrived if name in bucket.started]
        bucket.started.update(first)
        if self.direct:  # backward has written some of them
            first = [name for name in first if bucket.arrived[name].data_ptr() != self.gradient(name).data_ptr()]
        if first:
            torch._foreach_copy_([self.gradient(n) for n in first], [bucket.arrived[n] for n in first])
        if more:
            add_gradients([(self.gradient(n), bucket.arrived[n]) for n in more], self.accumulate)
        bucket.arrived.clear()

    def _complete(self, bucket: Bucket) -> None:
        """Collects what has arrived, and writes zeros for parameters without a gradient in this step."""
        self._collect(bucket)
        for name in () if self._travels(bucket) else set(bucket.names) - bucket.started:
            self.gradient(name).zero_()  # it still has the gradient of the previous step

    def _reduce(self, bucket: Bucket) -> None:
        """Starts the all-reduce of a bucket."""
        if self.world_size > 1:
            source = self._fill(bucket) if self._travels(bucket) else None
            bucket.reduction = self.collectives.all_reduce(bucket.grad, source)

    def _fill(self, bucket: Bucket) -> Tensor:
        """Copies the gradients that have arrived to a borrowed buffer, and fills the rest with zeros."""
        whole = self.collectives.borrow(bucket.compute.numel(), self.wire_dtype)
        # The buffer may hold the gradient of another bucket, whose gaps lie elsewhere, so the gaps are zeroed too.
        for begin, end in gaps([self.places[name] for name in bucket.names], whole.numel()):
            whole[begin:end].zero_()
        for name in bucket.names:
            if name not in bucket.arrived:
                self.places[name].view(whole).zero_()
        if bucket.arrived:
            targets = [self.places[name].view(whole) for name in bucket.arrived]
            torch._foreach_copy_(targets, list(bucket.arrived.values()))
            bucket.arrived.clear()
        return whole

    def _reduced_gradient(self, bucket: Bucket) -> Tensor:
        """Makes the current stream wait for the reduction of a bucket, and returns the gradient for the optimizer."""
        if bucket.reduction is not None:
            bucket.reduction.wait()
            bucket.reduction = None
        return bucket.grad

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Completes all reductions. Each gradient is then the sum over micro-batches and ranks, or 0 if unused."""
        # A bucket with a parameter that the last micro-batch did not use is not full, so neither it nor those after it
        # have been reduced.
        for bucket in self.buckets[self._reduced :]:
            self._complete(bucket)
            self._reduce(bucket)
        self._reduced = len(self.buckets)
        for bucket in self.buckets:
            bucket.master.grad = self._reduced_gradient(bucket)
        if self.world_size > 1:
            # Other ranks may still pull gradients and weight copies of this rank. The optimizer overwrites the copies
            # next, and the next backward overwrites the gradients.
            self.collectives.finish()

    # Scalars over all shards.

    def summed(self, value: Tensor) -> Tensor:
        """Returns the sum of a tensor over the shards. Here a rank has everything, so this is the value itself."""
        return value

    def largest(self, value: Tensor) -> Tensor:
        """Returns the maximum of a tensor over the shards, element by element."""
        return value

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Returns the 2-norm of all gradients, a float32 scalar on the device."""
        norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in self.gradients()])
        return self.summed(norms.square().sum()).sqrt() if self.is_sharded else torch.linalg.vector_norm(norms)

    # Weights: from the master weights to the model, and between ranks.

    def gather_updates(self, flats: Sequence[Tensor]) -> None:
        """Gives every rank the shares of the updates that the others have computed. Collective.

        Args:
            flats: buffers of the size of a bucket's `master`, in which this rank has written its share.
        """
        if self.world_size == 1:
            return
        self.collectives.written()
        pending = [self.collectives.all_gather(flat, self.collectives.own(flat)) for flat in flats]
        for gather in pending:
            gather.wait()
        self.collectives.finish()  # the weights overwrite the updates next, which other ranks may still pull

    def finish_step(self) -> None:
        """Gives the other ranks what the optimizer has updated. Does nothing here: all ranks make the same update."""

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the master weights to the model, rounded to the compute dtype, as the optimizer does in its update."""
        for bucket in self.buckets:
            if bucket.copy is not None:
                bucket.copy.copy_(bucket.master)
        self.finish_step()

    @torch.no_grad()
    def share(self) -> None:
        """Copies the master weights of rank 0 to every rank, so that replicas begin with the same bits."""
        if self.world_size > 1:
            for bucket in self.buckets:
                dist.broadcast(bucket.master.data, 0)
        self.publish()

    def gathered(self) -> AbstractContextManager[None]:
        """Returns a context in which a rank may use the model on its own. Collective: every rank must enter."""
        return nullcontext()


def _deliver(weights: "weakref.ref[Replicated]", name: str, parameter: nn.Parameter) -> None:
    """Passes a gradient to the owner of the buckets.

    The reference is weak because Python does not collect cycles through hooks: a strong one would keep the owner alive.
    """
    owner = weights()
    assert owner is not None
    owner._arrive(name, parameter)
