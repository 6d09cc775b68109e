"""Draws the charts of the bench's report as SVG elements. matplotlib is loaded only when a chart is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure.models import config_of
from bench.report.sections import ops_rows
from bench.results import Record
from gptperf import hardware, registry
from gptperf.hardware.workload import gemm_list
from gptperf.monitor.waterfall import PARTS
from gptperf.report import figures
from gptperf.report.figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, TEXT_COLOR

__all__ = ["draw", "figure", "roofline_points"]

_COLORS = {"triton": BLUE, "compiled": ORANGE, "eager": GRAY, "liger": PURPLE, "torch_native": GREEN, "cudnn": RED}
_COLORS |= {"gemm": ORANGE, "liger_separate": "#c9a5d1"}
_COMPONENT = {
    "rms_norm": ("normalization", "rmsnorm"),
    "layer_norm": ("normalization", "layernorm"),
    "rope": ("position_encoding", "rope"),
    "gelu": ("activation", "gelu"),
    "swiglu": ("ffn_type", "swiglu"),
}
"""Op -> kind and name of the component whose card states the op's FLOPs per element."""


def figure(name: str, records: Mapping[str, Record]) -> Any:
    """Draws a chart, or returns None if there is nothing to draw.

    Args:
        name: waterfall:CELL, roofline, of_copy:forward or of_copy:backward.
        records: Cell -> result.

    Raises:
        DeviceError: matplotlib is not installed.
        ValueError: The name is unknown.
    """
    pyplot = figures.pyplot()
    kind, _, what = name.partition(":")
    if kind == "waterfall":
        profile = records[what]["results"]["profile"]
        title = f"{what.partition('/')[2]}; dotted: the steps that were timed without a profiler"
        points = {part: profile["waterfall"][part] for part in PARTS}
        return figures.waterfall(title, points, profile["timed_mfu_percent"])
    if kind == "roofline":
        return _roofline(pyplot, records)
    if kind == "of_copy":
        return _of_copy(pyplot, what, ops_rows(records))
    raise ValueError(f"chart: found {name!r}, wanted waterfall:CELL, roofline or of_copy:DIRECTION")


def draw(name: str, records: Mapping[str, Record]) -> str | None:
    """Returns the SVG element of a chart, or None if there is nothing to draw.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    found = figure(name, records)
    return None if found is None else figures.svg(found, name)


def roofline_points(records: Mapping[str, Record]) -> list[tuple[str, str, float, float]]:
    """Returns (label, kind, FLOP per byte, FLOP/s) for the forward of every op, and for the models' GEMMs."""
    points = []
    for row in ops_rows(records):
        op = row["op"].removesuffix("_add")
        if row["impl"] == "triton" and "forward" in row and op in _COMPONENT:
            cost = registry.card(*_COMPONENT[op]).cost.flops + row["op"].endswith("_add")
            moved = row["forward"]["gb_s"] * row["forward"]["ms"] * 1e6
            work = cost * _elements(op, row["shape"])
            label = f"{row['op']} {'x'.join(map(str, row['shape']))}"
            points.append((label, "ops", work / moved, work / row["forward"]["ms"] * 1e3))
    for cell, record in records.items():
        if not cell.startswith("ceilings/") or record["status"] != "done":
            continue
        config, spreads = config_of(record["config"]), record["results"]["spreads"]
        for gemm in gemm_list(config.model, config.train.batch_size):
            moved = 2 * (gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n)
            if gemm.name in spreads:
                label = f"{cell.partition('/')[2]} {gemm.name}"
                points.append((label, "GEMMs", gemm.amount / moved, spreads[gemm.name]["median"]))
    return points


def _elements(op: str, shape: Sequence[int]) -> float:
    """Returns the number of elements for which an op's FLOPs are counted; rope counts queries and keys only."""
    if op == "rope":
        B, H, T, D, K = shape
        return B * T * (H + K) * D
    return shape[0] * shape[1]


def _roofline(pyplot: Any, records: Mapping[str, Record]) -> Any:
    """Draws the measured roofs, and the ops and GEMMs under them."""
    points = roofline_points(records)
    ceilings = [r for c, r in records.items() if c.startswith("ceilings/") and r["status"] == "done"]
    if not points or not ceilings:
        return None
    found, axes = pyplot.subplots(figsize=(6.4, 3.8))
    _roofs(axes, ceilings, [intensity for _, _, intensity, _ in points])
    for kind, color, mark in (("ops", _COLORS["triton"], "o"), ("GEMMs", _COLORS["compiled"], "s")):
        xs = [p[2] for p in points if p[1] == kind]
        ys = [p[3] / 1e12 for p in points if p[1] == kind]
        label = "ops, forward" if kind == "ops" else "the models' matrix products"
        axes.scatter(xs, ys, s=22, color=color, marker=mark, label=label, alpha=0.8, zorder=3)
    _label_ops(axes, [p for p in points if p[1] == "ops"])
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s")
    figures.logarithmic(axes.xaxis)
    figures.logarithmic(axes.yaxis)
    axes.legend(loc="lower right", fontsize=8)
    return found


def _roofs(axes: Any, ceilings: Sequence[Record], intensities: Sequence[float]) -> None:
    """Draws the speed of a copy, the peak of the data sheet, and the speed of a large matrix product."""
    copy = max(r["results"]["copy_byte_s"] for r in ceilings)
    square = max(r["results"]["gemm_square_flop_s"] for r in ceilings)
    made_by, dtype = ceilings[0]["environment"], ceilings[0]["results"]["dtype"]
    peak = hardware.peak_flop_s(hardware.match_gpu(made_by["device"], made_by.get("memory_gb")), dtype)
    top = square if peak is None else peak.flop_s
    low, high = min(intensities) / 3, max(intensities) * 3
    label = f"copy, measured {copy / 1e12:.2f} TB/s"
    axes.plot([low, top / copy], [low * copy / 1e12, top / 1e12], color=TEXT_COLOR, label=label)
    if peak is not None:
        label = f"data sheet {top / 1e12:,.0f} TFLOP/s"
        axes.plot([top / copy, high], [top / 1e12] * 2, color=TEXT_COLOR, label=label)
    line = {"color": TEXT_COLOR, "linestyle": "--", "linewidth": 0.8}
    label = f"8192^3, measured {square / 1e12:,.0f} TFLOP/s"
    axes.plot([square / copy, high], [square / 1e12] * 2, label=label, **line)


def _label_ops(axes: Any, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes the names of the ops. Ops with the same intensity are at the same place and share a label."""
    labels: dict[float, dict[str, None]] = {}
    for label, _, intensity, _ in points:
        labels.setdefault(round(intensity, 1), {})[label.split()[0]] = None
    for number, around in enumerate(sorted(labels)):
        place = max((p for p in points if round(p[2], 1) == around), key=lambda p: p[3])
        aside = {"ha": "left", "va": "top"} if number % 2 else {"ha": "right", "va": "bottom"}
        offset = (7, -4) if number % 2 else (-7, 4)
        text, at = ", ".join(labels[around]), (place[2], place[3] / 1e12)
        axes.annotate(text, at, offset, textcoords="offset points", fontsize=7, **aside)


def _of_copy(pyplot: Any, direction: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draws our implementation of each op as a bar, and the others as marks."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if "of_copy" in row.get(direction, {}) and row["impl"] != "copy":
            label = f"{row['op']} {'x'.join(map(str, row['shape']))}"
            shares.setdefault(label, {})[row["impl"]] = row[direction]["of_copy"]
    if not shares:
        return None
    found, axes = pyplot.subplots(figsize=(6.4, 0.9 + 0.21 * len(shares)), layout="constrained")
    places = range(len(shares))
    ours = [one.get("triton", 0.0) for one in shares.values()]
    axes.barh(places, ours, height=0.7, color=_COLORS["triton"], alpha=0.75, label="triton")
    for impl in dict.fromkeys(impl for one in shares.values() for impl in one if impl != "triton"):
        marks = [(one[impl], place) for place, one in zip(places, shares.values(), strict=True) if impl in one]
        xs, ys = zip(*marks, strict=True)
        axes.scatter(xs, ys, s=16, color=_COLORS.get(impl, TEXT_COLOR), label=impl, zorder=3)
    axes.axvline(1, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, list(shares), fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"{direction}: fraction of the speed of a copy")
    axes.margins(y=0.01)
    figures.legend(axes)
    return found
