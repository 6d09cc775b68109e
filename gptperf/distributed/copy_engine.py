"""Sums and gathers between the GPUs of one host by their copy engines, which leave the multiprocessors to the model.

NCCL's kernels move data with the multiprocessors, which the matrix products beside them then lack. Here every
process pulls what it needs from the memory of the others, which all have mapped; of a sum it pulls its share of each
and adds them up in the order of the ranks, in float32, in one pass. Between two barriers of the processes, enqueued
like everything else, nobody writes what another one reads.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from subprocess import CalledProcessError

import torch
from torch import Tensor

from gptperf.distributed.collectives import Collectives, Pending
from gptperf.distributed.peer_memory import CHANNELS, PeerMemory, SymmetricMemory
from gptperf.distributed.process import Process
from gptperf.errors import DeviceError

__all__ = ["CopyEngine", "open_collectives"]

_REDUCING, _GATHERING = range(CHANNELS)
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
    proven: list[CopyEngine] = []
    trial = _Trial(process, reduce_dtype)
    # Together: where one process cannot do one of them, none of the others begins the next and waits for it.
    for attempt in (lambda: _check(process), trial.allocate, trial.share, lambda: proven.append(trial.run())):
        found = process.merged(_failure(attempt))
        if found and communication == "copy_engine":
            raise DeviceError(f"communication = 'copy_engine': {found['missing']}; nearest: 'auto'")
        if found:
            return Collectives(*where, reason=found["missing"])
    return proven[0]


def _failure(attempt: Callable[[], object]) -> dict[str, str]:
    try:
        attempt()
    # PyTorch's interface may change, a driver may lack functions, a machine what Triton compiles with.
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, OSError, CalledProcessError) as error:
        return {"missing": f"{type(error).__name__}: {error}".partition("\n")[0].removeprefix("RuntimeError: ")}
    return {}


class _Trial:
    """The way to copy engines in steps that can each fail in one process alone."""

    _NUMEL = 1 << 16

    def __init__(self, process: Process, reduce_dtype: torch.dtype):
        self.process, self.reduce_dtype = process, reduce_dtype
        self.region = torch.empty(0)

    def allocate(self) -> None:
        """What can be had without the others."""
        self.memory = SymmetricMemory(self.process)
        self.sum_shares = importlib.import_module("gptperf.kernels.sum_shares").sum_shares
        self.region = self.memory.allocate(self._NUMEL, torch.float32)
        x = torch.zeros(64, device=self.process.device)
        self.sum_shares(x, x, torch.zeros(1, 64, device=self.process.device), 0, True)  # it compiles

    def share(self) -> None:
        """Map the others' memory."""
        self.memory.share(self.region)

    def run(self) -> "CopyEngine":
        """Sum and gather what is known.

        Raises:
            RuntimeError: the result is wrong.
        """
        n, rank, device = self.process.world_size, self.process.rank, self.process.device
        engine = CopyEngine(n, rank, device, self.reduce_dtype, self.memory, self.sum_shares)
        flat = self.region[: self._NUMEL // n * n]
        flat.copy_(torch.arange(len(flat), device=device) % 1000 + rank)
        wanted = torch.arange(len(flat), device=device) % 1000 * n + n * (n - 1) // 2
        engine.all_reduce(flat).wait()
        engine.finish()
        own = engine.own(flat).clone()
        engine.reduce_scatter(own, flat, add=True).wait()
        right = [torch.equal(flat, wanted.float()), torch.equal(own, engine.own(wanted).float() * (n + 1))]
        engine.finish()
        if not all(right):
            raise RuntimeError("sums over the GPUs' memories are wrong here")
        self.memory.forget()
        return engine


def _check(process: Process) -> None:
    """See that this process has what copy engines need.

    Raises:
        RuntimeError: it lacks something.
    """
    if process.device.type != "cuda":
        raise RuntimeError("there is no GPU")
    here = os.environ.get("LOCAL_WORLD_SIZE", "an unknown number")
    if here != str(process.world_size):
        raise RuntimeError(f"{here} of {process.world_size} processes are on this host")
    others = [i for i in range(process.world_size) if i != process.device.index]
    if not all(torch.cuda.can_device_access_peer(process.device.index, other) for other in others):
        raise RuntimeError(f"GPU {process.device.index} cannot read the memory of every other one")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")


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
        with torch.cuda.stream(self.stream):
            yield

    @staticmethod
    def pull(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy (target, source), one after the other: side by side takes 1.3 to 1.6 times as long on H200s."""
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def mark(self) -> "_Mark":
        """What has been enqueued so far."""
        return _Mark(self.stream)


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

    Gradients travel in their own dtype and are added up in float32, whatever `reduce_dtype` is.

    Args:
        world_size, rank, device, reduce_dtype: as there.
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
        assert numel <= len(free), "more than was reserved"
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
        return dtype

    def all_reduce(self, flat: Tensor, source: Tensor | None = None) -> Pending:
        if source is None and not self.memory.holds(flat):
            return super().all_reduce(flat)
        own = self.own(flat)
        with self._reducing.after_current():
            self._sum(own, flat if source is None else source, add=False)
            self._barrier()
            shares = [self.own(flat, rank) for rank in self.others]
            self._reducing.pull((x, self.memory.peer(x, rank)) for rank, x in zip(self.others, shares, strict=True))
        return self._reducing.mark()

    def reduce_scatter(self, own: Tensor, whole: Tensor, *, add: bool = False) -> Pending:
        if not self.memory.holds(whole):
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
