"""Who holds which weights and gradients: everything in every process, or each its share.

Under every strategy the master weights, the gradients and the optimizer states are float32, in flat buckets; the model
computes with a copy in the compute dtype. Every strategy has the interface of `Replicated`; the training step and the
checkpoint do not know which one they talk to. The sharded ones are in `gptperf.distributed.zero1` and `fsdp`.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.distributed.buckets import ALIGN, BUCKET_NUMEL, Bucket, Layout, Piece, Place, by_size, gaps
from gptperf.distributed.collectives import Collectives

__all__ = ["Replicated"]


class Replicated:
    """Every process holds all weights: one process, or data parallelism (DDP).

    The model's parameters become views of flat buckets. Matrices are copied to the compute dtype; vectors (norm
    weights, biases) stay float32 and are read as they are. As backward produces a gradient, it is added to the float32
    bucket and dropped; in the last micro-batch a full bucket is summed over the processes while backward goes on
    (compiled as one graph, backward hands over all gradients at its end, and there is nothing left to overlap with).
    With `single` the bucket's gradient travels as it came, and the float32 bucket takes the sum.
    A frozen parameter stays as it is.

    Args:
        model: with float32 parameters on their device; equal in every process.
        compute_dtype: dtype of the matrices that the model computes with.
        collectives: of the processes that share the gradients; default: this one is alone.
        bucket_numel: elements at which a bucket is closed.
        single: every step has one micro-batch, whose gradients travel in their own dtype where sums widen them.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        collectives: Collectives | None = None,
        *,
        bucket_numel: int = BUCKET_NUMEL,
        single: bool = False,
    ):
        device = next(model.parameters()).device
        self.collectives = Collectives(1, 0, device) if collectives is None else collectives
        self.world_size, self.rank = self.collectives.world_size, self.collectives.rank
        self.compute_dtype = compute_dtype
        self.single = single and self.collectives.widens and self.wire_dtype.itemsize < 4
        self.places: dict[str, Place] = {}
        self.buckets: list[Bucket] = []
        self._last_micro_batch = False
        self._reduced = 0  # buckets whose reduction has begun in this micro-batch
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied weight once
        layouts = []
        for decayed in (True, False):
            group = {name: p for name, p in parameters.items() if (p.ndim >= 2) is decayed}
            for names in self._split(group, bucket_numel) if decayed else by_size(group, bucket_numel):
                layouts.append(self._lay_out({name: group[name] for name in names}, decayed))
        self._reserve(layouts)
        for layout in layouts:
            self._add_bucket(layout)
        self._reduced = len(self.buckets)

    def _split(self, parameters: dict[str, nn.Parameter], bucket_numel: int) -> Iterator[list[str]]:
        """Names of the matrices of each bucket, in the order in which backward reaches them."""
        return by_size(parameters, bucket_numel)

    def _lay_out(self, parameters: dict[str, nn.Parameter], decayed: bool) -> Layout:
        offsets, numel = [], 0
        for parameter in parameters.values():
            offsets.append(numel)
            numel += -(-parameter.numel() // ALIGN) * ALIGN
        unit = ALIGN * self.world_size  # so that every process has an equal share
        return Layout(parameters, decayed, offsets, -(-numel // unit) * unit)

    def _reserve(self, layouts: Sequence[Layout]) -> None:
        """Say what will be asked of the collectives."""
        numel = {torch.float32: sum(layout.numel for layout in layouts)}
        self.collectives.reserve(numel, self._borrowed(layouts), self.wire_dtype)

    def _borrowed(self, layouts: Sequence[Layout]) -> int:
        """Elements of the largest gradient that is borrowed for."""
        return max((layout.numel for layout in layouts if layout.decayed), default=0) if self.single else 0

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of a micro-batch's gradients that travel before they are added up."""
        return self.collectives.wire_dtype(self.compute_dtype)

    def _travels(self, bucket: Bucket) -> bool:
        """Whether a micro-batch's gradient is summed over the processes as it came, from a borrowed buffer."""
        return self.single and bucket.decayed

    def _copied(self, decayed: bool) -> bool:
        """Whether the model reads a copy in the compute dtype."""
        return decayed and self.compute_dtype != torch.float32

    @torch.no_grad()
    def _add_bucket(self, layout: Layout) -> None:
        device = next(iter(layout.parameters.values())).device
        whole = torch.zeros(layout.numel, dtype=torch.float32, device=device)
        for parameter, offset in zip(layout.parameters.values(), layout.offsets, strict=True):
            whole[offset : offset + parameter.numel()].copy_(parameter.view(-1))
        bucket = self._make_bucket(list(layout.parameters), layout.decayed, whole)
        self.buckets.append(bucket)
        for (name, parameter), offset in zip(layout.parameters.items(), layout.offsets, strict=True):
            place = self.places[name] = Place(bucket, offset, parameter.shape)
            parameter.data = place.view(bucket.compute)
            parameter.register_post_accumulate_grad_hook(partial(_deliver, weakref.ref(self), name))

    def _make_bucket(self, names: list[str], decayed: bool, whole: Tensor) -> Bucket:
        """The buffers of a bucket whose elements are `whole`, float32."""
        copied = self._copied(decayed)
        compute = whole.to(self.compute_dtype) if copied else whole
        master = nn.Parameter(whole, requires_grad=False)
        grad = self.collectives.zeros(whole.numel(), torch.float32)
        return Bucket(names, decayed, master, grad, compute, compute if copied else None)

    def start_step(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self.buckets:
            bucket.started.clear()

    @torch.no_grad()
    def start_micro_batch(self, last: bool) -> None:
        """Say whether the backward that follows is the last one of the step."""
        self._last_micro_batch = last
        self._reduced = 0
        for bucket in self.buckets:
            bucket.full = False
            self._collect(bucket)  # what the last backward left in a bucket that it did not fill

    @torch.no_grad()
    def _arrive(self, name: str, parameter: Tensor) -> None:
        """Take one parameter's gradient; the bucket's last one moves them all."""
        assert parameter.grad is not None
        bucket = self.places[name].bucket
        bucket.arrived[name], parameter.grad = parameter.grad, None
        if len(bucket.arrived) < len(bucket.names):
            return
        self._collect(bucket)
        bucket.full = True
        # In the order of the buckets, whatever order they fill in: every process has to reduce the same one.
        while self._reduces_now and self._reduced < len(self.buckets) and self.buckets[self._reduced].full:
            self._reduce(self.buckets[self._reduced])
            self._reduced += 1

    @property
    def _reduces_now(self) -> bool:
        """Whether this micro-batch's gradients are reduced as they come."""
        return self._last_micro_batch

    def _collect(self, bucket: Bucket) -> None:
        """Add what has arrived to the float32 gradients: the first of a step overwrites."""
        if self._travels(bucket):
            return  # `_fill` takes it
        # Over lists: one launch a bucket, and 1.75 times the bandwidth of Tensor.copy_ (bench/NOTES.md).
        first = [name for name in bucket.arrived if name not in bucket.started]
        more = [name for name in bucket.arrived if name in bucket.started]
        if first:
            torch._foreach_copy_([self.gradient(n) for n in first], [bucket.arrived[n] for n in first])
        if more:
            torch._foreach_add_([self.gradient(n) for n in more], [bucket.arrived[n] for n in more])
        bucket.started.update(first)
        bucket.arrived.clear()

    def _complete(self, bucket: Bucket) -> None:
        """Collect, with zeros for what had no gradient in this step."""
        self._collect(bucket)
        for name in () if self._travels(bucket) else set(bucket.names) - bucket.started:
            self.gradient(name).zero_()

    def _reduce(self, bucket: Bucket) -> None:
        """Begin to sum a bucket over the processes."""
        if self.world_size > 1:
            source = self._fill(bucket) if self._travels(bucket) else None
            bucket.reduction = self.collectives.all_reduce(bucket.grad, source)

    def _fill(self, bucket: Bucket) -> Tensor:
        """What has arrived, in a borrowed buffer, with zeros for the rest."""
        whole = self.collectives.borrow(bucket.compute.numel(), self.wire_dtype)
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
        """What the optimizer takes, once the reduction is done."""
        if bucket.reduction is not None:
            bucket.reduction.wait()
            bucket.reduction = None
        return bucket.grad

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over micro-batches and processes; a parameter without one has zero."""
        for bucket in self.buckets[self._reduced :]:  # those with a parameter that the last micro-batch did not use
            self._complete(bucket)
            self._reduce(bucket)
        self._reduced = len(self.buckets)
        for bucket in self.buckets:
            bucket.master.grad = self._reduced_gradient(bucket)
        if self.world_size > 1:
            self.collectives.finish()

    def summed(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the shares of the processes: here every process has all of it."""
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The same for a maximum."""
        return value

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients, a float32 scalar on the device."""
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.gradients()])
        return self.summed(norms.square().sum()).sqrt() if self.is_sharded else torch.linalg.vector_norm(norms)

    is_sharded = False
    """Whether a process holds only its share of master weights, reduced gradients and optimizer states."""

    def finish_step(self) -> None:
        """Hand out what the optimizer has updated."""

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the master weights, rounded to the compute dtype; the optimizer does so in its own pass."""
        for bucket in self.buckets:
            if bucket.copy is not None:
                bucket.copy.copy_(bucket.master)
        self.finish_step()

    @torch.no_grad()
    def share(self) -> None:
        """Give every process the master weights of the first one, so that replicas begin with the same bits."""
        if self.world_size > 1:
            for bucket in self.buckets:
                dist.broadcast(bucket.master.data, 0)
        self.publish()

    def gathered(self) -> AbstractContextManager[None]:
        """While the body runs, a process may use the model on its own; every process has to enter."""
        return nullcontext()

    @property
    def numel(self) -> int:
        """Parameters of the model, a tied one counted once."""
        return sum(place.shape.numel() for place in self.places.values())

    def gradients(self) -> Iterator[Tensor]:
        """The float32 gradients that the optimizer takes, flat, with zeros in the gaps."""
        return (bucket.grad if bucket.master.grad is None else bucket.master.grad for bucket in self.buckets)

    def gradient(self, name: str) -> Tensor:
        """float32 gradient of a parameter, in its shape, before it is reduced."""
        place = self.places[name]
        return place.view(place.bucket.grad)

    def _held(self, bucket: Bucket) -> tuple[int, int]:
        """Elements of a bucket that `master` has."""
        return 0, bucket.compute.numel()

    def _share_of(self, bucket: Bucket) -> tuple[int, int]:
        """Elements of a bucket that are this process's to save."""
        numel = bucket.compute.numel() // self.world_size
        return self.rank * numel, (self.rank + 1) * numel

    def pieces(self, values: Callable[[Bucket], Tensor], *, to_save: bool) -> Iterator[Piece]:
        """The parameters in flat buffers, as far as this process has them.

        Args:
            values: a bucket's master, or a buffer of its size such as an optimizer state.
            to_save: only those that are this process's to save: the processes' pieces together are everything, once.
        """
        for bucket in self.buckets:
            yield from self.pieces_of(bucket, values(bucket), to_save=to_save)

    def pieces_of(self, bucket: Bucket, flat: Tensor, *, to_save: bool = False) -> Iterator[Piece]:
        """The same for one bucket."""
        begin, end = self._held(bucket)
        low, high = self._share_of(bucket) if to_save else (begin, end)
        for name in bucket.names:
            place = self.places[name]
            first = max(place.offset, low, begin)
            last = min(place.offset + place.shape.numel(), high, end)
            if first < last:
                yield Piece(name, place.shape, first - place.offset, flat[first - begin : last - begin])


def _deliver(weights: "weakref.ref[Replicated]", name: str, parameter: nn.Parameter) -> None:
    """Hand over a gradient. A parameter must not keep its owner alive: the collector does not see its hooks."""
    owner = weights()
    assert owner is not None
    owner._arrive(name, parameter)
