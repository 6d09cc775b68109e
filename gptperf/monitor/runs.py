"""Runs as they were logged: journals and logs read as far as they go, as curves over tokens. No torch here."""

import bisect
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptperf.errors import DataError
from gptperf.formats import one_line
from gptperf.monitor.journal import assemble, find_journal

__all__ = ["Eval", "LeftOut", "Run", "Step", "finite", "read_run", "read_runs"]

_LARGEST = 1e30
_QUIET_S = 600.0
"""A run that is not finished counts as stopped after this many seconds without an entry, or three usual pauses."""


class Step(NamedTuple):
    """A logged iteration."""

    iter: int
    tokens: float
    seconds: float
    """Of training so far, without compilation, evaluation and saving."""
    loss: float | None
    mfu_percent: float | None
    gradient_norm: float | None


class Eval(NamedTuple):
    """An evaluation."""

    iter: int
    tokens: float
    loss: float


class LeftOut(NamedTuple):
    """What could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Run:
    """One run, as far as it was logged."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """Key -> value, without sections."""
    info: Mapping[str, Any]
    """What the run said of itself at its start."""
    summary: Mapping[str, Any]
    steps: tuple[Step, ...]
    evals: tuple[Eval, ...]
    state: str
    """finished, running or stopped."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    mfu_convention: str | None
    """How the FLOPs are counted, and the basis of the peak where it is not dense."""
    peak_gb: float | None
    """Of the GPU; on a CPU of the process."""
    wall_s: float | None
    """From the start of the process to its end; None where there were several, or no end."""
    damaged_lines: int
    resumes: int

    @property
    def iterations(self) -> int:
        """The last iteration that was logged."""
        return max([*(s.iter for s in self.steps[-1:]), *(e.iter for e in self.evals[-1:]), 0])

    @property
    def max_iters(self) -> int | None:
        """Iterations that were asked for."""
        value = self.config.get("max_iters")
        return value if type(value) is int else None

    @property
    def train_s(self) -> float | None:
        """Seconds of training, without compilation, evaluation and saving."""
        return self.steps[-1].seconds if self.steps else None

    def seconds_at(self, tokens: float) -> float | None:
        """Seconds of training after that many tokens."""
        return interpolated([(s.tokens, s.seconds) for s in self.steps], tokens, nearest=True)

    def val_loss_at(self, tokens: float) -> float | None:
        """Validation loss after that many tokens, linear between the evaluations around; None outside of them."""
        return interpolated([(e.tokens, e.loss) for e in self.evals], tokens)

    def train_loss_at(self, tokens: float) -> float | None:
        """Mean of the training losses logged in the last tenth of that many tokens, or the last one before."""
        before = [(s.tokens, s.loss) for s in self.steps if s.tokens <= tokens and s.loss is not None]
        late = [loss for at, loss in before if at > 0.9 * tokens] or [loss for _, loss in before[-1:]]
        return statistics.fmean(late) if late else None

    def remarks(self) -> list[str]:
        """What a reader has to know of this log, a line each."""
        lines = []
        if self.state != "finished":
            lines.append(f"{self.name}: {self.state}, read up to iteration {self.iterations}")
        if self.damaged_lines:
            count = "1 damaged line" if self.damaged_lines == 1 else f"{self.damaged_lines} damaged lines"
            lines.append(f"{self.name}: {count} left out")
        return lines


def interpolated(points: Sequence[tuple[float, float]], x: float, *, nearest: bool = False) -> float | None:
    """The value at `x` between points that ascend; outside of them None, or that of the nearest one."""
    if not points:
        return None
    if not points[0][0] <= x <= points[-1][0]:
        return (points[0] if x < points[0][0] else points[-1])[1] if nearest else None
    place = min(bisect.bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
    (left, low), (right, high) = points[max(place - 1, 0)], points[place]
    return high if right == left else low + (high - low) * (x - left) / (right - left)


def finite(value: Any) -> float | None:
    """A number of a size that can be reckoned with, or None for whatever else a log may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read what can be read; a run that is named twice, by its folder and its files, is read once.

    Args:
        paths: folders of runs (the run that started last), run_*.jsonl, run_*.json.

    Returns:
        The runs, with short names that differ, and what was left out.
    """
    files: dict[Path, Path] = {}
    left_out = []
    for path in paths:
        try:
            found = _locate(Path(path))
        except DataError as error:
            left_out.append(LeftOut(one_line(str(path), 200), one_line(str(error), 300)))
            continue
        run = Path(os.path.abspath(found)).with_suffix("")
        if run not in files or found.suffix == ".jsonl":
            files[run] = found
    runs = []
    for name, path in zip(_names(list(files)), files.values(), strict=True):
        try:
            runs.append(read_run(path, name))
        except DataError as error:
            left_out.append(LeftOut(one_line(str(path), 200), one_line(str(error), 300)))
    return runs, left_out


def _locate(path: Path) -> Path:
    """The file of a run."""
    try:
        if os.path.isdir(path):
            logs = sorted(path.glob("run_*.json"))
            found = find_journal(path) or (logs[-1] if logs else None)
            if found is None:
                raise DataError("holds no run_*.jsonl and no run_*.json")
            return found
        if not os.path.exists(path):
            raise DataError("no such file or folder")
        if path.suffix not in (".jsonl", ".json") or not os.path.isfile(path):
            raise DataError("neither the folder of a run nor a run_*.jsonl or run_*.json")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    return path


def _names(runs: Sequence[Path]) -> list[str]:
    """The folder of each run, or folder and file where several lie in one, without what all paths share."""
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


def read_run(path: Path, name: str) -> Run:
    """Read one journal or log.

    Raises:
        DataError: it cannot be read, or holds nothing of a run.
    """
    log: Mapping[str, Any] = assemble(path) if path.suffix == ".jsonl" else _read_json(path)
    config = _flat(_tables(log, "config"))
    info, summary = _tables(log, "startup_info"), _tables(log, "summary")
    entries = [e for e in _list(log, "training_iterations") if _iter(e) is not None]
    if not (entries or config or info or summary or _list(log, "eval_steps")):
        raise DataError("holds no entry of a run")
    per_iter = _tokens_per_iter(info, config, entries)
    steps = _steps(entries, per_iter)
    evals = _evals(_list(log, "eval_steps"), steps, per_iter)
    speed, mfu, convention = _speed(entries, summary)
    resumes = len(_list(log, "resumes"))
    return Run(
        name=name,
        path=path,
        config=config,
        info=info,
        summary=summary,
        steps=steps,
        evals=evals,
        state=("stopped" if summary.get("stopped") else "finished") if summary else _unfinished(path, entries),
        tokens_per_sec=speed,
        mfu_percent=mfu,
        mfu_convention=convention,
        peak_gb=_peak_gb(entries),
        wall_s=None if resumes else finite(summary.get("wall_time_s")),
        damaged_lines=int(finite(log.get("damaged_lines")) or 0),
        resumes=resumes,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError("holds no entry of a run")
    return found


def _tables(log: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = log.get(key)
    return value if isinstance(value, dict) else {}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys out of their sections; a log may also hold them without."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name != "origins":
            found |= value if isinstance(value, dict) else {name: value}
    return found


def _list(log: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = log.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _iter(entry: Mapping[str, Any]) -> int | None:
    value = entry.get("iter")
    return value if type(value) is int and 0 <= value < 2**53 else None


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
    """Milliseconds of a usual iteration; the first entry of a process has none of them."""
    ms = finite(entry.get("time_ms"))
    return ms if ms is not None and ms > 0 and entry.get("mfu") != {} else None


def _steps(entries: Sequence[Mapping[str, Any]], per_iter: float | None) -> tuple[Step, ...]:
    usual = statistics.median([ms for ms in map(_timed, entries) if ms is not None] or [0.0])
    steps: list[Step] = []
    last, seconds = 0, 0.0
    for entry in entries:
        tokens = finite(entry.get("tokens"))
        if tokens is None and per_iter is not None:
            tokens = entry["iter"] * per_iter
        if tokens is None or entry["iter"] <= last or (steps and tokens <= steps[-1].tokens):
            continue
        seconds += (entry["iter"] - last) * (_timed(entry) or usual) / 1e3
        last = entry["iter"]
        mfu = finite(_tables(entry, "mfu").get("mfu_percent"))
        norm = finite(_tables(entry, "gradients").get("global_norm"))
        steps.append(Step(last, tokens, seconds, finite(entry.get("loss")), mfu, norm))
    return tuple(steps)


def _evals(entries: Sequence[Mapping[str, Any]], steps: Sequence[Step], per_iter: float | None) -> tuple[Eval, ...]:
    logged = {step.iter: step.tokens for step in steps}
    found: list[Eval] = []
    for entry in entries:
        number, loss = _iter(entry), finite(entry.get("val_loss"))
        if number is None or loss is None or (number not in logged and per_iter is None):
            continue
        tokens = logged.get(number, number * (per_iter or 0.0))
        if not found or tokens > found[-1].tokens:
            found.append(Eval(number, tokens, loss))
    return tuple(found)


def _speed(
    entries: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> tuple[float | None, float | None, str | None]:
    """Tokens a second, MFU and its convention over all timed iterations."""
    records = [_tables(entry, "mfu") for entry in entries]
    rates = [rate for record in records if (rate := finite(record.get("tokens_per_sec"))) and rate > 0]
    speed = finite(summary.get("tokens_per_sec")) or (statistics.harmonic_mean(rates) if rates else None)
    known = [r for r in records if finite(r.get("mfu_percent")) is not None]
    mfu, convention = finite(summary.get("mfu_percent")), None
    if known:
        if mfu is None:
            mfu = statistics.fmean(r["mfu_percent"] for r in known)
        basis = known[-1].get("peak_basis")
        convention = one_line(str(known[-1].get("convention", "unknown")), 20)
        convention += "" if basis in (None, "dense") else f", {one_line(str(basis), 20)} peak"
    return speed, mfu, convention


def _peak_gb(entries: Sequence[Mapping[str, Any]]) -> float | None:
    memory = [_tables(entry, "memory") for entry in entries]
    for key in ("peak_gb", "peak_rss_gb"):
        found = [value for record in memory if (value := finite(record.get(key))) is not None]
        if found:
            return max(found)
    return None


def _unfinished(path: Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run without an end goes on, by when its log was last written."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return "stopped"
    pauses = [
        (late["iter"] - early["iter"]) * ms / 1e3
        for early, late in itertools.pairwise(entries)
        if (ms := _timed(late)) is not None
    ]
    return "running" if age < max(_QUIET_S, 3 * statistics.median(pauses or [0.0])) else "stopped"
