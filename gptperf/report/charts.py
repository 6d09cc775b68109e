"""Draws the charts of a run's page. Only `draw` loads matplotlib."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import entries_of, finite, mapping, series, value_at
from gptperf.monitor.waterfall import PARTS
from gptperf.report.figures import (
    BLUE,
    COLORS,
    GRAY,
    ORANGE,
    RED,
    TEXT_COLOR,
    WIDTH,
    legend,
    logarithmic,
    pyplot,
    svg,
    waterfall,
)
from gptperf.report.page import clean

__all__ = ["CAPTIONS", "draw", "layer_order"]

CAPTIONS = {
    "loss": "Loss, nats per token: training, and the evaluations on validation data.",
    "loss_tail": "The second half, on a linear axis.",
    "tasks": "Share of the items of each task that are right.",
    "learning_rate": "",
    "gradient_norm": "Global norm of the gradient, before clipping.",
    "layers": "Norm of the gradient by layer.",
    "components": "Norm of the gradient by component.",
    "histogram": "Magnitudes of the gradient's elements, last entry that has them; outlined: the first one.",
    "zero_share": "Share of the gradient's elements that are zero.",
    "update_ratios": "Norm of an update over that of the weights, by component.",
    "speed": "Speed, without evaluation, saving and compilation.",
    "memory": "Memory, GB of 1e9 bytes.",
    "waterfall": "Points of MFU that each part of a step costs; dotted: the mean MFU of the run.",
}
_POINTS = 600
"""Largest number of points of a line; if there are more entries, they are averaged."""
_COLUMNS, _ROWS = 48, 64
"""Largest numbers of columns and rows of the heat map."""
_LINES = 8
"""Largest number of layers that are drawn as lines; more layers are drawn as a heat map."""
_SIZE, _LOW = (WIDTH, 2.7), (WIDTH, 2.1)
_LABELS = 8
"""Largest number of labels of the histogram's axis."""


def draw(name: str, log: RunLog) -> str | None:
    """Returns the SVG element of a chart, or None where the log has nothing to draw.

    Args:
        name: One of `CAPTIONS`.
        log: Log of the run.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    figure = _CHARTS[name](pyplot(), log)
    return None if figure is None else svg(figure, name)


def _axes(plots: Any, size: tuple[float, float] = _SIZE, label: str = "iteration") -> tuple[Any, Any]:
    found, axes = plots.subplots(figsize=size, layout="constrained")
    axes.set_xlabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
    return found, axes


def _binned(xs: Sequence[float], ys: Sequence[float], most: int) -> list[tuple[float, float, float, float]]:
    """Returns (x, mean, smallest, largest) of at most `most` groups of neighbours."""
    size = max(1, math.ceil(len(xs) / most))
    groups = [(xs[i : i + size], ys[i : i + size]) for i in range(0, len(xs), size)]
    return [(x[-1], math.fsum(y) / len(y), min(y), max(y)) for x, y in groups]


def _line(axes: Any, xs: Sequence[float], ys: Sequence[float], color: str, label: str = "", **style: Any) -> None:
    """Draws a line, with a band from the smallest to the largest value if entries are averaged."""
    points = _binned(xs, ys, _POINTS)
    x, mean = [p[0] for p in points], [p[1] for p in points]
    if len(points) < len(xs):
        axes.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=color, alpha=0.2, linewidth=0)
    mark = {"marker": "o", "markersize": 3} if len(points) <= 40 else {}
    axes.plot(x, mean, color=color, label=_label(label), **({"linewidth": 1.1} | mark | style))


def _label(text: str) -> str:
    text = clean(" ".join(text[:100].split()))
    text = text if len(text) <= 18 else f"{text[:17]}\u2026"
    return f" {text}" if text.startswith("_") else text


def _wide(values: Sequence[float], factor: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) > factor * min(values)


def _dashed(axes: Any, value: float | None, label: str, color: str = TEXT_COLOR, style: str = "--") -> None:
    if value is not None:
        axes.axhline(value, color=color, linewidth=0.9, linestyle=style, label=label)


def _loss(plots: Any, log: RunLog, first: int = 0, scale: str = "log") -> Any:
    entries = [entry for entry in log["training_iterations"] if entry["iter"] >= first]
    evals = [entry for entry in log["eval_steps"] if entry["iter"] >= first]
    (xs, ys), (eval_xs, eval_ys) = series(entries, "loss"), series(evals, "val_loss")
    if not xs and not eval_xs:
        return None
    found, axes = _axes(plots)
    if xs:
        _line(axes, xs, ys, BLUE, "training")
    if eval_xs:
        axes.plot(eval_xs, eval_ys, color=ORANGE, marker="o", markersize=3.5, linewidth=1, label="validation")
        best = min(range(len(eval_ys)), key=eval_ys.__getitem__)
        axes.plot(eval_xs[best], eval_ys[best], "o", markersize=9, fillstyle="none", color=ORANGE, label="best")
    spikes = [entry for entry in entries if value_at(entry, "stability", "spike") is True]
    spike_xs, spike_ys = series(spikes, "loss")
    if spike_xs:
        axes.plot(spike_xs, spike_ys, "x", color=RED, markersize=7, label="spike", zorder=4)
    flat = [entry["iter"] for entry in entries if value_at(entry, "stability", "plateau") is True]
    if flat:
        low = axes.get_xaxis_transform()
        axes.plot(flat, [0.015] * len(flat), "s", color=GRAY, markersize=3, label="plateau", transform=low)
    for place, resume in enumerate(log["resumes"][-50:]):
        if resume["iter"] >= first:
            label = "" if place else "resumed"
            axes.axvline(resume["iter"], color=TEXT_COLOR, linewidth=0.7, linestyle=":", label=label)
    if scale == "log" and _wide([*ys, *eval_ys], 2):
        logarithmic(axes.yaxis)
    axes.set_ylabel("loss")
    legend(axes)
    return found


def _loss_tail(plots: Any, log: RunLog) -> Any:
    iterations = [entry["iter"] for entry in log["training_iterations"]]
    return _loss(plots, log, iterations[len(iterations) // 2], "linear") if len(iterations) >= 20 else None


def _tasks(plots: Any, log: RunLog) -> Any:
    names = dict.fromkeys(str(name) for entry in log["eval_steps"] for name in mapping(entry.get("tasks")))
    lines = {name: series(log["eval_steps"], "tasks", name, "acc") for name in names}
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return None
    found, axes = _axes(plots)
    for color, (name, (xs, ys)) in zip(COLORS, lines.items(), strict=False):
        axes.plot(xs, ys, color=color, marker="o", markersize=3.5, linewidth=1, label=_label(name))
    axes.set_ylabel("acc")
    legend(axes)
    return found


def _learning_rate(plots: Any, log: RunLog) -> Any:
    xs, ys = series(log["training_iterations"], "lr")
    if not xs:
        return None
    found, axes = _axes(plots, _LOW)
    _line(axes, xs, ys, BLUE)
    axes.set_ylim(bottom=min(0.0, *ys))
    return found


def _gradient_norm(plots: Any, log: RunLog) -> Any:
    xs, ys = series(log["training_iterations"], "gradients", "global_norm")
    if not xs:
        return None
    found, axes = _axes(plots)
    _line(axes, xs, ys, BLUE, "global norm")
    clip = finite(value_at(log["config"], "optimizer", "grad_clip"))
    if clip is not None and 0 < clip < 20 * max(ys):
        _dashed(axes, clip, "grad_clip")
    if _wide(ys, 10):
        logarithmic(axes.yaxis)
    legend(axes)
    return found


def layer_order(name: str) -> tuple[int, int, str]:
    """Returns a sort key that puts the embedding before the blocks, and the blocks before the head."""
    if name.isascii() and name.isdigit() and len(name) < 10:
        return 1, int(name), ""
    return (0, 0, "") if name == "embedding" else (2, 0, name)


def _several(plots: Any, log: RunLog, path: str, names: Sequence[str]) -> Any:
    """Draws a line for each key of a mapping under `gradients`, on a logarithmic axis."""
    lines = {name: series(log["training_iterations"], "gradients", path, name, positive=True) for name in names}
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return None
    found, axes = _axes(plots)
    for color, (name, (xs, ys)) in zip(COLORS, lines.items(), strict=False):
        _line(axes, xs, ys, color, name)
    logarithmic(axes.yaxis)
    legend(axes)
    return found


def _layers(plots: Any, log: RunLog) -> Any:
    names = sorted(entries_of(log, "layer_norms"), key=layer_order)
    if len(names) <= _LINES:
        return _several(plots, log, "layer_norms", names)
    if len(names) > _ROWS:
        names = [names[i * (len(names) - 1) // (_ROWS - 1)] for i in range(_ROWS)]
    entries = [entry for entry in log["training_iterations"] if mapping(value_at(entry, "gradients", "layer_norms"))]
    size = math.ceil(len(entries) / _COLUMNS)
    groups = [entries[i : i + size] for i in range(0, len(entries), size)]
    cells = [
        [_mean(series(group, "gradients", "layer_norms", name, positive=True)[1]) for group in groups] for name in names
    ]
    known = [value for row in cells for value in row if not math.isnan(value)]
    if not known:
        return None
    colors = importlib.import_module("matplotlib.colors")
    found, axes = plots.subplots(figsize=(WIDTH, 1.2 + 0.11 * len(names)), layout="constrained")
    edges = [group[0]["iter"] for group in groups]
    edges.append(max(entries[-1]["iter"], edges[-1] + 1))
    cmap = plots.get_cmap("viridis", 32)  # with more colours matplotlib draws the colour bar as a bitmap
    norm = colors.LogNorm(min(known), max(max(known), 1.0001 * min(known)))
    drawn = axes.pcolormesh(edges, range(len(names) + 1), cells, norm=norm, cmap=cmap, edgecolors="face", linewidth=0.3)
    step = math.ceil(len(names) / 16)
    shown = sorted({*range(0, len(names) - 1, step), len(names) - 1})
    axes.set_yticks([i + 0.5 for i in shown], [_label(names[i]) for i in shown])
    axes.invert_yaxis()
    axes.set_xlabel("iteration")
    bar = found.colorbar(drawn, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    logarithmic(bar.ax.yaxis)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _components(plots: Any, log: RunLog) -> Any:
    return _several(plots, log, "component_norms", entries_of(log, "component_norms"))


def _update_ratios(plots: Any, log: RunLog) -> Any:
    return _several(plots, log, "update_ratios", entries_of(log, "update_ratios"))


def _histograms(log: RunLog) -> list[tuple[list[float], list[float]]]:
    """Returns edges and shares of the entries that have both."""
    found = []
    for entry in log["training_iterations"]:
        given = mapping(value_at(entry, "gradients", "histogram"))
        edges, shares = given.get("log2_edges"), given.get("shares")
        if isinstance(edges, list) and isinstance(shares, list) and 0 < len(edges) < 200:
            values = [finite(value) for value in (*edges, *shares)]
            if len(shares) == len(edges) + 1 and None not in values:
                found.append((edges, shares))
    return found


def _histogram(plots: Any, log: RunLog) -> Any:
    histograms = _histograms(log)
    if not histograms:
        return None
    (edges, shares), first = histograms[-1], histograms[0]
    found, axes = _axes(plots, label="magnitude; the outer bars hold all that is below and above")
    places = range(len(shares))
    axes.bar(places, [100 * share for share in shares], width=0.92, color=BLUE)
    if len(histograms) > 1 and first[0] == edges:
        ends = [place - 0.5 for place in range(len(shares) + 1)]
        axes.stairs([100 * share for share in first[1]], ends, color=TEXT_COLOR, linewidth=0.9)
    step = math.ceil(len(edges) / _LABELS)
    axes.set_xticks([i + 0.5 for i in range(0, len(edges), step)], [f"2^{edge:g}" for edge in edges[::step]])
    axes.set_ylabel("% of the elements")
    return found


def _zero_share(plots: Any, log: RunLog) -> Any:
    xs, ys = series(log["training_iterations"], "gradients", "zero_share")
    if not any(ys):
        return None
    found, axes = _axes(plots, _LOW)
    _line(axes, xs, [100 * y for y in ys], BLUE)
    axes.set_ylabel("% of the elements")
    axes.set_ylim(bottom=0)
    return found


def _speed(plots: Any, log: RunLog) -> Any:
    entries, plan = log["training_iterations"], mapping(log["startup_info"].get("plan"))
    rows = [("mfu_percent", "MFU %"), ("tokens_per_sec", "tokens/s")]
    lines = [(key, label, *series(entries, "mfu", key)) for key, label in rows]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    size = {"figsize": (WIDTH, 2.0 * len(lines)), "layout": "constrained"}
    found, grid = plots.subplots(len(lines), sharex=True, squeeze=False, **size)
    for axes, (key, label, xs, ys) in zip(grid[:, 0], lines, strict=True):
        axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        _line(axes, xs, ys, BLUE, "measured")
        _dashed(axes, finite(plan.get(key)), "plan")
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.margins(y=0.25)
        legend(axes)
    grid[-1, 0].set_xlabel("iteration")
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return found


def _memory(plots: Any, log: RunLog) -> Any:
    kinds = {"reserved_gb": "reserved", "peak_gb": "peak", "allocated_gb": "allocated"}
    kinds |= {"peak_rss_gb": "peak resident", "rss_gb": "resident"}
    lines = {label: series(log["training_iterations"], "memory", key) for key, label in kinds.items()}
    lines = {label: line for label, line in lines.items() if line[0]}
    if not lines:
        return None
    found, axes = _axes(plots)
    for color, (label, (xs, ys)) in zip(COLORS, lines.items(), strict=False):
        _line(axes, xs, ys, color, label)
    plan = mapping(log["startup_info"].get("plan"))
    planned, limit = finite(plan.get("memory_gb")), finite(plan.get("limit_gb"))
    _dashed(axes, planned, "plan")
    top = max(max(ys) for _, ys in lines.values())
    if limit is not None and limit < 1.6 * top:
        _dashed(axes, limit, "limit", RED, ":")
        top = max(top, limit)
    axes.set_ylim(0, 1.08 * max(top, planned or 0) or 1)
    axes.set_ylabel("GB")
    legend(axes)
    return found


def _waterfall(plots: Any, log: RunLog) -> Any:
    profiles = [profile for profile in log["profiles"] if mapping(profile.get("waterfall"))]
    if not profiles:
        return None
    given = {str(part): finite(points) for part, points in profiles[-1]["waterfall"].items()}
    order = [*(part for part in PARTS if part in given), *(part for part in given if part not in PARTS)][:12]
    points = {_label(part): given[part] or 0.0 for part in order}
    title = f"iterations to {profiles[-1]['iter']:,}"
    timed, basis = finite(log["summary"].get("mfu_percent")), log["startup_info"].get("peak_basis")
    return waterfall(title, points, timed, "sparse" if basis == "sparse" else "dense")


_CHARTS: dict[str, Callable[[Any, RunLog], Any]] = {
    "loss": _loss,
    "loss_tail": _loss_tail,
    "tasks": _tasks,
    "learning_rate": _learning_rate,
    "gradient_norm": _gradient_norm,
    "layers": _layers,
    "components": _components,
    "histogram": _histogram,
    "zero_share": _zero_share,
    "update_ratios": _update_ratios,
    "speed": _speed,
    "memory": _memory,
    "waterfall": _waterfall,
}
