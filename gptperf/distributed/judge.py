"""Decides which rank of a job is at fault, from what the ranks have published and for how long they have been silent.

A `Judge` uses no threads, clocks or store: `gptperf.distributed.watchdog` feeds it with views, and tests do so by hand.

It looks for these faults, the most certain first:

1. A rank has published a fault, which is taken as true.
2. The process of a rank is gone, according to the operating system of this host.
3. The process of a rank is stopped (SIGSTOP), and has been silent for some seconds.
4. The store does not answer: its host is gone, and there is no news of the other ranks without it.
5. A rank on another host has been silent for some seconds: the rank, its host or the network is gone.
6. All ranks are alive but nothing moves (`Judge._hang`): the rank that is behind did not arrive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["BEAT_S", "GRACE_S", "LOST_S", "Beat", "Fault", "Judge", "State", "View"]

BEAT_S = 0.5
"""Seconds between two beats of a rank."""
LOST_S = 5.0
"""Seconds of silence after which a rank or the store counts as gone."""
GRACE_S = 1.0
"""Seconds that are allowed for an operation that may block while a process ends."""
# Seconds from a published error to the end of the other ranks. The rank with the error should end first, and the others
# may meet the same error by themselves.
_ERROR_S = 2.5
_START_S = 30.0  # seconds that every rank has until its first beat

State = Literal["gone", "stopped", "alive"]
"""State of a process on this host."""


class Beat(NamedTuple):
    """The state that a rank publishes about itself, twice a second."""

    beats: int
    """Number of this beat."""
    places: int
    """Places that the main thread has passed (`Progress.count`)."""
    where: str
    """Where the main thread is, as text for a message."""
    waiting: bool
    """Whether the main thread is in a collective."""
    limited: bool
    """Whether it is a fault if no rank passes a place within the timeout."""
    done: bool
    """Whether the rank has ended without an error."""
    pid: int
    started: str
    """Start time of the process, because a later process may have the same id."""
    host: str
    place: str
    """Name of the space of process ids. Ranks with the same name can look up each other's processes."""

    @property
    def process(self) -> str:
        """Process id and host, as text for a message."""
        return f"process {self.pid} on {self.host}"


class Fault(NamedTuple):
    """The ranks at fault and what is wrong."""

    ranks: tuple[int, ...]
    text: str
    hang: bool = False
    """Whether the processes of these ranks still exist."""
    gone: bool = False
    """Whether these ranks ended without publishing why."""


@dataclass(frozen=True)
class View:
    """Everything that one rank knows about the job at one time."""

    number: int = 0
    """Number of the exchange with the store that made this view."""
    beats: Mapping[int, Beat] = field(default_factory=dict)
    """Last beat by rank."""
    states: Mapping[int, State] = field(default_factory=dict)
    """States of processes on this host by rank. They are looked up before the beats are read: a process that has ended
    well published that it is done before it was gone, so the beats then say so."""
    failed: Fault | None = None
    """The fault that a rank has published."""
    lost: bool = False
    """Whether the connection to the store has ended."""


@dataclass
class _Seen:
    """The last news of one rank, and how old it is."""

    beat: Beat | None = None
    state: State | None = None
    silent_s: float = LOST_S - _START_S
    """Seconds without a new beat. It begins below zero, so that a rank has more time until its first beat."""
    still_s: float = 0.0
    """Seconds in which the main thread has passed no place."""


class Judge:
    """Decides which rank is at fault from a sequence of views.

    Args:
        rank: this rank.
        world_size: ranks of the job.
        timeout_s: limit of one collective.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.lost_s = min(LOST_S, timeout_s)
        self.seen = {other: _Seen() for other in range(world_size)}
        self.view = View()
        self.store_silent_s = self.failed_s = 0.0

    def tick(self, view: View, seconds: float) -> None:
        """Takes in a view that was current during the last `seconds`."""
        self.store_silent_s = 0.0 if view.number != self.view.number else self.store_silent_s + seconds
        self.failed_s += seconds if view.failed is not None else 0.0
        self.view = view
        for rank, seen in self.seen.items():
            beat, before = view.beats.get(rank), seen.beat
            seen.beat, seen.state = beat, view.states.get(rank)
            # While the store is silent there is no news of any rank, so the silence does not count for the rank.
            if beat is not None and (before is None or beat.beats != before.beats):
                seen.silent_s = 0.0
            elif self.store_silent_s <= 2 * BEAT_S:
                seen.silent_s += seconds
            if beat is not None and (before is None or beat.places != before.places):
                seen.still_s = 0.0
            elif self.store_silent_s <= 2 * BEAT_S:
                seen.still_s += seconds

    @property
    def others(self) -> dict[int, _Seen]:
        """The other ranks, without those that have ended without an error."""
        return {r: s for r, s in self.seen.items() if r != self.rank and not (s.beat is not None and s.beat.done)}

    def fault(self) -> Fault | None:
        """Returns the fault that is seen now, if there is one. The checks follow the list at the top of this file."""
        failed = self.view.failed
        if failed is not None:
            return failed if failed.hang or failed.gone or self.failed_s >= _ERROR_S else None
        if not self.others:
            return self._hang()
        gone = [rank for rank, seen in self.others.items() if seen.state == "gone"]
        if gone:
            # If the store went with rank 0, other ranks may have ended because of that already.
            gone = [0] if self.view.lost and 0 in gone else gone
            return self._named(gone, "is gone: {process} died, last in {where}", gone=True)
        unheard = self.store_silent_s
        stopped = [r for r, s in self.others.items() if s.state == "stopped" and s.silent_s + unheard >= self.lost_s]
        if stopped:
            return self._named(stopped, "did not arrive: {process} is stopped, last in {where}", hang=True)
        if unheard >= (GRACE_S if self.view.lost else self.lost_s):
            return Fault((), "the host of the job's store is gone (the process of torchrun there, or of rank 0)")
        # A process of this host that is alive but silent may be in a long call that blocks its threads too; only the
        # timeout applies to it. All ranks that are nearly lost are named together, because those of one host are lost
        # together.
        silent = [r for r, s in self.others.items() if s.state != "alive" and s.silent_s >= self.lost_s - BEAT_S]
        if any(self.seen[rank].silent_s >= self.lost_s for rank in silent):
            text = f"is gone: {{process}} has said nothing for {self.lost_s:g} s, last in {{where}}"
            return self._named(silent, text, gone=True)
        return self._hang()

    def _named(self, ranks: list[int], text: str, *, hang: bool = False, gone: bool = False) -> Fault:
        """Returns a fault with a text about each rank, in which `{process}` and `{where}` are filled in."""
        lines = []
        for rank in ranks:
            beat = self.seen[rank].beat
            process, where = ("its process", "its start") if beat is None else (beat.process, beat.where)
            lines.append(f"rank {rank} {text.format(process=process, where=where)}")
        return Fault(tuple(ranks), "; ".join(lines), hang, gone)

    def _hang(self) -> Fault | None:
        """Returns a fault if a rank has waited for the timeout, naming those that did not arrive."""
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
                return None  # a rank that is behind but moves is working
            ended = [rank for rank in self.seen if rank not in active]
            if ended and len(waiting) == len(active):
                return self._named(ended, f"has ended: {waits}", hang=True)
        if len(active) > 1 and len(still) == len(active) and all(b.waiting or b.limited for b in beats.values()):
            # No rank need be in a collective: if the GPU's queue is full, any call may block.
            nobody = f"no rank has moved for {self.timeout_s:g} s"
            behind = [rank for rank, beat in beats.items() if beat.places == lowest]
            if len(behind) < len(beats):
                return self._named(behind, f"did not arrive: {nobody}, {{process}} is in {{where}}", hang=True)
            return Fault((), f"{nobody}: all are in {next(iter(beats.values())).where}", hang=True)
        return None
