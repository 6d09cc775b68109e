"""Collectives between the GPUs of one host by their copy engines, which leave the multiprocessors to the model.

NCCL's kernels move data with multiprocessors, which the matrix products that run at the same time then lack. Here every
rank has mapped the memory of all other ranks (`gptperf.distributed.peer_memory`) and pulls what it needs by copy
engine. For a sum, a rank pulls its shard of every other rank's buffer and adds the shards up in rank order, in float32,
in one pass. This pass is the only kernel, and its result does not depend on which rank runs it.

Streams. Reductions run on one stream and gathers on another, each in the order of the calls. Each call begins after
everything that the current stream has enqueued. Later, `Pending.wait` makes the current stream wait for an event
(`_Mark`) that was recorded after the collective.

Barriers. A rank pulls from memory that another rank writes, so writing and reading must be kept apart. A barrier is
enqueued on a stream; the stream continues when the same stream of every rank has reached the barrier. The host never
waits. This table says which barrier stands between the writes to a buffer and the pulls from it:

    buffer                 written by its own rank                 barrier      pulled by the others
    gradient, borrowed     backward, `_fill`                       `_sum`       `_sum`
    sum in `all_reduce`    `_sum`, each rank its shard             `all_reduce` `all_reduce`, the other shards
    copy of the weights    the optimizer                           `written`    `all_gather`

Before a rank writes to a buffer again, all other ranks must have finished their pulls from it. For gradients and copies
of the weights, the barrier in `finish` ensures this: it comes before the optimizer, which overwrites the copies, and
before the next backward, which overwrites the gradients. For a borrowed buffer, the next barrier of the reducing stream
ensures it, whichever call enqueues that barrier: `_Slot.read` marks it, and `borrow` waits for the mark.
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
"""Number of borrowed buffers. One is filled while two are read, so a rank need not wait for another that is one unit
behind."""


def open_collectives(process: Process, communication: str, reduce_dtype: torch.dtype) -> Collectives:
    """Returns the collectives between the ranks of a job. Collective: every rank must call it.

    Args:
        process: this rank.
        communication: "auto", "process_group" or "copy_engine". "auto" chooses copy engines if they work here.
        reduce_dtype: dtype in which gradients travel through the process group.

    Raises:
        DeviceError: copy engines were asked for and do not work here.
    """
    where = process.world_size, process.rank, process.device, reduce_dtype
    if process.world_size == 1 or communication == "process_group":
        return Collectives(*where)
    proven: list[CopyEngine] = []
    trial = _Trial(process, reduce_dtype)
    # All ranks agree after each attempt. If an attempt fails on one rank, no rank begins the next one, in which the
    # others would wait for that rank.
    for attempt in (lambda: _check(process), trial.allocate, trial.share, lambda: proven.append(trial.run())):
        found = process.merged(_failure(attempt))
        if found and communication == "copy_engine":
            raise DeviceError(f"communication = 'copy_engine': {found['missing']}; nearest: --communication=auto")
        if found:
            return Collectives(*where, reason=found["missing"])
    return proven[0]


def _failure(attempt: Callable[[], object]) -> dict[str, str]:
    """Runs an attempt. Returns why it failed under "missing", or nothing if it succeeded."""
    try:
        attempt()
    # PyTorch's private interface may have changed, the driver may lack functions, or the machine may have no compiler
    # for Triton.
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, OSError, CalledProcessError) as error:
        return {"missing": f"{type(error).__name__}: {error}".partition("\n")[0].removeprefix("RuntimeError: ")}
    return {}


class _Trial:
    """Sets up copy engines and tests them, in steps. Each step may fail on a single rank."""

    _NUMEL = 1 << 16

    def __init__(self, process: Process, reduce_dtype: torch.dtype):
        self.process, self.reduce_dtype = process, reduce_dtype
        self.region = torch.empty(0)

    def allocate(self) -> None:
        """Allocates memory and compiles the kernel. A rank needs no other rank for this."""
        self.memory = SymmetricMemory(self.process)
        self.sum_shares = importlib.import_module("gptperf.kernels.sum_shares").sum_shares
        self.region = self.memory.allocate(self._NUMEL, torch.float32)
        x = torch.zeros(64, device=self.process.device)
        self.sum_shares(x, x, torch.zeros(1, 64, device=self.process.device), 0, True)  # compiles it

    def share(self) -> None:
        """Maps the memory of the other ranks."""
        self.memory.share(self.region)

    def run(self) -> "CopyEngine":
        """Returns the collectives, after reductions whose results are known.

        Raises:
            RuntimeError: a reduction gave a wrong result.
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
    """Checks that this rank has what copy engines need.

    Raises:
        RuntimeError: something is missing.
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
    """A stream for one kind of communication. On a CPU there are no streams, and each operation runs at its call."""

    def __init__(self, device: torch.device):
        # High priority: the kernel of a sum must get multiprocessors even while blocks of a matrix product wait for
        # them.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """Makes this the current stream in the body, which begins after everything enqueued on the stream before it."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    @staticmethod
    def pull(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copies (target, source) pairs one after another: in parallel they take 1.3 to 1.6 times as long on H200s."""
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def mark(self) -> "_Mark":
        """Returns an event after everything that this stream has enqueued so far."""
        return _Mark(self.stream)


class _Mark:
    """An event: a position in a stream, for which another stream can wait."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self._event = None if stream is None else stream.record_event()

    def wait(self) -> None:
        """Makes the current stream wait for the event."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(eq=False)
class _Slot:
    """A borrowed buffer."""

    memory: Tensor
    read: _Mark | None = None
    """Event after which every rank has read the buffer; None if no reduction has used it yet."""


class CopyEngine(Collectives):
    """`Collectives` that pull. Buffers that do not come from `zeros` or `borrow` go through the process group.

    Gradients travel in their own dtype and are added up in float32, whatever `reduce_dtype` is.

    Args:
        world_size, rank, device, reduce_dtype: see `Collectives`.
        memory: memory that all ranks have mapped.
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
        # Each rank pulls first from the rank after it, so that no GPU serves all others at once.
        self.others = [(rank + i) % world_size for i in range(1, world_size)]
        self._reducing, self._gathering = _Lane(device), _Lane(device)
        self._free: dict[torch.dtype, Tensor] = {}  # reserved memory that `zeros` has not returned yet
        self._slots: list[_Slot] = []  # in the order in which they were borrowed, the latest at the end
        self._being_read: list[_Slot] = []  # those that other ranks may have pulled from since the last barrier
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
        self._slots.append(slot := self._slots.pop(0))  # the one that was borrowed longest ago
        assert slot not in self._being_read, "borrowed again without a barrier since its last reduction"
        assert slot.memory.dtype == dtype
        if slot.read is not None:
            slot.read.wait()  # the caller fills it on the current stream, after every rank has pulled its old contents
        return slot.memory[:numel]

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def all_reduce(self, flat: Tensor, source: Tensor | None = None) -> Pending:
        if source is None and not self.memory.holds(flat):
            return super().all_reduce(flat)
        own = self.own(flat)
        with self._reducing.after_current():
            # `_sum` overwrites only this rank's shard of `flat`, which no other rank pulls before the barrier below.
            self._sum(own, flat if source is None else source, add=False)
            # After this barrier every rank has written the sum of its shard to `flat`. It has also pulled its shard
            # from this rank's `flat`, so the pulls below may overwrite the other shards there.
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
        """Adds up this rank's shard of the buffers of all ranks. The current stream must be the reducing stream."""
        # After this barrier every rank has filled its buffer, because its reducing stream waited for its current stream
        # (`after_current`) before it reached the barrier.
        self._barrier()
        if self._slots and whole.data_ptr() == self._slots[-1].memory.data_ptr():
            self._being_read.append(self._slots[-1])
        own, numel = self.own(whole), out.numel()
        # Rows are in rank order without this rank, whatever the order of the pulls, so the sum is in rank order too.
        pulled = self._room((self.world_size - 1) * numel, whole.dtype).view(-1, numel)
        self._reducing.pull((pulled[rank - (rank > self.rank)], self.memory.peer(own, rank)) for rank in self.others)
        self.sum_shares(out, own, pulled, self.rank, add)

    def _room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns memory for the pulled shards. All its uses are on the reducing stream, so they never overlap."""
        if self._pulled.nbytes < numel * dtype.itemsize:
            self.buffer_bytes += numel * dtype.itemsize - self._pulled.nbytes
            self._pulled = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device=self.device)
        return self._pulled[: numel * dtype.itemsize].view(dtype)

    def _barrier(self) -> None:
        """Enqueues a barrier on the reducing stream. After it, all earlier pulls of every rank are done.

        The pulls of a rank are on the same stream as its barriers, so a rank reaches a barrier after its earlier pulls.
        """
        self.memory.barrier(_REDUCING)
        for slot in self._being_read:
            slot.read = self._reducing.mark()
        self._being_read.clear()

    def all_gather(self, whole: Tensor, own: Tensor) -> Pending:
        if not self.memory.holds(own):
            return super().all_gather(whole, own)
        here = self.own(whole)
        # If `own` lies in `whole`, the ranks pull from each other's `whole`. A rank writes only the other ranks' shards
        # there and the others pull only its own shard, so no rank overwrites what another one pulls.
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
        # The gathering stream waits for the current stream, on which the optimizer has written the shard, and then at
        # the barrier for the gathering streams of all ranks, which have waited likewise. Later gathers follow on the
        # same stream.
        with self._gathering.after_current():
            self.memory.barrier(_GATHERING)

    def finish(self) -> None:
        with self._reducing.after_current():
            # The reducing stream first waits for the gathers of this rank. So a rank that has reached the barrier has
            # done its pulls on both streams.
            if self._gathering.stream is not None:
                self._gathering.mark().wait()
            self._barrier()
        self._reducing.mark().wait()
