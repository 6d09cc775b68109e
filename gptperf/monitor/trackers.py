"""Weights & Biases and TensorBoard, held so that they can neither slow nor stop a run.

Each tracker has a bounded queue and a daemon thread of its own. The training thread only appends to the queues and
does all the talking to the user; one that fails or does not answer is given up with one warning.
"""

import collections
import contextlib
import importlib
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from gptperf.config import Config

__all__ = ["TensorBoard", "Tracker", "Trackers", "WeightsAndBiases", "flat", "open_trackers"]

_START_S = 10.0
_CLOSE_S = 10.0
_POLL_S = 0.1
_SERVICE_S = 2.0
_QUEUE = 1000  # records waiting for a tracker, beyond which the oldest goes
_PREFIX = {"iteration": "", "eval": "eval/"}


class Tracker(Protocol):
    """Where a run's numbers go. All but `abandon` are called in one thread of its own, in this order."""

    name: str

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        """Begin, or go on with, the run of this name; returns where it can be seen."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record numbers of an iteration."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the run; the summary of one that did not reach its end is empty."""

    def abandon(self) -> None:
        """Let go of what would hold the process up at its end; at once, in the training thread."""


class _Lane:
    """A tracker, its queue and its thread."""

    def __init__(self, tracker: Tracker, run_name: str, config: Mapping[str, Any]):
        self.tracker = tracker
        self.place = ""
        self.error = ""
        self.ready = self.abandoned = False
        self.since = time.monotonic()
        self._summary: Mapping[str, Any] | None = None
        self._records: collections.deque[tuple[int, Mapping[str, float]]] = collections.deque(maxlen=_QUEUE)
        self._put = self._taken = 0
        self._ending = threading.Event()
        self.thread = threading.Thread(
            target=self._work, args=(run_name, config), name=f"tracker {tracker.name}", daemon=True
        )
        self.thread.start()

    @property
    def dropped(self) -> int:
        """Records that never reached the tracker; exact once its thread has ended."""
        return self._put - self._taken - len(self._records)

    def put(self, step: int, scalars: Mapping[str, float]) -> None:
        self._put += 1
        self._records.append((step, scalars))  # wakes nobody: a thread that wakes takes time from this one

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._summary is None:
            self._summary = summary
            self._ending.set()

    def failure(self) -> str:
        """Why the tracker is of no more use, or ''."""
        late = not self.ready and self.thread.is_alive() and time.monotonic() - self.since > _START_S
        return self.error or (f"it did not start within {_START_S:g} s" if late else "")

    def abandon(self) -> None:
        self.abandoned = True
        self._ending.set()
        with contextlib.suppress(Exception):
            self.tracker.abandon()

    def _work(self, run_name: str, config: Mapping[str, Any]) -> None:
        try:
            self.place = self.tracker.start(run_name, config)
            self.ready = True
            for step, scalars in self._queued():
                self.tracker.log(step, scalars)
            self.tracker.finish(self._summary or {})
        except BaseException as error:  # noqa: BLE001 - the training thread tells it
            line = str(error).strip().partition("\n")[0]
            self.error = f"{type(error).__name__}: {line}" if line else type(error).__name__

    def _queued(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Records as they come, until the run is finished or the tracker abandoned."""
        while not self.abandoned:
            ending = self._ending.is_set()  # after the last record: looked at before the queue
            try:
                record = self._records.popleft()
            except IndexError:
                if ending:
                    return
                self._ending.wait(_POLL_S)
            else:
                self._taken += 1
                yield record


class Trackers:
    """Hands the records of a run to every tracker.

    Args:
        trackers: Which.
        run_name: Of the run's journal.
        config: Section -> key -> value.
        say: Gets a line about each tracker that has started.
        warn: Gets a line about each that is given up, or was too slow for all records.
    """

    def __init__(
        self,
        trackers: Iterable[Tracker] = (),
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        *,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
    ):
        self._say, self._warn = say, warn
        self._lanes = [_Lane(tracker, run_name, config or {}) for tracker in trackers]
        self._told: set[str] = set()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Hand on the numbers of an event `iteration` or `eval`; waits for nothing."""
        if not self._lanes:
            return
        scalars = flat({key: value for key, value in record.items() if key != "iter"}, _PREFIX[event])
        for lane in self._lanes:
            lane.put(record["iter"], scalars)
        self._look()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has reached its end."""
        for lane in self._lanes:
            lane.finish(summary)

    def close(self) -> None:
        """Wait, within limits, until the trackers have everything; closing twice is allowed."""
        self.finish({})
        end = time.monotonic() + _CLOSE_S
        for lane in self._lanes:
            lane.thread.join(max(end - time.monotonic(), 0))
        self._look()
        for lane in self._lanes:
            if lane.thread.is_alive():
                self._give_up(lane, f"it did not finish within {_CLOSE_S:g} s")
            elif lane.dropped:
                self._warn(f"{lane.tracker.name}: slower than the run, which left {lane.dropped} records out")
        self._lanes = []

    def _look(self) -> None:
        """Tell what has happened in the threads."""
        for lane in list(self._lanes):
            failure = lane.failure()
            if failure:
                self._give_up(lane, failure)
                self._lanes.remove(lane)
            elif lane.place and lane.tracker.name not in self._told:
                self._told.add(lane.tracker.name)
                self._say(f"{lane.tracker.name}: {lane.place}")

    def _give_up(self, lane: _Lane, why: str) -> None:
        self._warn(f"{lane.tracker.name} is given up, the run goes on without it: {why}")
        lane.abandon()


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested record: {"mfu": {"mfu_percent": 50.0}} -> {"mfu/mfu_percent": 50.0}."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = int(value) if isinstance(value, bool) else value
    return found


class WeightsAndBiases:
    """A run of Weights & Biases; its own files go to `<out_dir>/wandb`.

    The id is the run's name and a random end, since runs of a sweep may start in the same second. It lies in
    `<out_dir>/<run_name>.wandb_id`, so that a resumed run goes on with its own.
    """

    name = "Weights & Biases"

    def __init__(self, out_dir: Path, project: str, display_name: str = ""):
        self._wandb: Any = importlib.import_module("wandb")
        self._out_dir, self._project, self._display_name = out_dir, project, display_name
        self._run: Any = None

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        wandb = self._wandb
        settings = wandb.Settings(console="off", silent=True, init_timeout=_START_S)
        # It would ask for a key on the terminal, and wait.
        if wandb.setup(settings).settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key. Run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=self._project,
            id=_kept_id(self._out_dir / f"{run_name}.wandb_id", run_name),
            name=self._display_name or run_name,
            resume="allow",
            dir=str(self._out_dir),
            config=dict(config),
            settings=settings,
        )
        return str(self._run.url or self._run.dir)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)

    def abandon(self) -> None:
        """The process waits for W&B's service at its end: not for long. What that was given lies on disk."""
        threading.Thread(target=_end_service, name="end of W&B's service", daemon=True).start()


def _end_service() -> None:
    """End W&B's service soon after the main thread, if it is still there then."""
    threading.main_thread().join()
    time.sleep(_SERVICE_S)
    hook = sys.unraisablehook  # W&B's lost connection is no news
    sys.unraisablehook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(int(pid), signal.SIGKILL)


def _kept_id(path: Path, run_name: str) -> str:
    """The id in a file, which is written where there is none."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = f"{run_name}-{secrets.token_hex(3)}"
        path.write_text(f"{kept}\n")
    return kept


class TensorBoard:
    """Event files in `<out_dir>/tensorboard/<run_name>`.

    Args:
        out_dir: Of the run.
        last_step: Of the checkpoint that the run goes on from; what was logged of later ones is hidden.
    """

    name = "TensorBoard"

    def __init__(self, out_dir: Path, last_step: int = 0):
        self._writer_class: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._folder, self._last_step = out_dir / "tensorboard", last_step
        self._writer: Any = None

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        self._writer = self._writer_class(
            str(self._folder / run_name), purge_step=self._last_step + 1 if self._last_step else None, flush_secs=30
        )
        self._text("config", config)
        return f"tensorboard --logdir {self._folder}"

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if summary:
            self._text("summary", summary)
        self._writer.close()

    def abandon(self) -> None:
        pass

    def _text(self, tag: str, table: Mapping[str, Any]) -> None:
        lines = json.dumps(table, indent=2, default=str).splitlines()
        self._writer.add_text(tag, "\n".join(f"    {line}" for line in lines), self._last_step)


def open_trackers(
    config: Config, run_name: str, last_step: int, say: Callable[[str], None], warn: Callable[[str], None]
) -> Trackers:
    """Start the trackers that the configuration asks for; called in the main process alone.

    Args:
        config: Of the run.
        run_name: Of its journal.
        last_step: Iterations done before.
        say: See `Trackers`.
        warn: See `Trackers`.
    """
    out_dir, log = Path(config.train.out_dir), config.log
    wanted: list[tuple[str, Callable[[], Tracker]]] = []
    if log.wandb_log:
        wanted.append(("wandb", lambda: WeightsAndBiases(out_dir, log.wandb_project, log.wandb_run_name)))
    if log.tensorboard:
        wanted.append(("tensorboard", lambda: TensorBoard(out_dir, last_step)))
    trackers = []
    for package, build in wanted:
        try:
            trackers.append(build())
        except Exception as error:  # noqa: BLE001 - a broken installation raises what it likes
            warn(f"the package {package} cannot be loaded, the run goes on without it: {error!r}")
    return Trackers(trackers, run_name, config.sections(), say=say, warn=warn)
