"""Sends the numbers of a run to Weights & Biases and TensorBoard, which can neither slow down nor stop the run.

Each tracker has its own bounded queue and daemon thread. The training thread only appends to the queues, and it alone
prints messages for the user. A tracker that fails or does not respond is disabled with one warning.
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
from gptperf.formats import counted

__all__ = ["TensorBoard", "Tracker", "Trackers", "WeightsAndBiases", "flat", "open_trackers"]

_START_S = 10.0
_CLOSE_S = 10.0
_POLL_S = 0.1
_SERVICE_S = 2.0
_QUEUE = 1000  # most records that wait for a tracker; if there are more, the oldest is dropped
_PREFIX = {"iteration": "", "eval": "eval/"}


class Tracker(Protocol):
    """A service that records the numbers of a run. All methods but `abandon` are called by the tracker's own thread, in
    this order."""

    name: str

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        """Starts or continues the run of this name. Returns where the user can see it."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the numbers of an iteration."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the run; the summary is empty if the run did not reach its end."""

    def abandon(self) -> None:
        """Releases what would delay the end of the process. Called by the training thread; must not block."""


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
        """Number of records that never reached the tracker; exact once its thread has ended."""
        return self._put - self._taken - len(self._records)

    def put(self, step: int, scalars: Mapping[str, float]) -> None:
        self._put += 1
        self._records.append((step, scalars))  # no notification: a thread that wakes up takes time from this one

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._summary is None:
            self._summary = summary
            self._ending.set()

    def failure(self) -> str:
        """Returns the reason why the tracker can no longer be used, or "" if it can."""
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
        except BaseException as error:  # noqa: BLE001 - the training thread reports it
            line = str(error).strip().partition("\n")[0]
            self.error = f"{type(error).__name__}: {line}" if line else type(error).__name__

    def _queued(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Yields records as they arrive, until the run has finished or the tracker is abandoned."""
        while not self.abandoned:
            # The flag is read before the queue. It is set after the last record, so if it is set, an empty queue stays
            # empty.
            ending = self._ending.is_set()
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
    """Passes the records of a run to every tracker.

    Args:
        trackers: the trackers.
        run_name: name of the run, as in its journal.
        config: section -> key -> value.
        say: called with one line about each tracker that has started.
        warn: called with one line about each tracker that is disabled or was too slow for all records.
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
        """Queues the numbers of an event `iteration` or `eval`; never blocks."""
        if not self._lanes:
            return
        scalars = flat({key: value for key, value in record.items() if key != "iter"}, _PREFIX[event])
        for lane in self._lanes:
            lane.put(record["iter"], scalars)
        self._report()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Lets the trackers end the run once they have recorded everything."""
        for lane in self._lanes:
            lane.finish(summary)

    def close(self) -> None:
        """Waits, within a time limit, until the trackers have recorded everything. May be called twice."""
        self.finish({})
        end = time.monotonic() + _CLOSE_S
        for lane in self._lanes:
            lane.thread.join(max(end - time.monotonic(), 0))
        self._report()
        for lane in self._lanes:
            if lane.thread.is_alive():
                self._disable(lane, f"it did not finish within {_CLOSE_S:g} s")
            elif lane.dropped:
                lost = counted(lane.dropped, "record")
                self._warn(f"{lane.tracker.name}: too slow for the run, which dropped {lost}")
        self._lanes = []

    def _report(self) -> None:
        """Reports to the user what has happened in the threads, and removes the trackers that failed."""
        for lane in list(self._lanes):
            failure = lane.failure()
            if failure:
                self._disable(lane, failure)
                self._lanes.remove(lane)
            elif lane.place and lane.tracker.name not in self._told:
                self._told.add(lane.tracker.name)
                self._say(f"{lane.tracker.name}: {lane.place}")

    def _disable(self, lane: _Lane, why: str) -> None:
        self._warn(f"{lane.tracker.name} is disabled, the run continues without it: {why}")
        lane.abandon()


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the finite numbers of a nested record: {"mfu": {"mfu_percent": 50.0}} -> {"mfu/mfu_percent": 50.0}."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = int(value) if isinstance(value, bool) else value
    return found


class WeightsAndBiases:
    """A run of Weights & Biases (W&B), whose files are in `<out_dir>/wandb`.

    The id of the W&B run is the name of this run with a random suffix, because runs of a sweep may start in the same
    second. It is stored in `<out_dir>/<run_name>.wandb_id`, so that a resumed run continues the same W&B run.
    """

    name = "Weights & Biases"

    def __init__(self, out_dir: Path, project: str, display_name: str = ""):
        self._wandb: Any = importlib.import_module("wandb")
        self._out_dir, self._project, self._display_name = out_dir, project, display_name
        self._run: Any = None

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        wandb = self._wandb
        settings = wandb.Settings(console="off", silent=True, init_timeout=_START_S)
        # Without a key `init` would ask for one on the terminal and block.
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
        """Limits how long the process waits for W&B's service when it exits. The service keeps its data on disk."""
        threading.Thread(target=_end_service, name="end of W&B's service", daemon=True).start()


def _end_service() -> None:
    """Waits for the main thread to end, then kills W&B's service if it still runs after `_SERVICE_S`."""
    threading.main_thread().join()
    time.sleep(_SERVICE_S)
    hook = sys.unraisablehook  # suppresses the traceback of W&B's lost connection
    sys.unraisablehook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(int(pid), signal.SIGKILL)


def _kept_id(path: Path, run_name: str) -> str:
    """Returns the id stored in a file; stores a new one if the file does not exist or is empty."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = f"{run_name}-{secrets.token_hex(3)}"
        path.write_text(f"{kept}\n")
    return kept


class TensorBoard:
    """A run of TensorBoard, whose event files are in `<out_dir>/tensorboard/<run_name>`.

    Args:
        out_dir: directory of the run.
        last_step: iteration of the checkpoint that the run resumes from; entries of later iterations are hidden.
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
    """Starts the trackers that the configuration asks for; called on the main rank only.

    Args:
        config: configuration of the run.
        run_name: name of the run, as in its journal.
        last_step: iteration of the checkpoint that the run resumes from, or 0.
        say: see `Trackers`.
        warn: see `Trackers`.
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
        except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
            warn(f"the package {package} cannot be loaded, the run continues without it: {error!r}")
    return Trackers(trackers, run_name, config.sections(), say=say, warn=warn)
