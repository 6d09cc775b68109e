"""Draws charts with the curves of several runs. Only `charts` loads matplotlib."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptperf.formats import short_count
from gptperf.monitor.runs import LoggedRun
from gptperf.report.figures import TEXT_COLOR, WIDTH, Line, logarithmic, pyplot, svg

__all__ = ["charts", "limits", "thinned"]

_BUCKETS = 150
"""Points of a drawn curve."""
_FEW = 6
"""Up to this number of runs, curves are thick and have bands; with more runs they are thin and have none."""
_EARLY = 0.05
"""Share of a run at its start, where the loss falls fast, whose values do not stretch the axis."""

Points = list[tuple[float, float]]


def charts(runs: Sequence[LoggedRun], lines: Sequence[Line], at: float | None = None) -> dict[str, str | None]:
    """Returns title -> SVG of every chart, or None for a chart that has nothing to show.

    Args:
        runs: The runs to draw.
        lines: The line of each run; runs may share a line.
        at: Tokens at which the runs are ranked, drawn as a dotted line.
    """
    unit = _time_unit(runs)
    scales = dict.fromkeys(run.mfu_scale for run in runs if run.mfu_scale)
    scale = f" ({' / '.join(scales)})" if scales else ""
    drawn = (
        _Chart("training loss", _loss, at=at),
        _Chart("validation loss", _evals, at=at, dots=True),
        _Chart("training loss against time", lambda run: _over_time(run, unit), unit),
        _Chart("validation loss against time", lambda run: _evals_over_time(run, unit), unit, dots=True),
        _Chart(f"MFU, %{scale}", _mfu, from_zero=True),
        _Chart("gradient norm before clipping", _norm, wide_range=True),
    )
    return {chart.title: _drawn(chart, runs, lines) for chart in drawn}


@dataclass(frozen=True)
class _Chart:
    """The content and the style of a chart."""

    title: str
    points_of: Callable[[LoggedRun], Points]
    unit: tuple[float, str] | None = None
    """Unit of the time axis, from `_time_unit`; None if the x-axis shows tokens."""
    at: float | None = None
    """Position of a dotted vertical line."""
    dots: bool = False
    """Whether each point is marked."""
    wide_range: bool = False
    """Whether the y-axis is logarithmic if the values have a wide range."""
    from_zero: bool = False
    """Whether the y-axis begins at zero."""


def _loss(run: LoggedRun) -> Points:
    return [(s.tokens, s.loss) for s in run.steps if s.loss is not None]


def _evals(run: LoggedRun) -> Points:
    return [(e.tokens, e.loss) for e in run.evals]


def _mfu(run: LoggedRun) -> Points:
    return [(s.tokens, s.mfu_percent) for s in run.steps if s.mfu_percent is not None]


def _norm(run: LoggedRun) -> Points:
    return [(s.tokens, s.gradient_norm) for s in run.steps if s.gradient_norm is not None and s.gradient_norm > 0]


def _over_time(run: LoggedRun, unit: tuple[float, str]) -> Points:
    return [(s.seconds / unit[0], s.loss) for s in run.steps if s.loss is not None]


def _evals_over_time(run: LoggedRun, unit: tuple[float, str]) -> Points:
    found = [(run.seconds_at(e.tokens), e.loss) for e in run.evals]
    return [(seconds / unit[0], loss) for seconds, loss in found if seconds is not None]


def _time_unit(runs: Sequence[LoggedRun]) -> tuple[float, str]:
    longest = max((run.train_s or 0.0 for run in runs), default=0.0)
    return next((unit for unit in ((3600.0, "hours"), (60.0, "minutes")) if longest > 2 * unit[0]), (1.0, "seconds"))


def thinned(points: Points, buckets: int = _BUCKETS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean x, mean y, smallest y and largest y of at most `buckets` groups of neighbouring points."""
    size = -(-len(points) // buckets)
    whole = np.array(points)
    parts = [whole[start : start + size] for start in range(0, len(points), size)]
    xs, ys = (np.array([part[:, axis].mean() for part in parts]) for axis in (0, 1))
    return xs, ys, np.array([part[:, 1].min() for part in parts]), np.array([part[:, 1].max() for part in parts])


def limits(series: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """Returns limits of the y-axis that show the values after the early fall, without the few that are far above."""
    late = [ys[xs >= _EARLY * xs[-1]] for xs, ys in series if len(xs) > 2]
    if not late:
        return None
    values = np.concatenate(late)
    low, high = values.min(), np.quantile(values, 0.995)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _drawn(chart: _Chart, runs: Sequence[LoggedRun], lines: Sequence[Line]) -> str | None:
    """Returns the SVG of a chart, or None if no run has a point."""
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(WIDTH, 3.0))
    series = []
    few = len(runs) <= _FEW
    for run, line in zip(runs, lines, strict=True):
        points = chart.points_of(run)
        if not points:
            continue
        xs, ys, low, high = thinned(points)
        series.append((xs, ys))
        style: dict[str, Any] = {
            "linestyle": (0, line.dashes) if line.dashes else "-",
            "linewidth": 1.4 if few else 0.9,
        }
        if chart.dots or len(xs) == 1:
            style |= {"marker": "o", "markersize": 3 if few else 2}
        axes.plot(xs, ys, color=line.color, **style)
        if few and len(points) > len(xs):
            axes.fill_between(xs, low, high, color=line.color, alpha=0.10, linewidth=0)
    if not series:
        plots.close(figure)
        return None
    _scale(axes, chart, series)
    if chart.at is not None:
        axes.axvline(chart.at, color=TEXT_COLOR, linewidth=0.7, linestyle=":")
    if chart.unit is None:
        axes.xaxis.set_major_formatter(plots.FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("tokens" if chart.unit is None else f"{chart.unit[1]} of training")
    axes.set_title(chart.title, loc="left", fontsize=10)
    axes.grid(axis="y", color=TEXT_COLOR, alpha=0.12, linewidth=0.6)
    return svg(figure, chart.title)


def _scale(axes: Any, chart: _Chart, series: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Sets the scale and the limits of both axes."""
    largest = max(ys.max() for _, ys in series)
    if chart.wide_range and largest > 20 * min(ys.min() for _, ys in series):
        logarithmic(axes.yaxis)
    elif chart.from_zero:
        axes.set_ylim(0, 1.1 * largest)
    elif (ends := limits(series)) is not None:
        axes.set_ylim(*ends)
    axes.set_xlim(left=0)
