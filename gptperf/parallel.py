"""Processes, and who holds which weights and gradients.

Under every strategy the master weights, the gradients and their reduction, and the optimizer states are float32; the
model computes with a copy in the compute dtype. A strategy has the interface of `Replicated`, and neither the training
step nor the checkpoint knows which one it talks to.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptperf.errors import DeviceError

__all__ = ["ALIGN", "Bucket", "Process", "Replicated", "start_process"]

ALIGN = 64
"""Elements that a parameter's place in a bucket is a multiple of: 128 bytes of bfloat16, for vector loads."""


@dataclass(frozen=True)
class Process:
    """This process among those of the job."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """Of several processes: for decisions, on the CPU, so that they do not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the console."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value = value / self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says yes; every process has to ask."""
        if self.world_size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(found.item())

    def merged(self, found: dict[str, str]) -> dict[str, str]:
        """What any process found, the first one's word for each key; every process has to ask."""
        if self.world_size == 1:
            return found
        every: list[dict[str, str]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(every, found, group=self.host_group)
        return {key: text for one in reversed(every) for key, text in one.items()}

    def from_main(self, text: str) -> str:
        """The text that the main process has; every process has to ask."""
        if self.world_size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, 0, group=self.host_group)
        return box[0]

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start_process(device: str, timeout_s: float = 600.0) -> Process:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: "auto", "cuda" or "cpu".
        timeout_s: limit of one collective.

    Raises:
        DeviceError: "cuda" asked for by name on a machine without a usable GPU, fewer GPUs than processes on this host,
            or a WORLD_SIZE without the other variables that torchrun sets.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device = 'cuda': PyTorch finds no usable GPU here. Use device = 'auto' or 'cpu'.")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if world_size > 1 and name not in os.environ]
    if missing:
        raise DeviceError(f"WORLD_SIZE is {world_size}, and {', '.join(missing)} not set. Start the job with torchrun.")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local_rank} of this host has no GPU of its own: found {torch.cuda.device_count()}; wanted "
            f"--nproc_per_node={torch.cuda.device_count()} or less"
        )
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    host_group = None
    if world_size > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(seconds=timeout_s), device_id=here if kind == "cuda" else None
        )
        host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Process(rank, world_size, here, host_group)


@dataclass
class Bucket:
    """Parameters that lie in one flat buffer: one optimizer tensor, one reduction.

    `master` and `grad` are float32 `(numel,)`; `compute` is the copy that the model reads, or `master` itself. The gaps
    that alignment leaves are zero and stay zero.
    """

    names: list[str]
    master: nn.Parameter
    grad: Tensor
    compute: Tensor
    decayed: bool
    arrived: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Gradients of this micro-batch that are not in `grad` yet."""
    started: set[str] = field(default_factory=set, repr=False)
    """Parameters that have had a gradient in this step."""
    full: bool = False
    """Whether every parameter has had its gradient in this micro-batch."""
    reduction: dist.Work | None = field(default=None, repr=False)

    @property
    def has_copy(self) -> bool:
        """Whether `compute` is a buffer of its own."""
        return self.compute.data_ptr() != self.master.data_ptr()


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in its bucket."""

    bucket: Bucket
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


class Replicated:
    """Every process holds all weights: one process, or data parallelism.

    The model's parameters become views of flat buckets. Matrices are copied to the compute dtype; vectors (norm
    weights, biases) stay float32 and are read as they are. As backward produces a gradient, it is added to the float32
    bucket and dropped; in the last micro-batch a full bucket is summed over the processes while backward goes on
    (compiled as one graph, backward hands over all gradients at its end, and there is nothing left to overlap with).
    A frozen parameter stays as it is.

    Args:
        model: with float32 parameters on their device; equal in every process.
        compute_dtype: dtype of the matrices that the model computes with.
        world_size: processes that share the gradients.
        bucket_numel: elements at which a bucket is closed.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, world_size: int = 1, bucket_numel: int = 32 << 20):
        self.world_size = world_size
        self.places: dict[str, _Place] = {}
        self.buckets: list[Bucket] = []
        self._last_micro_batch = False
        self._reduced = 0  # buckets whose reduction has begun in this micro-batch
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied weight once
        for decayed in (True, False):
            group = {name: p for name, p in parameters.items() if (p.ndim >= 2) is decayed}
            for names in _split_by_size(group, bucket_numel):
                self._add_bucket({name: group[name] for name in names}, decayed, compute_dtype)

    @torch.no_grad()
    def _add_bucket(self, parameters: dict[str, nn.Parameter], decayed: bool, compute_dtype: torch.dtype) -> None:
        offsets, numel = [], 0
        for parameter in parameters.values():
            offsets.append(numel)
            numel += -(-parameter.numel() // ALIGN) * ALIGN
        device = next(iter(parameters.values())).device
        master = nn.Parameter(torch.zeros(numel, dtype=torch.float32, device=device), requires_grad=False)
        copied = decayed and compute_dtype != torch.float32
        compute = torch.zeros(numel, dtype=compute_dtype, device=device) if copied else master.data
        bucket = Bucket(list(parameters), master, torch.zeros_like(master), compute, decayed)
        self.buckets.append(bucket)
        for (name, parameter), offset in zip(parameters.items(), offsets, strict=True):
            place = self.places[name] = _Place(bucket, offset, parameter.shape)
            place.view(bucket.master).copy_(parameter)
            place.view(bucket.compute).copy_(parameter)
            parameter.data = place.view(bucket.compute)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._arrive(name, p))

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
        while self._last_micro_batch and self._reduced < len(self.buckets) and self.buckets[self._reduced].full:
            self._reduce(self.buckets[self._reduced])
            self._reduced += 1

    def _collect(self, bucket: Bucket) -> None:
        """Add what has arrived to the float32 gradients: the first of a step overwrites."""
        # Over lists: one launch a bucket, and 1.75 times the bandwidth of Tensor.copy_ (bench/NOTES.md).
        first = [name for name in bucket.arrived if name not in bucket.started]
        more = [name for name in bucket.arrived if name in bucket.started]
        if first:
            torch._foreach_copy_([self.gradient(n) for n in first], [bucket.arrived[n] for n in first])
        if more:
            torch._foreach_add_([self.gradient(n) for n in more], [bucket.arrived[n] for n in more])
        bucket.started.update(first)
        bucket.arrived.clear()

    def _reduce(self, bucket: Bucket) -> None:
        if self.world_size > 1:
            bucket.reduction = dist.all_reduce(bucket.grad, async_op=True)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over micro-batches and processes; a parameter without one has zero."""
        for bucket in self.buckets[self._reduced :]:  # those with a parameter that the last micro-batch did not use
            self._collect(bucket)
            for name in set(bucket.names) - bucket.started:
                self.gradient(name).zero_()
            self._reduce(bucket)
        for bucket in self.buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
                bucket.reduction = None
            bucket.master.grad = bucket.grad

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients, a float32 scalar on the device."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(b.grad) for b in self.buckets]))

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the master weights, rounded to the compute dtype; the optimizer does so in its own pass."""
        for bucket in self.buckets:
            if bucket.has_copy:
                bucket.compute.copy_(bucket.master)

    @torch.no_grad()
    def share(self) -> None:
        """Give every process the master weights of the first one, so that replicas begin with the same bits."""
        if self.world_size > 1:
            for bucket in self.buckets:
                dist.broadcast(bucket.master.data, 0)
        self.publish()

    @property
    def numel(self) -> int:
        """Parameters of the model, a tied one counted once."""
        return sum(place.shape.numel() for place in self.places.values())

    def gradients(self) -> Iterator[Tensor]:
        """The float32 gradient buffers, with zeros in the gaps."""
        return (bucket.grad for bucket in self.buckets)

    def gradient(self, name: str) -> Tensor:
        """float32 gradient of a parameter, in its shape."""
        place = self.places[name]
        return place.view(place.bucket.grad)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 master weight of each parameter, in its shape."""
        for name, place in self.places.items():
            yield name, place.view(place.bucket.master.data)

    def optimizer_views(self, optimizer: torch.optim.Optimizer, key: str) -> Iterator[tuple[str, Tensor]]:
        """Name and `optimizer.state[...][key]` of each parameter, in its shape."""
        for name, place in self.places.items():
            yield name, place.view(optimizer.state[place.bucket.master][key])


def _split_by_size(parameters: dict[str, nn.Parameter], numel: int) -> Iterator[list[str]]:
    """Names in the order in which backward reaches them (last layer first), in runs of about `numel` elements."""
    names: list[str] = []
    size = 0
    for name in reversed(parameters):
        names.append(name)
        size += parameters[name].numel()
        if size >= numel:
            yield names
            names, size = [], 0
    if names:
        yield names
