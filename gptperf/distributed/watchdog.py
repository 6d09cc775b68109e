"""Which process of a job failed, died or hangs, found also while this one is blocked in a collective.

Every process says twice a second, in the store that they met at, where it is. Two threads of a `Watchdog` do so and
judge what the others say; when one of them is gone they name it and end this process, whatever its main thread does.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import torch.distributed as dist

from gptperf.errors import GptperfError, PeerError, report

__all__ = ["Beat", "Fault", "Judge", "Progress", "View", "Watchdog"]

BEAT_S = 0.5
LOST_S = 5.0
"""Seconds of silence after which a process or the store is gone."""
_GRACE_S = 1.0  # for what may block on the way out
_ERROR_S = 2.5  # for the rank that reported an error to end first, and for others to meet the same one by themselves
_START_S = 30.0  # until the first beat of every rank

_FAILED = "failed: "
State = Literal["gone", "stopped", "alive"]


class Progress:
    """Where the main thread is. Every rank goes through the same places, so that the lowest count is the last one."""

    def __init__(self) -> None:
        self.phase, self.waiting, self.count, self.iterations = "start", "", 0, 0
        self.limited = False
        """Whether it is a fault that no rank moves for the timeout."""

    def start_iteration(self, number: int) -> None:
        """Begin an iteration. The first one compiles, and has no limit."""
        self.phase, self.limited = f"iteration {number}", self.iterations > 0
        self.iterations += 1
        self.count += 1

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Do something long after an iteration."""
        outer = self.phase, self.limited
        self.phase, self.limited = f"{what} after {self.phase}", False
        self.count += 1
        yield
        self.phase, self.limited = outer
        self.count += 1

    @contextlib.contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Wait for the other ranks. An error leaves the name in place: it says where the error came from."""
        outer, self.waiting = self.waiting, name
        self.count += 1
        yield
        self.waiting = outer
        self.count += 1

    @property
    def where(self) -> str:
        """The collective and the phase, for a message."""
        return f"{self.waiting} ({self.phase})" if self.waiting else self.phase


class Beat(NamedTuple):
    """What a rank says of itself."""

    beats: int
    places: int
    where: str
    waiting: bool
    limited: bool
    done: bool
    pid: int
    started: str
    host: str
    place: str
    """Equal where process ids mean the same."""

    @property
    def process(self) -> str:
        return f"process {self.pid} on {self.host}"


class Fault(NamedTuple):
    """The ranks at fault and what is wrong."""

    ranks: tuple[int, ...]
    text: str
    hang: bool = False


@dataclass(frozen=True)
class View:
    """What the store said last."""

    number: int = 0
    beats: Mapping[int, Beat] = field(default_factory=dict)
    states: Mapping[int, State] = field(default_factory=dict)
    """Of the processes on this host, looked up before the beats were read: one that is done is not gone."""
    failed: Fault | None = None
    lost: bool = False
    """The connection to the store has ended."""


def process_state(pid: int, started: str | None = None) -> State:
    """Whether the process of this host that began at `started` lives, is stopped, or is gone (or writing its core)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    if started not in (None, fields[19]) or fields[0] in "ZX" or "CoreDumping:\t1" in status:
        return "gone"
    return "stopped" if fields[0] == "T" else "alive"


def _identity() -> tuple[int, str, str, str]:
    """Process id, start time, host, and the place in which the process id has a meaning."""
    host, pid = socket.gethostname(), os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return pid, started, host, f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return pid, "", host, f"{host} {pid}"


@dataclass
class _Seen:
    beat: Beat | None = None
    state: State | None = None
    silent_s: float = LOST_S - _START_S
    still_s: float = 0.0


class Judge:
    """Decides from what was seen, and for how long. Time in which this process did not run does not count.

    Args:
        rank: of this process.
        world_size: processes of the job.
        timeout_s: limit of one collective.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.lost_s = min(LOST_S, timeout_s)
        self.seen = {other: _Seen() for other in range(world_size)}
        self.view = View()
        self.store_silent_s = self.failed_s = 0.0

    def tick(self, view: View, seconds: float) -> None:
        """Take in a view that was current for these last seconds."""
        self.store_silent_s = 0.0 if view.number != self.view.number else self.store_silent_s + seconds
        self.failed_s += seconds if view.failed is not None else 0.0
        self.view = view
        for rank, seen in self.seen.items():
            beat, before = view.beats.get(rank), seen.beat
            seen.beat, seen.state = beat, view.states.get(rank)
            if beat is not None and (before is None or beat.beats != before.beats):
                seen.silent_s = 0.0
            elif self.store_silent_s <= 2 * BEAT_S:
                seen.silent_s += seconds
            if beat is not None and (before is None or beat.places != before.places):
                seen.still_s = 0.0
            elif self.store_silent_s <= 2 * BEAT_S:
                seen.still_s += seconds

    @property
    def peers(self) -> dict[int, _Seen]:
        """The other ranks that have not ended well."""
        return {r: s for r, s in self.seen.items() if r != self.rank and not (s.beat is not None and s.beat.done)}

    def fault(self) -> Fault | None:
        """What is wrong now."""
        failed = self.view.failed
        if failed is not None:
            return failed if failed.hang or self.failed_s >= _ERROR_S else None
        if not self.peers:
            return self._hang()
        gone = [rank for rank, seen in self.peers.items() if seen.state == "gone"]
        if gone:
            return self._named(gone, "is gone: {process} died, last in {where}")
        unheard = self.store_silent_s
        stopped = [r for r, s in self.peers.items() if s.state == "stopped" and s.silent_s + unheard >= self.lost_s]
        if stopped:
            return self._named(stopped, "did not arrive: {process} is stopped, last in {where}", hang=True)
        if unheard >= (_GRACE_S if self.view.lost else self.lost_s):
            return Fault((), "the host of the job's store is gone (the process of torchrun there, or of rank 0)")
        # A process of this host that lives but says nothing may be in a long call: the timeout is its limit.
        silent = [r for r, s in self.peers.items() if s.state != "alive" and s.silent_s >= self.lost_s - BEAT_S]
        if any(self.seen[rank].silent_s >= self.lost_s for rank in silent):
            return self._named(
                silent, f"is gone: {{process}} has said nothing for {self.lost_s:g} s, last in {{where}}"
            )
        return self._hang()

    def _named(self, ranks: list[int], text: str, *, hang: bool = False) -> Fault:
        lines = []
        for rank in ranks:
            beat = self.seen[rank].beat
            process, where = ("its process", "its start") if beat is None else (beat.process, beat.where)
            lines.append(f"rank {rank} {text.format(process=process, where=where)}")
        return Fault(tuple(ranks), "; ".join(lines), hang)

    def _hang(self) -> Fault | None:
        """A rank that waited for the timeout, and who did not come."""
        active = {rank: seen for rank, seen in self.seen.items() if seen.beat is None or not seen.beat.done}
        beats = {rank: seen.beat for rank, seen in active.items() if seen.beat is not None}
        still = [rank for rank in beats if active[rank].still_s >= self.timeout_s]
        if not beats or len(beats) < len(active):
            return None
        waiting = [rank for rank in still if beats[rank].waiting]
        lowest = min(beat.places for beat in beats.values())
        if waiting:
            ahead = max(waiting, key=lambda rank: beats[rank].places)
            waits = f"rank {ahead} has waited {self.timeout_s:g} s in {beats[ahead].where}"
            late = [r for r, beat in beats.items() if beat.places == lowest < beats[ahead].places]
            if late and set(late) <= set(still):
                return self._named(late, f"did not arrive: {waits}, {{process}} is in {{where}}", hang=True)
            if late:
                return None
            ended = [rank for rank in self.seen if rank not in active]
            if ended and len(waiting) == len(active):
                return self._named(ended, f"has ended: {waits}", hang=True)
        if len(active) > 1 and len(still) == len(active) and all(b.waiting or b.limited for b in beats.values()):
            # Also where nobody is seen waiting: a GPU's queue that is full holds its process up anywhere.
            nobody = f"no rank has moved for {self.timeout_s:g} s"
            behind = [rank for rank, beat in beats.items() if beat.places == lowest]
            if len(behind) < len(beats):
                return self._named(behind, f"did not arrive: {nobody}, {{process}} is in {{where}}", hang=True)
            return Fault((), f"{nobody}: all are in {next(iter(beats.values())).where}", hang=True)
        return None


class Watchdog:
    """A context manager round what a process of a job does. Alone, a process has none.

    An error that leaves it is printed, told to the other ranks, and turned into the exit code of its kind.

    Args:
        rank: of this process.
        world_size: processes of the job.
        progress: where the main thread says what it does.
        timeout_s: limit of one collective.
        out_dir: folder for the Python stacks of a process that hangs.
        debug: show stacks on stderr.
        store: where the ranks meet; default: a connection of its own to the process group's.
        end: ends this process with an exit code.
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
        self.last_words: Callable[[str], object] = lambda text: None  # hears what ends this process
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._keep_beating, self._keep_judging)]

    def __enter__(self) -> "Watchdog":
        if self.world_size > 1:
            if self._store is None:
                self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore("watchdog", self._store)
            for _ in range(50):  # they have just met: know each of them before anything can happen
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
                time.sleep(LOST_S + 2 * _GRACE_S)  # the judge ends this process if another one is the cause
            if broken:
                line = str(error).partition("\n")[0]
                found = PeerError(f"no rank is known to be gone, but in {self.progress.where}: {line}")
                found.__cause__, error = error, found
        if error is not None and not self._ending.acquire(blocking=False):
            self._threads[1].join()  # it ends the process
        self._closing.set()
        self._threads[0].join(2 * _GRACE_S)
        if error is not None:
            self._report(error)
        elif not self._threads[0].is_alive():
            with contextlib.suppress(RuntimeError):  # the host of the store may have finished before
                self._exchange(done=True)

    def _report(self, error: BaseException) -> None:
        """Say the error here, unless another rank has said the same, then tell the others."""
        assert self._store is not None
        code = error.exit_code if isinstance(error, GptperfError) else 1
        text = f"E{code}: {error}" if isinstance(error, GptperfError) else f"{type(error).__name__}: {error}"
        visible = isinstance(error, Exception) and not isinstance(error, BrokenPipeError)
        self._end_within(LOST_S, code)
        answers = self.judge.store_silent_s <= _GRACE_S
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
        time.sleep(2 * BEAT_S)  # the others hear of it while the store and this process are there
        self._end_within(_GRACE_S, code)  # leaving a broken process group may block
        if visible:
            sys.exit(code)

    def _end_within(self, seconds: float, code: int) -> None:
        late = threading.Timer(seconds, self.end, (code,))
        late.daemon = True
        late.start()

    def _said(self, text: str) -> bool:
        """Whether the rank that failed first says this very text."""
        assert self._store is not None
        for _ in range(15):
            if self._store.check(["failed"]):
                return json.loads(self._store.get("failed"))[1].partition(_FAILED)[2] == text
            time.sleep(0.1)
        return False

    def _publish(self, fault: Fault) -> None:
        """Tell the others, unless another fault is known: what follows from one is none."""
        assert self._store is not None
        self._store.compare_set("failed", "", json.dumps(fault))

    def _exchange(self, *, done: bool = False) -> None:
        """Say where this process is, and read where the others are."""
        assert self._store is not None
        here, number = self.progress, self.view.number + 1
        beat = Beat(number, here.count, here.where, bool(here.waiting), here.limited, done, *self.identity)
        states = self._states()
        self._store.set(f"beat/{self.rank}", json.dumps(beat))
        known = [r for r in range(self.world_size) if r in self.view.beats or self._store.check([f"beat/{r}"])]
        texts = self._store.multi_get([f"beat/{rank}" for rank in known])
        beats = {rank: Beat(*json.loads(text)) for rank, text in zip(known, texts, strict=True)}
        failed = None
        if self._store.check(["failed"]):
            ranks, text, hang = json.loads(self._store.get("failed"))
            failed = Fault(tuple(ranks), text, hang)
        self.view = View(number, beats, states, failed)

    def _states(self) -> dict[int, State]:
        """State of the processes whose ids mean the same here."""
        near = {r: b for r, b in self.view.beats.items() if b.place == self.identity[-1] and r != self.rank}
        return {rank: process_state(beat.pid, beat.started) for rank, beat in near.items()}

    def _keep_beating(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self._exchange()
            except RuntimeError:
                self.view = replace(self.view, lost=True)
                return

    def _keep_judging(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(BEAT_S / 2):
            now, view = time.monotonic(), self.view
            seconds = min(now - before, 2 * BEAT_S)
            before = now
            if view.lost or self.judge.store_silent_s > 2 * BEAT_S:
                view = replace(view, states=self._states())
                if process_state(os.getppid()) == "stopped":  # torchrun, by Ctrl-Z: it may be the store's host
                    seconds = 0.0
            self.judge.tick(view, seconds)
            fault = self.judge.fault()
            if fault is not None and self._ending.acquire(blocking=False):
                words = threading.Thread(target=self._say, args=(fault,), daemon=True)
                words.start()
                words.join(2 * _GRACE_S)  # a full pipe or a dead disk may block it
                if fault.hang:
                    self._kill(fault.ranks)
                self.end(PeerError.exit_code)
                return

    def _say(self, fault: Fault) -> None:
        """The last words of this process."""
        line = fault.text.partition("\n")[0]
        report(PeerError(f"{line}; rank {self.rank} was in {self.progress.where}"))
        with contextlib.suppress(RuntimeError, OSError):
            if self.judge.store_silent_s <= 2 * BEAT_S:
                self._publish(fault)
            self.last_words(f"E{PeerError.exit_code}: {line}")
            if fault.hang:
                self._dump_stacks()
                time.sleep(1.5 * BEAT_S)  # so that the others' stacks show where they waited, not that this one left
            sys.stdout.write("\x1b[?25h" if sys.stdout.isatty() else "")  # a progress bar hides the cursor
            sys.stdout.flush()

    def _kill(self, ranks: Sequence[int]) -> None:
        """End processes of this host that hang and do not end by themselves: torchrun would wait 30 s for each."""
        for rank in ranks:
            beat = self.view.beats.get(rank)
            if rank == self.rank or beat is None or beat.place != self.identity[-1]:
                continue
            for _ in range(30):  # one that runs hears of it and leaves its stacks first
                if process_state(beat.pid, beat.started) != "alive":
                    break
                time.sleep(_GRACE_S / 10)
            if process_state(beat.pid, beat.started) != "gone":
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _dump_stacks(self) -> None:
        """Where each Python thread of this process is: into a file, with `debug` on stderr too."""
        if self.debug:
            faulthandler.dump_traceback()
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open(self.out_dir / f"stacks_rank{self.rank}.txt", "w") as file:
            faulthandler.dump_traceback(file)
