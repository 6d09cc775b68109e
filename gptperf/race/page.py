"""The report of a race as text, JSON and a page. This module does not import torch."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptperf.compare import curves
from gptperf.experiment.job import Job
from gptperf.experiment.rates import best_of
from gptperf.files import replace_text
from gptperf.formats import counted, number, short_count
from gptperf.monitor.runs import LoggedRun
from gptperf.race.envelope import Interval
from gptperf.race.outcome import Cost, Outcome, interval_text, plain
from gptperf.race.state import STAGES, Race
from gptperf.report.figures import TEXT_COLOR, WIDTH, Line, legend, lines_for, logarithmic, pyplot, svg
from gptperf.report.page import Section, Tile, render
from gptperf.report.tables import Table, aligned

__all__ = ["html", "listing", "record", "text", "write"]

_METHOD = (
    "Each loss is measured at the end of a cooldown, the last fifth of a run; no loss of a trunk counts. "
    "Ratios: the tokens of the second arm divided by those of the first one at equal loss. Between the points the "
    "logarithm of the tokens is linear in the loss, and nothing is extrapolated.",
    "Intervals of tokens: 95%, expanded percentiles of a bootstrap over paired seeds (in simulations the true ratio is "
    "inside in 92% of races with 5 seeds, in 94% with 6). Interval of the speed: Student's t over the turns. The time "
    "ratio is the product; the distances of its ends add up in squares of logarithms.",
)


def listing(race: Race) -> str:
    """Returns a table of the trainings that are known so far, with their progress."""
    rows = [
        (stage, name, f"{job.config.train.max_iters:,}", f"{job.config.optimizer.learning_rate:g}", job.state())
        for stage in STAGES
        for chain in race.chains(stage)
        for name, job in chain
    ]
    return aligned(Table(("stage", "training", "iterations", "learning rate", "state"), rows, frozenset({0, 1, 4})))


def _ratios(found: Outcome) -> Table | None:
    """Returns the ratios at each loss and over all of them, with the costs of both arms."""
    if found.distance is None:
        return None
    names = [arm.name for arm in found.race.arms]
    columns = (f"loss, {found.unit}", "token ratio (95%)", *(f"{what}, {name}" for what in _COSTS for name in names))
    rows = []
    for loss, ratio, costs in zip(found.distance.losses, found.distance.at_loss, found.costs, strict=True):
        cells = [_COSTS[what](cost) for what in _COSTS for cost in costs]
        rows.append((f"{loss:.4f}", interval_text(ratio), *cells))
    rows.append(("all three", interval_text(found.distance.whole), *[""] * (len(columns) - 2)))
    return Table(columns, rows)


def _cost_of(name: str, form: str, scale: float = 1.0) -> Any:
    def cell(cost: Cost) -> str:
        value = getattr(cost, name)
        return "-" if value is None else number(value * scale, form)

    return cell


_COSTS: dict[str, Any] = {
    "tokens": lambda cost: short_count(cost.tokens),
    "GPU hours": _cost_of("seconds", ",.3g", 1 / 3600),
    "MJ": _cost_of("joules", ",.3g", 1e-6),
    "$": _cost_of("dollars", ",.2f"),
}


def _ends(found: Outcome) -> Table | None:
    """Returns the mean losses at the ends of the cooldowns, with their spread over the seeds."""
    if not found.losses:
        return None
    rows = []
    for place, arm in enumerate(found.race.arms):
        losses = np.array([pair[place] for pair in found.losses.values()])
        spread = losses.std(0, ddof=1) if len(losses) > 1 else [None] * losses.shape[1]
        for tokens, mean, deviation in zip(arm.tokens, losses.mean(0), spread, strict=True):
            seeds = f"{len(losses)} of {found.race.seeds}"
            rows.append((arm.name, short_count(tokens), f"{mean:.4f}", number(deviation, ".4f"), seeds))
    return Table(("arm", "tokens", f"loss, {found.unit}", "sd", "seeds"), rows)


def _tuning(found: Outcome) -> Table:
    """Returns the losses of all learning rates that were tried, which are the same in number for both arms."""
    rows = []
    for arm in found.race.arms:
        tuning = found.race.tuning(arm)
        for part, jobs in (("1/4", tuning.quarter), ("1", tuning.full)):
            best = best_of(jobs)
            for job in jobs:
                loss = found.race.failed.get(job.out_dir, number(job.val_loss(), ".4f"))
                rate = f"{job.config.optimizer.learning_rate:g}"
                rows.append((arm.name, part, rate, loss, "best" if job is best else ""))
    columns = ("arm", "of the length", "learning rate", "validation loss, nats per token", "")
    return Table(columns, rows, frozenset({0, 4}))


def _speed_line(found: Outcome) -> str:
    speed = found.speed
    if speed is None:
        return "Speed: not measured, so there is no time ratio."
    rates = ", ".join(
        f"{arm.name} {1 / seconds:,.0f} tokens/s" + ("" if joules is None else f" at {joules / seconds:,.0f} W")
        for arm, seconds, joules in zip(found.race.arms, speed.seconds_per_token, speed.joules_per_token, strict=True)
    )
    return (
        f"Speed on one {speed.device}, {counted(speed.turns, 'window')} of each arm in turns: {rates}; seconds per "
        f"token, ratio {interval_text(speed.ratio)}."
    )


def _title(race: Race) -> str:
    return f"Race: {race.arms[0].name} against {race.arms[1].name}"


def text(found: Outcome) -> str:
    """Returns the report as text for a terminal."""
    tables = [aligned(table) for table in (_ratios(found), _ends(found), _tuning(found)) if table is not None]
    failed = [f"failed: {folder}: {how}" for folder, how in found.race.failed.items()]
    parts = [_title(found.race), *tables, "\n".join([_speed_line(found), *failed])]
    return "\n\n".join([*parts, "\n".join(_METHOD), found.verdict])


def _record_of(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else {name: plain(value) for name, value in dataclasses.asdict(found).items()}


def record(found: Outcome) -> dict[str, Any]:
    """Returns the report in the form of the JSON file; an end of an interval that was not reached is null."""
    distance, speed = found.distance, found.speed
    arms = []
    for place, arm in enumerate(found.race.arms):
        tuning = found.race.tuning(arm)
        arms.append(
            {
                "name": arm.name,
                "tokens": arm.tokens,
                "losses": {seed: pair[place] for seed, pair in found.losses.items()},
                "factor": tuning.factor,
                "quarter": _tried(tuning.quarter),
                "full": _tried(tuning.full),
            }
        )
    at_loss = (
        []
        if distance is None
        else [
            {
                "loss": loss,
                "tokens": tokens,
                "ratio": _record_of(ratio),
                "costs": [dataclasses.asdict(c) for c in costs],
            }
            for loss, tokens, ratio, costs in zip(
                distance.losses, distance.tokens, distance.at_loss, found.costs, strict=True
            )
        ]
    )
    return {
        "verdict": found.verdict,
        "problems": found.race.problems(),
        "unit": found.unit,
        "arms": arms,
        "at_loss": at_loss,
        "token_ratio": _record_of(None if distance is None else distance.whole),
        "speed": None if speed is None else dataclasses.asdict(speed),
        "time_ratio": _record_of(found.time),
        "failed": {str(folder): how for folder, how in found.race.failed.items()},
    }


def _tried(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return [{"learning_rate": job.config.optimizer.learning_rate, "val_loss": job.val_loss()} for job in jobs]


def write(found: Outcome) -> Path:
    """Writes `race.json` into the folder of the race, and returns its path.

    Raises:
        DiskError: The file cannot be written.
    """
    path = found.race.out / "race.json"
    replace_text(path, json.dumps(record(found), indent=2, allow_nan=False) + "\n")
    return path


def html(found: Outcome) -> str:
    """Returns the report as a page: the verdict, ratios, envelopes, learning rates, and curves.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    race = found.race
    keys = lines_for([arm.name for arm in race.arms])
    charts: dict[str, str | None] = {"envelopes": _envelopes(found, keys), "learning rates": _rates(race, keys)}
    tiles = [] if found.distance is None else [Tile("token ratio", interval_text(found.distance.whole))]
    tiles += [] if found.speed is None else [Tile("speed: seconds per token, ratio", interval_text(found.speed.ratio))]
    tiles += [] if found.time is None else [Tile("time ratio", interval_text(found.time))]
    ratios, ends = _ratios(found), _ends(found)
    lines = "Line: mean envelope. Dots: seeds. Dotted: the losses at which the envelopes are compared."
    sections = [
        Section("", lines=[found.verdict], tiles=tiles, tables=[ratios] if ratios is not None else []),
        Section("Losses at the ends of the cooldowns", [lines], [ends] if ends is not None else [], ["envelopes"]),
        Section("Learning rates", race.problems(), [_tuning(found)], ["learning rates"]),
        Section("Speed and method", [_speed_line(found), *_METHOD]),
    ]
    runs: list[LoggedRun] = []
    drawn: list[Line] = []
    for chain in race.chains("seeds"):
        for name, job in chain:
            log = job.log()
            if log is not None:
                runs.append(dataclasses.replace(log, name=name))
                drawn.append(keys[name.startswith(f"{race.arms[1].name}, ")])
    shown = curves.charts(runs, drawn)
    charts |= shown
    line = "Trunks and cooldowns of every seed."
    sections.append(Section("Curves", [line], charts=list(shown), legend=keys, folded=True))
    return render(_title(race), sections, charts)


def _envelopes(found: Outcome, keys: Sequence[Line]) -> str | None:
    """Draws loss against tokens at the ends of the cooldowns."""
    if not found.losses:
        return None
    figure, axes = pyplot().subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for place, (arm, key) in enumerate(zip(found.race.arms, keys, strict=True)):
        losses = np.array([pair[place] for pair in found.losses.values()])
        axes.plot(arm.tokens, np.minimum.accumulate(losses.mean(0)), color=key.color, marker="D", label=key.name)
        for row in losses:
            axes.scatter(arm.tokens, row, s=8, color=key.color, alpha=0.6)
    for loss in found.distance.losses if found.distance is not None else ():
        axes.axhline(loss, color=TEXT_COLOR, linewidth=0.7, linestyle=":")
    return _finished(figure, axes, "tokens", f"loss, {found.unit}", "envelopes")


def _rates(race: Race, keys: Sequence[Line]) -> str | None:
    """Draws the losses of the learning rates that were tried."""
    figure, axes = pyplot().subplots(figsize=(WIDTH, 3.0), layout="constrained")
    points = 0
    for arm, key in zip(race.arms, keys, strict=True):
        tuning = race.tuning(arm)
        for where, jobs, style in (("quarter", tuning.quarter, ":"), ("full", tuning.full, "-")):
            tried = [(job.config.optimizer.learning_rate, loss) for job in jobs if (loss := job.val_loss()) is not None]
            points += len(tried)
            if tried:
                axes.plot(*zip(*tried, strict=True), style, marker="o", color=key.color, label=f"{key.name}, {where}")
    if not points:
        pyplot().close(figure)
        return None
    return _finished(figure, axes, "learning rate", "validation loss, nats per token", "rates")


def _finished(figure: Any, axes: Any, x: str, y: str, name: str) -> str:
    logarithmic(axes.xaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    legend(axes)
    return svg(figure, name)
