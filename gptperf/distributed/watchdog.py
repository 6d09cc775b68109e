"""Ends this rank when another rank of the job failed, died or hangs, even while this one is blocked in a collective.

Each rank has a `Watchdog` with two threads. Twice a second the first thread publishes where the rank is, in the store
of the process group, and reads where the others are. The second thread judges what was read
(`gptperf.distributed.judge`). When a rank is at fault, the second thread ends this process, whatever the main thread
does. On each host, the first rank that does so prints a line that names the rank at fault; without the store, every
rank prints it. There are two threads because the first one may block in the store when the store's host is gone.

An error of the main thread is handled by `Watchdog.__exit__`, which prints it, publishes it and exits with its code.
`_ending` is a lock that is never released. The thread that acquires it, main or judging, ends the process, so only one
of them prints.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from gptperf.distributed.judge import BEAT_S, GRACE_S, LOST_S, Beat, Fault, Judge, State, View
from gptperf.distributed.progress import Progress
from gptperf.errors import CheckpointError, ConfigError, DataError, GptperfError, PeerError, report

__all__ = ["Watchdog", "process_state"]

_FAILED = "failed: "
_MISTAKES = {f" {_FAILED}E{kind.exit_code}: ": kind for kind in (ConfigError, DataError, CheckpointError)}
_RELAYED = re.compile(r"(?<=: )rank \d+: ")  # an error that a rank raised because another one has it


def process_state(pid: int, started: str | None = None) -> State:
    """Returns the state of a process on this host.

    Args:
        pid: process id.
        started: its start time, field 22 of /proc/PID/stat. If it differs, the process is a later one with the same id.

    Returns:
        The state; a zombie and a process that is writing its core file are "gone".
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    if started not in (None, fields[19]) or fields[0] in "ZX" or "CoreDumping:\t1" in status:
        return "gone"
    return "stopped" if fields[0] == "T" else "alive"


def _identity() -> tuple[int, str, str, str]:
    """Returns process id, start time and host, and a name of the space in which the process id is unique.

    Hosts may have the same name, and containers on one host have process ids of their own. The boot id and the
    namespace of process ids distinguish them.
    """
    host, pid = socket.gethostname(), os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return pid, started, host, f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return pid, "", host, f"{host} {pid}"


def _fault_of(published: bytes) -> Fault:
    """Returns the fault that a rank has published."""
    ranks, text, hang, gone = json.loads(published)
    return Fault(tuple(ranks), text, hang, gone)


def _kind(fault: Fault) -> type[GptperfError]:
    """Returns the error with which the other ranks end: a mistake of the user that one rank found is the job's."""
    return next((kind for text, kind in _MISTAKES.items() if text in fault.text), PeerError)


class Watchdog:
    """A context manager around everything that a rank of a job does. For a single rank it does nothing.

    An error that leaves the body is printed, published to the other ranks, and turned into the exit code of its kind.

    Args:
        rank: this rank.
        world_size: ranks of the job.
        progress: position of the main thread.
        timeout_s: limit of one collective.
        out_dir: folder for the Python stacks of a process that hangs.
        debug: whether to print stacks on stderr.
        store: where the ranks publish; default: a new connection to the process group's store.
        end: function that ends this process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        progress: Progress,
        *,
        timeout_s: float,
        out_dir: str | Path = ".",
        debug: bool = False,
        store: dist.Store | None = None,
        end: Callable[[int], object] = os._exit,
    ):
        self.rank, self.world_size, self.progress = rank, world_size, progress
        self.out_dir, self.debug, self.end = Path(out_dir), debug, end
        self.judge = Judge(rank, world_size, timeout_s)
        self.view = View()
        self.identity = _identity()
        self._store = store
        self.last_words: Callable[[str], object] = lambda text: None
        """Function that is called with the reason before the judging thread ends this process. The trainer sets it to
        write the reason to the run's log."""
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._keep_beating, self._keep_judging)]

    def __enter__(self) -> "Watchdog":
        if self.world_size > 1:
            if self._store is None:
                self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore("watchdog", self._store)
            # The ranks have just joined the job, so each answers soon. Their first beats say which processes they are.
            # Without them, a death in the first second would look like a slow start.
            for _ in range(50):
                self._exchange()
                if len(self.view.beats) == self.world_size:
                    break
                time.sleep(0.1)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world_size == 1:
            return
        if isinstance(error, Exception) and not isinstance(error, GptperfError):
            broken = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
            if broken or (self.progress.waiting and isinstance(error, RuntimeError)):
                # A collective fails on all ranks when one rank is gone, and the error does not say which. The judge
                # can say it: if another rank is the cause, the judging thread ends this process during this wait.
                time.sleep(LOST_S + 2 * GRACE_S)
            if broken:
                line = str(error).partition("\n")[0]
                found = PeerError(f"no rank is known to be gone, but in {self.progress.where}: {line}")
                found.__cause__, error = error, found
        if error is not None and not self._ending.acquire(blocking=False):
            self._threads[1].join()  # the judging thread is ending the process already
        self._closing.set()
        self._threads[0].join(2 * GRACE_S)
        if error is not None:
            self._report(error)
        elif not self._threads[0].is_alive():
            with contextlib.suppress(RuntimeError):  # the host of the store may have ended before this rank
                self._exchange(done=True)

    def _report(self, error: BaseException) -> None:
        """Prints an error of the main thread, unless another rank has printed the same, then publishes it."""
        assert self._store is not None
        code = error.exit_code if isinstance(error, GptperfError) else 1
        text = f"E{code}: {error}" if isinstance(error, GptperfError) else f"{type(error).__name__}: {error}"
        visible = isinstance(error, Exception) and not isinstance(error, BrokenPipeError)
        self._end_within(LOST_S, code)
        answers = self.judge.store_silent_s <= GRACE_S
        with contextlib.suppress(RuntimeError):
            said = visible and answers and self._store.add("reports", 1) > 1 and self._said(text)
            if visible and not said:
                if self.debug or not isinstance(error, GptperfError):
                    traceback.print_exception(error)
                else:
                    report(error)
                sys.stderr.flush()
            if answers:
                self._publish(Fault((self.rank,), f"rank {self.rank} {_FAILED}{text}"))
        time.sleep(2 * BEAT_S)  # the others read it now: the store may end with this process, if rank 0 hosts it
        self._end_within(GRACE_S, code)  # destroying a broken process group may block
        if visible:
            sys.exit(code)

    def _end_within(self, seconds: float, code: int) -> None:
        """Makes sure that this process ends within some seconds."""
        late = threading.Timer(seconds, self.end, (code,))
        late.daemon = True
        late.start()

    def _said(self, text: str) -> bool:
        """Returns whether the rank that failed first has published the same text."""
        assert self._store is not None
        for _ in range(15):
            if self._store.check(["failed"]):
                said = json.loads(self._store.get("failed"))[1].partition(_FAILED)[2]
                return _RELAYED.sub("", said, 1) == _RELAYED.sub("", text, 1)
            time.sleep(0.1)
        return False

    def _publish(self, fault: Fault) -> Fault:
        """Publishes a fault, unless one is published already: later faults are consequences of the first one.

        Returns:
            The fault that was published first.
        """
        assert self._store is not None
        # This operation of the store is atomic, and writes only if nothing was written before.
        return _fault_of(self._store.compare_set("failed", "", json.dumps(fault)))

    def _exchange(self, *, done: bool = False) -> None:
        """Publishes where this rank is, and reads where the others are."""
        assert self._store is not None
        here, number = self.progress, self.view.number + 1
        beat = Beat(number, here.count, here.where, bool(here.waiting), here.limited, done, *self.identity)
        states = self._states()  # before the beats are read, see `View.states`
        self._store.set(f"beat/{self.rank}", json.dumps(beat))
        known = [r for r in range(self.world_size) if r in self.view.beats or self._store.check([f"beat/{r}"])]
        texts = self._store.multi_get([f"beat/{rank}" for rank in known])
        beats = {rank: Beat(*json.loads(text)) for rank, text in zip(known, texts, strict=True)}
        failed = None
        if self._store.check(["failed"]):
            failed = _fault_of(self._store.get("failed"))
        self.view = View(number, beats, states, failed)

    def _states(self) -> dict[int, State]:
        """Returns the states of the ranks on this host."""
        near = {r: b for r, b in self.view.beats.items() if b.place == self.identity[-1] and r != self.rank}
        return {rank: process_state(beat.pid, beat.started) for rank, beat in near.items()}

    def _keep_beating(self) -> None:
        """Runs the first thread: exchanges beats until the end, or until the store is lost."""
        while not self._closing.wait(BEAT_S):
            try:
                self._exchange()
            except RuntimeError:
                self.view = replace(self.view, lost=True)
                return

    def _keep_judging(self) -> None:
        """Runs the second thread: judges until the end, and ends this process when a rank is at fault."""
        before = time.monotonic()
        while not self._closing.wait(BEAT_S / 2):
            now, view = time.monotonic(), self.view
            # This process may itself have been stopped or starved meanwhile, so a long pause says nothing about the
            # others and counts as a short one.
            seconds = min(now - before, 2 * BEAT_S)
            before = now
            if view.lost or self.judge.store_silent_s > 2 * BEAT_S:
                # The first thread is blocked or has ended, so its states are old. They can be looked up without the
                # store.
                view = replace(view, states=self._states())
                # The parent is torchrun, which may host the store; Ctrl-Z stops it.
                if process_state(os.getppid()) == "stopped":
                    seconds = 0.0
            self.judge.tick(view, seconds)
            fault = self.judge.fault()
            if fault is not None and self._ending.acquire(blocking=False):
                words = threading.Thread(target=self._say, args=(fault,), daemon=True)
                words.start()
                words.join(2 * GRACE_S)  # it is a thread because a full pipe or a dead disk may block it
                if fault.hang:
                    self._kill(fault.ranks)
                self.end(_kind(fault).exit_code)
                return

    def _say(self, fault: Fault) -> None:
        """Publishes, prints and logs a fault before this process ends. One rank of each host prints it."""
        assert self._store is not None
        first = True
        with contextlib.suppress(RuntimeError):
            if not self.view.lost and self.judge.store_silent_s <= 2 * BEAT_S:
                fault = self._publish(fault)
                first = self._store.add(f"said/{self.identity[-1]}", 1) == 1
        line = fault.text.partition("\n")[0]
        if first and not self._is_reported_mistake(fault):
            report(_kind(fault)(f"{line}; rank {self.rank} was in {self.progress.where}"))
        with contextlib.suppress(RuntimeError, OSError):
            self.last_words(f"E{_kind(fault).exit_code}: {line}")
            if fault.hang:
                self._dump_stacks()
            if fault.hang or self.rank == 0:
                # Other ranks write their stacks too. If this one ended at once, their collectives would fail, and the
                # stacks would no longer show where they waited. Rank 0 may host the store, in which they agree who
                # prints the fault.
                time.sleep(2 * BEAT_S)
            sys.stdout.write("\x1b[?25h" if sys.stdout.isatty() else "")  # a progress bar hides the cursor
            sys.stdout.flush()

    def _is_reported_mistake(self, fault: Fault) -> bool:
        """Returns whether the fault is a mistake of the user that a rank on this host has printed already."""
        beats = [self.view.beats.get(rank) for rank in fault.ranks]
        near = all(beat is not None and beat.place == self.identity[-1] for beat in beats)
        return near and _kind(fault) is not PeerError

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kills ranks on this host that hang and do not end by themselves; torchrun would wait 30 s for each."""
        for rank in ranks:
            beat = self.view.beats.get(rank)
            if rank == self.rank or beat is None or beat.place != self.identity[-1]:
                continue
            for _ in range(30):  # a rank whose threads still run reads of the fault, writes its stacks and ends
                if process_state(beat.pid, beat.started) != "alive":
                    break
                time.sleep(GRACE_S / 10)
            if process_state(beat.pid, beat.started) != "gone":
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _dump_stacks(self) -> None:
        """Writes the stack of each Python thread to a file, and with `debug` to stderr."""
        if self.debug:
            faulthandler.dump_traceback()
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open(self.out_dir / f"stacks_rank{self.rank}.txt", "w") as file:
            faulthandler.dump_traceback(file)
