"""Reads logged runs as curves over tokens, as far as their logs go, even if they are damaged. Does not import torch."""

import bisect
import itertools
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gptperf.errors import DataError
from gptperf.formats import counted, mfu_scale, one_line
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_lock import is_locked
from gptperf.monitor.run_log import find_log, finite, load, mapping

__all__ = ["LeftOut", "LoggedEval", "LoggedRun", "LoggedStep", "is_running", "read_run", "read_runs"]

_QUIET_S = 600.0
"""Without a lock to ask, a run that is not finished counts as stopped when its log was not written for this many
seconds, or for three times the usual interval between entries if that is longer."""


class LoggedStep(NamedTuple):
    """A logged iteration."""

    iter: int
    tokens: float
    seconds: float
    """Time of training so far, without compilation, evaluation and saving."""
    loss: float | None
    mfu_percent: float | None
    gradient_norm: float | None


class LoggedEval(NamedTuple):
    """An evaluation."""

    iter: int
    tokens: float
    loss: float
    tasks: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """Task -> its scores, if the evaluation has tasks."""


class LeftOut(NamedTuple):
    """A run that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class LoggedRun:
    """A run as its log describes it."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """Configuration key -> value, without sections."""
    info: Mapping[str, Any]
    """Startup info: the facts that the run logged at its start."""
    summary: Mapping[str, Any]
    steps: tuple[LoggedStep, ...]
    evals: tuple[LoggedEval, ...]
    state: str
    """finished, running or stopped."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    mfu_scale: str | None
    """What the MFU is relative to: convention of the FLOP count, and peak with dtype and basis."""
    peak_gb: float | None
    """Peak memory of the GPU; on a CPU, of the process."""
    wall_s: float | None
    """Time of all processes of the run; None for a run that has not ended, or whose log has only the last process."""
    damaged_lines: int
    resumes: int

    @property
    def iterations(self) -> int:
        """Number of the last logged iteration."""
        return max([*(s.iter for s in self.steps[-1:]), *(e.iter for e in self.evals[-1:]), 0])

    @property
    def max_iters(self) -> int | None:
        """Number of iterations that the configuration asks for."""
        value = self.config.get("max_iters")
        return value if type(value) is int else None

    @property
    def tasks(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of the tasks in the last evaluation that has them."""
        return next((e.tasks for e in reversed(self.evals) if e.tasks), {})

    @property
    def train_s(self) -> float | None:
        """Seconds of training, without compilation, evaluation and saving."""
        return self.steps[-1].seconds if self.steps else None

    def seconds_at(self, tokens: float) -> float | None:
        """Returns the seconds of training until `tokens` tokens."""
        return interpolated([(s.tokens, s.seconds) for s in self.steps], tokens, nearest=True)

    def val_loss_at(self, tokens: float) -> float | None:
        """Returns the validation loss at `tokens` tokens, interpolated linearly; None outside the evaluations."""
        return interpolated([(e.tokens, e.loss) for e in self.evals], tokens)

    def train_loss_at(self, tokens: float) -> float | None:
        """Returns the mean training loss over the last tenth of the first `tokens` tokens, or else the last loss."""
        before = [(s.tokens, s.loss) for s in self.steps if s.tokens <= tokens and s.loss is not None]
        late = [loss for at, loss in before if at > 0.9 * tokens] or [loss for _, loss in before[-1:]]
        return statistics.fmean(late) if late else None

    def remarks(self) -> list[str]:
        """Returns a line for each fact that a reader must know about this log."""
        lines = []
        if self.state != "finished":
            lines.append(f"{self.name}: {self.state}, read up to iteration {self.iterations}")
        if self.damaged_lines:
            lines.append(f"{self.name}: {counted(self.damaged_lines, 'damaged line')} left out")
        return lines


def interpolated(points: Sequence[tuple[float, float]], x: float, *, nearest: bool = False) -> float | None:
    """Interpolates linearly between ascending points; outside them returns None, or the nearest value if `nearest`."""
    if not points:
        return None
    if not points[0][0] <= x <= points[-1][0]:
        return (points[0] if x < points[0][0] else points[-1])[1] if nearest else None
    place = min(bisect.bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
    (left, low), (right, high) = points[max(place - 1, 0)], points[place]
    return high if right == left else low + (high - low) * (x - left) / (right - left)


def read_runs(paths: Sequence[str | Path]) -> tuple[list[LoggedRun], list[LeftOut]]:
    """Reads every run that can be read. A run that is given several times, as folder and as files, is read once.

    Args:
        paths: Folders of runs (the newest log is read), run_*.jsonl, run_*.json.

    Returns:
        The runs, with short unique names, and the paths that were left out.
    """
    files: dict[Path, Path] = {}
    left_out = []
    for path in paths:
        try:
            found = find_log(Path(path))
        except DataError as error:
            left_out.append(_left_out(path, error))
            continue
        run = Path(os.path.abspath(found)).with_suffix("")
        if run not in files or found.suffix == ".jsonl":
            files[run] = found
    runs = []
    for name, path in zip(_names(list(files)), files.values(), strict=True):
        try:
            runs.append(read_run(path, name))
        except DataError as error:
            left_out.append(_left_out(path, error))
    return runs, left_out


def _left_out(path: str | Path, error: DataError) -> LeftOut:
    reason = str(error).removeprefix(f"{path}: ")
    return LeftOut(one_line(str(path), 200), one_line(reason, 300))


def _names(runs: Sequence[Path]) -> list[str]:
    """Names each run by its folder, or by folder and file if a folder has several, without the common path."""
    folders = [run.parent for run in runs]
    labels = [run.parent if folders.count(run.parent) == 1 else run for run in runs]
    if not labels:
        return []
    root = os.path.commonpath([label.parent for label in labels])
    names: list[str] = []
    for label in labels:
        name = base = one_line(os.path.relpath(label, root))
        count = 1
        while name in names:
            count += 1
            name = f"{base} ({count})"
        names.append(name)
    return names


def read_run(path: Path, name: str) -> LoggedRun:
    """Reads one journal or JSON log.

    Raises:
        DataError: The file cannot be read, or has no entry of a run.
    """
    log = load(path)
    config, info, summary = _flat(log["config"]), log["startup_info"], log["summary"]
    entries = log["training_iterations"]
    if not (entries or config or info or summary or log["eval_steps"]):
        raise DataError(f"{path}: found an empty log, wanted the log of a run")
    per_iter = _tokens_per_iter(info, config, entries)
    steps = _steps(entries, per_iter)
    evals = _evals(log["eval_steps"], steps, per_iter)
    speed, mfu, scale = _speed(entries, summary)
    resumes = len(log["resumes"])
    return LoggedRun(
        name=name,
        path=path,
        config=config,
        info=info,
        summary=summary,
        steps=steps,
        evals=evals,
        state=_state(path, log),
        tokens_per_sec=speed,
        mfu_percent=mfu,
        mfu_scale=scale,
        peak_gb=_peak_gb(entries),
        wall_s=None if resumes and "starts" not in summary else finite(summary.get("wall_time_s")),
        damaged_lines=log["damaged_lines"],
        resumes=resumes,
    )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all keys of all sections in one mapping; a log may also hold keys without a section."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name != "origins":
            found |= value if isinstance(value, dict) else {name: value}
    return found


def _tokens_per_iter(
    info: Mapping[str, Any], config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> float | None:
    told = finite(info.get("tokens_per_iter"))
    if told is not None and told > 0:
        return told
    for entry in reversed(entries):
        tokens = finite(entry.get("tokens"))
        if tokens and entry["iter"]:
            return tokens / entry["iter"]
    parts = [finite(config.get(key)) for key in ("batch_size", "gradient_accumulation_steps", "block_size")]
    return math.prod(part for part in parts if part) if all(parts) else None


def _timed(entry: Mapping[str, Any]) -> float | None:
    """Returns the milliseconds of an iteration; None for the first entry of a process, which includes compilation."""
    ms = finite(entry.get("time_ms"))
    return ms if ms is not None and ms > 0 and entry.get("mfu") != {} else None


def _steps(entries: Sequence[Mapping[str, Any]], per_iter: float | None) -> tuple[LoggedStep, ...]:
    usual = statistics.median([ms for ms in map(_timed, entries) if ms is not None] or [0.0])
    steps: list[LoggedStep] = []
    last, seconds = 0, 0.0
    for entry in entries:
        tokens = finite(entry.get("tokens"))
        if tokens is None and per_iter is not None:
            tokens = entry["iter"] * per_iter
        if tokens is None or entry["iter"] <= last or (steps and tokens <= steps[-1].tokens):
            continue
        seconds += (entry["iter"] - last) * (_timed(entry) or usual) / 1e3
        last = entry["iter"]
        mfu = finite(mapping(entry.get("mfu")).get("mfu_percent"))
        norm = finite(mapping(entry.get("gradients")).get("global_norm"))
        steps.append(LoggedStep(last, tokens, seconds, finite(entry.get("loss")), mfu, norm))
    return tuple(steps)


def _evals(
    entries: Sequence[Mapping[str, Any]], steps: Sequence[LoggedStep], per_iter: float | None
) -> tuple[LoggedEval, ...]:
    logged = {step.iter: step.tokens for step in steps}
    found: list[LoggedEval] = []
    for entry in entries:
        iteration, loss = entry["iter"], finite(entry.get("val_loss"))
        if loss is None or (iteration not in logged and per_iter is None):
            continue
        tokens = logged.get(iteration, iteration * (per_iter or 0.0))
        if not found or tokens > found[-1].tokens:
            found.append(LoggedEval(iteration, tokens, loss, _tasks(entry)))
    return tuple(found)


def _tasks(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns task -> score -> value of the finite scores of an evaluation."""
    scores = {one_line(str(name)): mapping(found) for name, found in mapping(entry.get("tasks")).items()}
    return {
        name: {str(key): number for key, value in found.items() if (number := finite(value)) is not None}
        for name, found in scores.items()
    }


def _speed(
    entries: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> tuple[float | None, float | None, str | None]:
    """Returns tokens per second, MFU in percent, and what the MFU is relative to, over all timed iterations."""
    records = [mapping(entry.get("mfu")) for entry in entries]
    rates = [rate for record in records if (rate := finite(record.get("tokens_per_sec"))) and rate > 0]
    speed = finite(summary.get("tokens_per_sec")) or (statistics.harmonic_mean(rates) if rates else None)
    known = [r for r in records if finite(r.get("mfu_percent")) is not None]
    mfu, scale = finite(summary.get("mfu_percent")), None
    if known:
        if mfu is None:
            mfu = statistics.fmean(r["mfu_percent"] for r in known)
        scale = mfu_scale({"convention": "unknown", **known[-1]})
    return speed, mfu, scale


def _peak_gb(entries: Sequence[Mapping[str, Any]]) -> float | None:
    memory = [mapping(entry.get("memory")) for entry in entries]
    for key in ("peak_gb", "peak_rss_gb"):
        found = [value for record in memory if (value := finite(record.get(key))) is not None]
        if found:
            return max(found)
    return None


def _state(path: Path, log: RunLog) -> str:
    if log["summary"]:
        return "stopped" if log["summary"].get("stopped") else "finished"
    return "running" if is_running(path, log) else "stopped"


def is_running(path: Path, log: RunLog) -> bool:
    """Returns whether the process of a run is still there.

    The lock of the run's folder tells it. In a folder without a lock, such as a copy, the time of the last write does.

    Args:
        path: Where the log was read from.
        log: Its content.
    """
    if log["summary"]:
        return False
    locked = is_locked(path.parent)
    if locked is not None:
        return locked and find_log(path.parent).stem == path.stem  # the lock belongs to the newest log
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    pauses = [
        (late["iter"] - early["iter"]) * ms / 1e3
        for early, late in itertools.pairwise(log["training_iterations"])
        if (ms := _timed(late)) is not None
    ]
    return age < max(_QUIET_S, 3 * statistics.median(pauses or [0.0]))
