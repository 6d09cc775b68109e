"""Charts that lay the curves of runs over each other. matplotlib is loaded by `charts` only."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gptperf.formats import short_count
from gptperf.monitor.runs import Run
from gptperf.report.page import TEXT as TEXT_COLOR
from gptperf.report.tables import Line, pyplot, svg

__all__ = ["charts", "limits", "thinned"]

_BUCKETS = 150
_FEW = 6
"""Runs that are drawn in full; more are drawn finer."""
_EARLY = 0.05
"""Share of a run whose values do not stretch the axis: the loss falls fast there."""

Points = list[tuple[float, float]]


def charts(runs: Sequence[Run], lines: Sequence[Line], at: float | None = None) -> list[str]:
    """The SVG of each chart that has something to show.

    Args:
        runs: what to draw.
        lines: how, one a run; runs may share one.
        at: tokens at which they were ranked.
    """
    scale = _time_unit(runs)
    drawn = [
        _chart("training loss", runs, lines, _loss, tokens=True, at=at),
        _chart("validation loss", runs, lines, _evals, tokens=True, at=at, dots=True),
        _chart("training loss against time", runs, lines, lambda run: _over_time(run, scale), unit=scale),
        _chart("validation loss against time", runs, lines, lambda r: _evals_time(r, scale), unit=scale, dots=True),
        _chart("MFU, %", runs, lines, _mfu, tokens=True, floor=True),
        _chart("gradient norm before clipping", runs, lines, _norm, tokens=True, log=True),
    ]
    return [chart for chart in drawn if chart is not None]


def _loss(run: Run) -> Points:
    return [(s.tokens, s.loss) for s in run.steps if s.loss is not None]


def _evals(run: Run) -> Points:
    return [(e.tokens, e.loss) for e in run.evals]


def _mfu(run: Run) -> Points:
    return [(s.tokens, s.mfu_percent) for s in run.steps if s.mfu_percent is not None]


def _norm(run: Run) -> Points:
    return [(s.tokens, s.gradient_norm) for s in run.steps if s.gradient_norm is not None and s.gradient_norm > 0]


def _over_time(run: Run, unit: tuple[float, str]) -> Points:
    return [(s.seconds / unit[0], s.loss) for s in run.steps if s.loss is not None]


def _evals_time(run: Run, unit: tuple[float, str]) -> Points:
    found = [(run.seconds_at(e.tokens), e.loss) for e in run.evals]
    return [(seconds / unit[0], loss) for seconds, loss in found if seconds is not None]


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max((run.train_s or 0.0 for run in runs), default=0.0)
    return next((unit for unit in ((3600.0, "hours"), (60.0, "minutes")) if longest > 2 * unit[0]), (1.0, "seconds"))


def thinned(points: Points, buckets: int = _BUCKETS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean x, mean y, least and greatest y of stretches of equally many points."""
    size = -(-len(points) // buckets)
    whole = np.array(points)
    parts = [whole[start : start + size] for start in range(0, len(points), size)]
    xs, ys = (np.array([part[:, axis].mean() for part in parts]) for axis in (0, 1))
    return xs, ys, np.array([part[:, 1].min() for part in parts]), np.array([part[:, 1].max() for part in parts])


def limits(series: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """The y-axis that shows what comes after the early fall, and hides what few points lie far above."""
    late = [ys[xs >= _EARLY * xs[-1]] for xs, ys in series if len(xs) > 2]
    if not late:
        return None
    values = np.concatenate(late)
    low, high = values.min(), np.quantile(values, 0.995)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _chart(
    title: str,
    runs: Sequence[Run],
    lines: Sequence[Line],
    points_of: Callable[[Run], Points],
    *,
    tokens: bool = False,
    unit: tuple[float, str] = (1.0, ""),
    at: float | None = None,
    dots: bool = False,
    log: bool = False,
    floor: bool = False,
) -> str | None:
    plot = pyplot()
    found, axes = plot.subplots(figsize=(6.4, 3.7))
    series = []
    few = len(runs) <= _FEW
    for run, line in zip(runs, lines, strict=True):
        points = points_of(run)
        if not points:
            continue
        xs, ys, low, high = thinned(points)
        series.append((xs, ys))
        style: dict[str, Any] = {
            "linestyle": (0, line.dashes) if line.dashes else "-",
            "linewidth": 1.4 if few else 0.9,
        }
        if dots or len(xs) == 1:
            style |= {"marker": "o", "markersize": 3 if few else 2}
        axes.plot(xs, ys, color=line.color, **style)
        if few and len(points) > len(xs):
            axes.fill_between(xs, low, high, color=line.color, alpha=0.10, linewidth=0)
    if not series:
        plot.close(found)
        return None
    if log and max(ys.max() for _, ys in series) > 20 * min(ys.min() for _, ys in series):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plot.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(plot.NullFormatter())
    elif floor:
        axes.set_ylim(0, 1.1 * max(ys.max() for _, ys in series))
    elif (ends := limits(series)) is not None:
        axes.set_ylim(*ends)
    if at is not None:
        axes.axvline(at, color=TEXT_COLOR, linewidth=0.7, linestyle=":")
    axes.set_xlim(left=0)
    if tokens:
        axes.xaxis.set_major_formatter(plot.FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("tokens" if tokens else f"{unit[1]} of training")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color=TEXT_COLOR, alpha=0.12, linewidth=0.6)
    return svg(found, title)
