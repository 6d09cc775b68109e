"""Sums and gathers between the GPUs of one host by their copy engines, which leave the multiprocessors to the model.

NCCL's kernels move data with the multiprocessors, and a matrix product beside them takes a wave more. Here every
process pulls what it needs from the memory of the others, which all have mapped; of a sum it pulls its share of each
and adds them up in the order of the ranks, in float32, in one pass. Between two barriers of the processes, enqueued
like everything else, nobody writes what another one reads.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
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
_CHANNELS = 2
_PORTABLE, _MAPPED = 1, 2  # of cudaHostRegister
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
    memory: list[SymmetricMemory] = []
    tries = (
        lambda: _check(process),
        lambda: memory.append(SymmetricMemory(process)),
        lambda: memory[0].prove(),
    )
    for attempt in tries:  # together: where one process cannot, none of the others may wait for it
        found = process.merged(_failure(attempt))
        if found and communication == "copy_engine":
            raise DeviceError(f"communication = 'copy_engine': {found['missing']}; nearest: 'auto'")
        if found:
            return Collectives(*where, reason=found["missing"])
    return CopyEngine(*where, memory[0], importlib.import_module("gptperf.kernels.sum_shares").sum_shares)


def _failure(attempt: Callable[[], object]) -> dict[str, str]:
    try:
        attempt()
    except (RuntimeError, ImportError, AttributeError) as error:  # PyTorch's interface may change
        return {"missing": str(error).partition("\n")[0]}
    return {}


def _check(process: Process) -> None:
    """See that this process has what copy engines need.

    Raises:
        RuntimeError: it lacks something.
    """
    if process.device.type != "cuda":
        raise RuntimeError("there is no GPU")
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if here != str(process.world_size):
        raise RuntimeError(f"{here} of {process.world_size} processes are on this host")
    others = [i for i in range(process.world_size) if i != process.device.index]
    if not all(torch.cuda.can_device_access_peer(process.device.index, other) for other in others):
        raise RuntimeError(f"GPU {process.device.index} cannot read the memory of every other one")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")


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
    """Of the GPUs of one host, through PyTorch (`torch.distributed._symmetric_memory`).

    Args:
        process: this one.

    Raises:
        RuntimeError: PyTorch or the driver cannot do what is needed.
    """

    def __init__(self, process: Process):
        # Not used here, and a mapping that some hosts do not survive.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.device, self.rank, self.world_size = process.device, process.rank, process.world_size
        self.uncounted_bytes = 0
        self._regions: list[tuple[Tensor, Any]] = []
        self._flags = _Flags(process)

    def prove(self) -> None:
        """See that the others' memory reads what they wrote.

        Raises:
            RuntimeError: it does not.
        """
        self._flags.forget_path()
        self.zeros(1 << 20, torch.float32)
        self._regions.pop()

    def _open(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
        from torch.distributed import _symmetric_memory as symmetric

        before = torch.cuda.memory_allocated(self.device)
        region = symmetric.empty(numel, dtype=dtype, device=self.device)
        region.zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(region, dist.group.WORLD)  # type: ignore[arg-type]
        self.uncounted_bytes += max(0, region.nbytes - (torch.cuda.memory_allocated(self.device) - before))
        return region, handle

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        region, handle = self._open(numel, dtype)
        self._regions.append((region, handle))
        marked = region.view(torch.int32) if region.nbytes % 4 == 0 else region
        marked[0], marked[-1] = self.rank + 1, -self.rank - 1
        self.barrier(_REDUCING)
        for rank in range(self.world_size):
            seen = self.peer(region, rank).view(marked.dtype)
            if [seen[0].item(), seen[-1].item()] != [rank + 1, -rank - 1]:
                raise RuntimeError(f"the memory of process {rank} reads {seen[0].item()}, not {rank + 1}")
        self.barrier(_REDUCING)
        marked[0] = marked[-1] = 0
        return region

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
        self._flags.arrive(channel)


class _Flags:
    """Counters by which streams of several GPUs wait for each other, without a kernel.

    PyTorch's own barrier is a kernel that spins. It takes the place of a matrix product's program on a multiprocessor
    until the last process comes; that product then takes another wave. The driver has the stream itself write to
    memory, and wait until memory has a value: of the host, since another GPU's it refuses.

    Args:
        process: this one.

    Raises:
        RuntimeError: the driver refuses.
    """

    _SPACING = 32  # int32 between two counters: a cache line each

    def __init__(self, process: Process):
        self.process, self._counts = process, [0] * _CHANNELS
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        numel = _CHANNELS * process.world_size * self._SPACING
        path = ""  # which nobody can map, if there is no room
        with contextlib.suppress(OSError):
            if process.is_main:
                handle, path = tempfile.mkstemp(prefix="gptperf-", dir=folder)
                os.truncate(handle, 4 * numel)
                os.close(handle)
        self._path = process.from_main(path)
        self._counters = torch.from_file(self._path, shared=True, size=numel, dtype=torch.int32)
        self._at = self._counters.data_ptr()
        if int(torch.cuda.cudart().cudaHostRegister(self._at, 4 * numel, _PORTABLE | _MAPPED)):
            raise RuntimeError("the driver does not map memory of the host")
        weakref.finalize(self, _unmap, self._counters)
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"the driver has no stream memory operations: {error}") from error
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._enqueue(self._write, _CHANNELS - 1, process.rank, 0)
        self._enqueue(self._wait, _CHANNELS - 1, process.rank, 0)
        torch.cuda.synchronize()

    def forget_path(self) -> None:
        """Take the file's name away, once every process has mapped it."""
        if self.process.is_main:
            os.unlink(self._path)

    def arrive(self, channel: int) -> None:
        """Tell the others, and let the current stream wait for all of them."""
        self._counts[channel] = count = (self._counts[channel] + 1) % (1 << 32)
        self._enqueue(self._write, channel, self.process.rank, count)  # after all that the stream has done before
        for rank in range(self.process.world_size):
            if rank != self.process.rank:
                self._enqueue(self._wait, channel, rank, count)  # for that or more, modulo 2^32

    def _enqueue(self, function: Any, channel: int, rank: int, count: int) -> None:
        at = self._at + 4 * self._SPACING * (channel * self.process.world_size + rank)
        code = function(torch.cuda.current_stream().cuda_stream, at, count, 0)
        if code:
            raise RuntimeError(f"the driver's stream memory operations: error {code}")


def _unmap(counters: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(counters.data_ptr())


class _Lane:
    """A stream for one kind of communication; on a CPU all is done at once."""

    def __init__(self, device: torch.device):
        # Of high priority: a sum has to find a place among the programs of a matrix product.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """In the body this is the current stream, after what has been enqueued so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with _on(self.stream):
            yield

    def pull(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy (target, source), one after the other: side by side takes 1.6 times as long on H200s."""
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def mark(self) -> "_Mark":
        """What has been enqueued so far."""
        return _Mark(self.stream)


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
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
    widens = True

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
        self._reducing, self._gathering = _Lane(device), _Lane(device)
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

    def all_reduce(self, flat: Tensor, source: Tensor | None = None) -> Pending:
        if source is None and (flat.dtype != self.reduce_dtype or not self.memory.holds(flat)):
            return super().all_reduce(flat)
        own = self.own(flat)
        with self._reducing.after_current():
            self._sum(own, flat if source is None else source, add=False)
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
            if not inside:
                here.copy_(own, non_blocking=True)
            targets = [self.own(whole, rank) for rank in self.others]
            self._gathering.pull(
                (x, self.memory.peer(x if inside else own, rank)) for rank, x in zip(self.others, targets, strict=True)
            )
        return self._gathering.mark()

    def written(self) -> None:
        with self._gathering.after_current():
            self.memory.barrier(_GATHERING)

    def finish(self) -> None:
        with self._reducing.after_current():
            if self._gathering.stream is not None:
                self._gathering.mark().wait()
            self._barrier()
        self._reducing.mark().wait()
