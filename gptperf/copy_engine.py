"""Sums and gathers between the GPUs of one host by their copy engines, which leave the multiprocessors to the model.

NCCL's kernels move data with the multiprocessors, and a matrix product beside them takes a wave more. Here every
process pulls what it needs from the memory of the others, which all have mapped; of a sum it pulls its share of each
and adds them up in the order of the ranks, in float32, in one pass. Between two barriers of the processes, enqueued
like everything else, nobody writes what another one reads.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gptperf.collectives import Collectives, Pending
from gptperf.errors import DeviceError
from gptperf.parallel import Process

__all__ = ["CopyEngine", "PeerMemory", "SymmetricMemory", "open_collectives"]

_REDUCING, _GATHERING = 0, 1
"""Channels of barriers."""
_SLOTS = 3
"""Borrowed buffers: one is filled while two are read, so that no process waits for one that is a unit behind."""


def open_collectives(process: Process, communication: str, reduce_dtype: torch.dtype) -> Collectives:
    """How the processes of a job talk to each other; every one of them has to ask.

    Args:
        process: this one.
        communication: "auto", "process_group" or "copy_engine".
        reduce_dtype: in which gradients travel.

    Raises:
        DeviceError: copy engines were asked for and cannot be used here.
    """
    where = process.world_size, process.rank, process.device, reduce_dtype
    if process.world_size == 1 or communication == "process_group":
        return Collectives(*where)
    missing = _missing(process)
    found = process.merged({"missing": missing} if missing else {})
    if not found:
        try:
            memory = SymmetricMemory(process.device)
        except (RuntimeError, ImportError, AttributeError) as error:  # its interface may change
            missing = f"PyTorch's symmetric memory: {str(error).partition(chr(10))[0]}"
        found = process.merged({"missing": missing} if missing else {})
    if not found:
        sum_shares = importlib.import_module("gptperf.kernels.sum_shares").sum_shares
        return CopyEngine(*where, memory, sum_shares)
    if communication == "copy_engine":
        raise DeviceError(f"communication = 'copy_engine': {found['missing']}; nearest: 'auto'")
    return Collectives(*where, reason=found["missing"])


def _missing(process: Process) -> str:
    """What this process lacks for copy engines."""
    if process.device.type != "cuda":
        return "there is no GPU"
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if here != str(process.world_size):
        return f"{here} of {process.world_size} processes are on this host"
    others = [i for i in range(process.world_size) if i != process.device.index]
    if not all(torch.cuda.can_device_access_peer(process.device.index, other) for other in others):
        return f"GPU {process.device.index} cannot read the memory of every other one"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


class PeerMemory(Protocol):
    """Memory that every process can read."""

    uncounted_bytes: int
    """Of GPU memory, that PyTorch's account of allocated memory does not have."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A region; every process asks for the same one."""

    def holds(self, flat: Tensor) -> bool:
        """Whether a buffer lies in a region."""

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        """What lies in the same place of another process's memory."""

    def barrier(self, channel: int) -> None:
        """Let the current stream wait for that of every process."""


class SymmetricMemory:
    """Of the GPUs of one host, through PyTorch.

    Args:
        device: of this process.

    Raises:
        RuntimeError: the GPUs cannot read each other's memory, or do not read what is there.
    """

    def __init__(self, device: torch.device):
        # Not used here, and a mapping that some hosts do not survive.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.device = device
        self.uncounted_bytes = 0
        """Not in PyTorch's account of allocated memory."""
        self._regions: list[tuple[Tensor, Any]] = []
        self._signals = self._open(dist.get_world_size(), torch.float32)[1]
        self.zeros(1 << 20, torch.float32)  # which proves that it works
        self._regions.pop()

    def _open(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
        from torch.distributed import _symmetric_memory as symmetric

        before = torch.cuda.memory_allocated(self.device)
        region = symmetric.empty(numel, dtype=dtype, device=self.device)
        handle = symmetric.rendezvous(region, dist.group.WORLD)  # type: ignore[arg-type]
        self.uncounted_bytes += max(0, region.nbytes - (torch.cuda.memory_allocated(self.device) - before))
        return region, handle

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        region, _ = self._open(numel, dtype)
        self._regions.append((region, _))
        marked = region.view(torch.int32) if region.nbytes % 4 == 0 else region
        marked[0], marked[-1] = dist.get_rank() + 1, -dist.get_rank() - 1
        self.barrier(_REDUCING)
        for rank in range(dist.get_world_size()):
            seen = self.peer(region, rank).view(marked.dtype)
            if [seen[0].item(), seen[-1].item()] != [rank + 1, -rank - 1]:
                raise RuntimeError(f"the memory of process {rank} reads {seen[0].item()}, not {rank + 1}")
        self.barrier(_REDUCING)
        return region.zero_()

    def _find(self, flat: Tensor) -> tuple[int, Any] | None:
        for region, handle in self._regions:
            offset = flat.data_ptr() - region.data_ptr()
            if 0 <= offset < region.nbytes:
                return offset // flat.element_size(), handle
        return None

    def holds(self, flat: Tensor) -> bool:
        return self._find(flat) is not None

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        found = self._find(flat)
        assert found is not None, "not in memory that the others can read"
        offset, handle = found
        return handle.get_buffer(rank, flat.shape, flat.dtype, offset)

    def barrier(self, channel: int) -> None:
        self._signals.barrier(channel)


class _Lane:
    """A stream for one kind of communication, with one a peer for the copies; on a CPU all is done at once.

    Args:
        device: of the process.
        copiers: streams for copies.
    """

    def __init__(self, device: torch.device, copiers: int):
        # Of high priority: a barrier has to find a place among the programs of a matrix product.
        make: Callable[[], torch.cuda.Stream | None] = lambda: (  # noqa: E731
            torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        )
        self.stream, self._copiers = make(), [make() for _ in range(copiers)]

    @contextmanager
    def after_current(self) -> Iterator[None]:
        """In the body this is the current stream, after what has been enqueued so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with _on(self.stream):
            yield

    def pull(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy (target, source), side by side."""
        begun = self.mark()
        done = []
        for copier, (target, source) in zip(self._copiers, pairs, strict=True):
            with _on(copier):
                begun.wait()
                target.copy_(source, non_blocking=True)
                done.append(_Mark(copier))
        for mark in done:
            mark.wait()

    def mark(self) -> "_Mark":
        """What has been enqueued so far."""
        return _Mark(self.stream)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream)


class _Mark:
    """A place in a stream."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self._event = None if stream is None else stream.record_event()

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(eq=False)
class _Slot:
    """A borrowed buffer."""

    memory: Tensor
    read: _Mark | None = None
    """After which every process has read it."""


class CopyEngine(Collectives):
    """`Collectives` by pulling. What does not lie in `zeros` or `borrow` goes through the process group.

    Args:
        world_size, rank, device, reduce_dtype: as there; sums are taken in float32 whatever travels.
        memory: that the processes share.
        sum_shares: `gptperf.kernels.sum_shares.sum_shares` or its reference.
    """

    name = "copy_engine"
    in_flight = _SLOTS - 1

    def __init__(
        self,
        world_size: int,
        rank: int,
        device: torch.device,
        reduce_dtype: torch.dtype,
        memory: PeerMemory,
        sum_shares: Callable[[Tensor, Tensor, Tensor, int, bool], None],
    ):
        super().__init__(world_size, rank, device, reduce_dtype)
        self.memory, self.sum_shares = memory, sum_shares
        # Each begins with another peer, so that no GPU serves all others at once.
        self.others = [(rank + i) % world_size for i in range(1, world_size)]
        self._reducing, self._gathering = (_Lane(device, len(self.others)) for _ in range(2))
        self._free: dict[torch.dtype, Tensor] = {}
        self._slots: list[_Slot] = []
        self._being_read: list[_Slot] = []
        self._pulled = torch.empty(0, device=device)

    @property
    def uncounted_bytes(self) -> int:  # type: ignore[override]
        return self.memory.uncounted_bytes

    def reserve(self, numel: dict[torch.dtype, int], borrowed: int, borrowed_dtype: torch.dtype) -> None:
        self._free = {dtype: self.memory.zeros(count, dtype) for dtype, count in numel.items() if count}
        if borrowed:
            ring = self.memory.zeros(_SLOTS * borrowed, borrowed_dtype)
            self._slots = [_Slot(part) for part in ring.chunk(_SLOTS)]
            self.buffer_bytes += ring.nbytes

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        free = self._free[dtype]
        self._free[dtype] = free[numel:]
        return free[:numel]

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._slots.append(slot := self._slots.pop(0))
        assert slot not in self._being_read, "borrowed again before it was summed"
        assert slot.memory.dtype == dtype
        if slot.read is not None:
            slot.read.wait()
        return slot.memory[:numel]

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The gradients' own, if it is not wider: it is added up in float32 either way."""
        return dtype if dtype.itemsize <= self.reduce_dtype.itemsize else self.reduce_dtype

    def all_reduce(self, flat: Tensor) -> Pending:
        if flat.dtype != self.reduce_dtype or not self.memory.holds(flat):
            return super().all_reduce(flat)
        own = self.own(flat)
        with self._reducing.after_current():
            self._sum(own, flat, add=False)
            self._barrier()
            shares = [self.own(flat, rank) for rank in self.others]
            self._reducing.pull((x, self.memory.peer(x, rank)) for rank, x in zip(self.others, shares, strict=True))
        return self._reducing.mark()

    def reduce_scatter(self, own: Tensor, whole: Tensor, *, add: bool = False) -> Pending:
        if whole.dtype != self.wire_dtype(whole.dtype) or not self.memory.holds(whole):
            return super().reduce_scatter(own, whole, add=add)
        with self._reducing.after_current():
            self._sum(own, whole, add=add)
        return self._reducing.mark()

    def _sum(self, out: Tensor, whole: Tensor, *, add: bool) -> None:
        """Add up this process's share of what all have."""
        self._barrier()
        if self._slots and whole.data_ptr() == self._slots[-1].memory.data_ptr():
            self._being_read.append(self._slots[-1])
        own, numel = self.own(whole), out.numel()
        pulled = self._room((self.world_size - 1) * numel, whole.dtype).view(-1, numel)
        self._reducing.pull((pulled[rank - (rank > self.rank)], self.memory.peer(own, rank)) for rank in self.others)
        self.sum_shares(out, own, pulled, self.rank, add)

    def _room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for what is pulled, of the reducing stream."""
        if self._pulled.nbytes < numel * dtype.itemsize:
            self.buffer_bytes += numel * dtype.itemsize - self._pulled.nbytes
            self._pulled = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device=self.device)
        return self._pulled[: numel * dtype.itemsize].view(dtype)

    def _barrier(self) -> None:
        """Of the reducing stream: after it every process has read what it pulled before."""
        self.memory.barrier(_REDUCING)
        for slot in self._being_read:
            slot.read = self._reducing.mark()
        self._being_read.clear()

    def all_gather(self, whole: Tensor, own: Tensor) -> Pending:
        if not self.memory.holds(own):
            return super().all_gather(whole, own)
        here = self.own(whole)
        inside = here.data_ptr() == own.data_ptr()
        with self._gathering.after_current():
            self.memory.barrier(_GATHERING)
            if not inside:
                here.copy_(own, non_blocking=True)
            targets = [self.own(whole, rank) for rank in self.others]
            self._gathering.pull(
                (x, self.memory.peer(x if inside else own, rank)) for rank, x in zip(self.others, targets, strict=True)
            )
        return self._gathering.mark()

    def finish(self) -> None:
        with self._reducing.after_current():
            if self._gathering.stream is not None:
                self._gathering.mark().wait()
            self._barrier()
        self._reducing.mark().wait()
