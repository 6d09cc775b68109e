"""The report of pairs of forks as text, JSON and a page. This module does not import torch."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptperf.compare import curves
from gptperf.files import replace_text
from gptperf.formats import short_count
from gptperf.monitor.runs import LoggedRun
from gptperf.race.fork import Decision, Forks
from gptperf.race.sequence import bounds
from gptperf.report.figures import TEXT_COLOR, WIDTH, Line, legend, lines_for, pyplot, svg
from gptperf.report.page import Section, render
from gptperf.report.tables import Table, aligned

__all__ = ["html", "record", "text", "write"]


def _sentence(forks: Forks, decisions: Sequence[Decision]) -> str:
    """Returns the result in a sentence."""
    names = {arm.name: found for arm, found in zip(forks.arms[1:], decisions, strict=True)}
    better = [(found.bounds.mean, name) for name, found in names.items() if found.verdict == "better"]
    left = [name for name, found in names.items() if found.verdict == "undecided"]
    parts = [f"{min(better)[1]} has the lowest loss of what is better than the run as it is"] if better else []
    parts += [f"undecided: {', '.join(left)}"] if left else []
    return "; ".join(parts or ["nothing is better than the run as it is"]) + "."


def _method(forks: Forks) -> str:
    chance = 1 - forks.level * (len(forks.arms) - 1)
    what = "Forks" if forks.step else "Short runs"
    warning = (
        f" {', '.join(forks.inherited)}: the forks inherit what the unchanged run has done; {forks.run}@0 tries "
        "a change of the optimizer from the start; if the verdicts differ, trust neither."
    )
    return (
        f"{what} from {forks.run}@{forks.step} to iteration {forks.end}, {short_count(forks.tokens)} tokens in all. "
        "Difference: final validation loss, nats per token, minus the unchanged run's, in pairs with the same data "
        "and dropout. The interval is a confidence sequence for the mean of independent normal differences with an "
        f"unknown variance (Wang and Ramdas, 2023): with a probability of {chance:.0%} "
        "no true difference is ever outside its interval, however often one looks. It is not about longer runs."
    ) + (warning if forks.inherited else "")


def _table(forks: Forks, decisions: Sequence[Decision]) -> Table:
    rows = []
    for arm, found in zip(forks.arms[1:], decisions, strict=True):
        mean, low, high = found.bounds
        interval = f"{low:+.4f} to {high:+.4f}" if math.isfinite(low) else "-"
        difference = f"{mean:+.4f}" if found.differences else "-"
        rows.append((arm.name, str(len(found.differences)), difference, interval, found.verdict))
    return Table(("change", "pairs", "difference", "interval at all times", "verdict"), rows, frozenset({0, 4}))


def _decisions(forks: Forks) -> list[Decision]:
    return [forks.decision(arm) for arm in forks.arms[1:]]


def text(forks: Forks) -> str:
    """Returns the report as text for a terminal."""
    found = _decisions(forks)
    return "\n\n".join([_method(forks), aligned(_table(forks, found)), _sentence(forks, found)])


def record(forks: Forks) -> dict[str, Any]:
    """Returns the report in the form of the JSON file; an end of an interval that is not known yet is null."""
    rows = []
    found = _decisions(forks)
    for arm, one in zip(forks.arms[1:], found, strict=True):
        ends = [value if math.isfinite(value) else None for value in one.bounds]
        figures = dict(zip(("mean", "low", "high"), ends, strict=True))
        rows.append({"name": arm.name, "verdict": one.verdict, "differences": one.differences, **figures})
    return {
        "verdict": _sentence(forks, found),
        "run": str(forks.run),
        "step": forks.step,
        "end": forks.end,
        "tokens": forks.tokens,
        "changes": rows,
        "failed": {str(folder): how for folder, how in forks.failed.items()},
    }


def write(forks: Forks) -> Path:
    """Writes `race.json` into the folder of the forks, and returns its path.

    Raises:
        DiskError: The file cannot be written.
    """
    path = forks.out / "race.json"
    replace_text(path, json.dumps(record(forks), indent=2, allow_nan=False) + "\n")
    return path


def html(forks: Forks) -> str:
    """Returns the report as a page: the verdict, the differences with their intervals, and curves.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    found, keys = _decisions(forks), lines_for([arm.name for arm in forks.arms])
    charts: dict[str, str | None] = {"differences": _sequence_chart(forks, found, keys[1:])}
    runs: list[LoggedRun] = []
    drawn: list[Line] = []
    for arm, key in zip(forks.arms, keys, strict=True):
        for pair in range(forks.pairs):
            log = forks.job(arm, pair).log()
            if log is not None:
                runs.append(dataclasses.replace(log, name=f"{arm.name}, pair {pair + 1}"))
                drawn.append(key)
    shown = curves.charts(runs, drawn)
    sections = [
        Section("", [_sentence(forks, found)], [_table(forks, found)], ["differences"], below=[_method(forks)]),
        Section("Curves", charts=list(shown), legend=keys, folded=True),
    ]
    return render(f"Forks of {forks.run}@{forks.step}", sections, charts | shown)


def _sequence_chart(forks: Forks, decisions: Sequence[Decision], keys: Sequence[Line]) -> str | None:
    """Draws the mean difference and its interval after each pair; None before the first pair."""
    if not any(found.differences for found in decisions):
        return None
    figure, axes = pyplot().subplots(figsize=(WIDTH, 3.0), layout="constrained")
    for found, key in zip(decisions, keys, strict=True):
        counts = range(1, len(found.differences) + 1)
        so_far = [bounds(found.differences[:count], forks.level) for count in counts]
        axes.plot(counts, [one.mean for one in so_far], marker="o", color=key.color, label=key.name)
        known = [(count, one) for count, one in zip(counts, so_far, strict=True) if math.isfinite(one.low)]
        if known:
            lows, highs = [one.low for _, one in known], [one.high for _, one in known]
            axes.fill_between([count for count, _ in known], lows, highs, color=key.color, alpha=0.2, linewidth=0)
    axes.axhline(0, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    axes.set_xlabel("pairs")
    axes.set_ylabel("difference; lower is better")
    legend(axes)
    return svg(figure, "differences")
