"""Helpers for charts: matplotlib without a screen, figures as SVG elements, and the colours that all charts share.

Only `pyplot` loads matplotlib, which `pip install 'gptperf[report]'` installs.
"""

import importlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptperf.errors import DeviceError

__all__ = ["BLUE", "COLORS", "GRAY", "GREEN", "ORANGE", "PURPLE", "RED", "TEXT_COLOR", "WIDTH", "Line"]
__all__ += ["legend", "lines_for", "logarithmic", "pyplot", "required", "svg", "waterfall"]

WIDTH = 5.4
"""Width of a chart in inches. Scaled to a phone or to half of a screen, its text of 9 points is readable on both."""

BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = "#2a8fbd", "#d9822b", "#4c9f50", "#c2504f", "#8b6cc0", "#7f8c8d"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#9a7b4f", "#d16ba5", GRAY, "#a9a32a", "#2fa8a0")
_DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 2, 2, 2))
TEXT_COLOR = "#123456"
"""Placeholder for the page's text colour. `svg` replaces it, so that text is readable on light and on dark pages."""


class Line(NamedTuple):
    """The name, colour and dashes of a curve."""

    name: str
    color: str
    dashes: tuple[int, ...]


def lines_for(names: Sequence[str]) -> list[Line]:
    """Returns a line for each name. The lines differ as long as there are enough colours and dashes."""
    return [
        Line(name, COLORS[number % len(COLORS)], _DASHES[number // len(COLORS) % len(_DASHES)])
        for number, name in enumerate(names)
    ]


def required(module: str) -> Any:
    """Imports a module that only pages need.

    Raises:
        DeviceError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DeviceError(f"a page needs {package}: {error}; pip install 'gptperf[report]'") from error


def pyplot() -> Any:
    """Returns `matplotlib.pyplot` without a screen, in the style of the pages. Dollar signs do not begin a formula.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    required("matplotlib").use("Agg")
    found = required("matplotlib.pyplot")
    colors = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    found.rcParams.update({name: TEXT_COLOR for name in colors})
    found.rcParams.update({"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none"})
    found.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    found.rcParams.update({"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False})
    return found


def svg(figure: Any, name: str) -> str:
    """Closes a figure and returns its SVG element, without metadata, addresses and a fixed size.

    Args:
        figure: A figure of `pyplot`.
        name: Name of the chart, unique on its page: the names of its clip paths are derived from it.
    """
    plots = pyplot()
    out, box = io.StringIO(), "tight" if figure.get_layout_engine() is None else None
    with plots.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        try:
            figure.savefig(out, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
        finally:
            plots.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(TEXT_COLOR, "currentColor")
    return text.replace("<svg", '<svg role="img"', 1)


def logarithmic(axis: Any) -> None:
    """Makes an axis logarithmic, with labels that are plain numbers."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 7) if high < 8 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def legend(axes: Any) -> None:
    """Draws the legend above the axes: in one row if it fits into the figure, else in rows of equal length.

    matplotlib fills a legend by columns, so the entries are put in an order in which the rows read from left to right.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "fontsize": 8, "borderpad": 0}
    place |= {"columnspacing": 1.1, "handlelength": 1.3, "handletextpad": 0.5}
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        order = [i for column in range(columns) for i in range(column, len(labels), columns)]
        drawn = axes.legend([handles[i] for i in order], [labels[i] for i in order], ncols=columns, **place)
        if drawn.get_window_extent().width <= 0.88 * axes.figure.bbox.width:  # the rest is for the axis on the left
            return


def waterfall(title: str, points: Mapping[str, float], timed: float | None = None, basis: str = "dense") -> Any:
    """Draws the bars from 100% of the peak down to the MFU, one below the other, and returns the figure.

    Args:
        title: Title of the figure.
        points: Part of a step -> points of MFU that it costs, in the order of the bars.
        timed: MFU in percent of the steps without a profiler, drawn as a dotted line.
        basis: Basis of the peak, "dense" or "sparse".
    """
    left, last = 100.0, len(points) + 1
    figure, axes = pyplot().subplots(figsize=(WIDTH, 0.9 + 0.24 * last), layout="constrained")
    axes.barh(0, 100, color=GRAY)
    for place, lost in enumerate(points.values(), 1):
        axes.barh(place, -lost, left=left, color=RED)
        axes.plot([left, left], [place - 1.4, place + 0.4], color=TEXT_COLOR, linewidth=0.5)
        axes.text(max(left, left - lost) + 1, place, f"{0 - round(lost, 1):.1f}", va="center")
        left -= lost
    axes.barh(last, left, color=BLUE)
    axes.plot([left, left], [last - 1.4, last + 0.4], color=TEXT_COLOR, linewidth=0.5)
    axes.text(max(left, timed or 0, 0) + 1, last, f"{left:.1f}%", va="center", fontweight="bold")
    if timed is not None:
        axes.plot([timed, timed], [last - 0.5, last + 0.5], color=TEXT_COLOR, linewidth=1.2, linestyle=":")
    axes.set_yticks(range(last + 1), ["peak", *(part.replace("_", " ") for part in points), "MFU"])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of the {basis} peak")
    axes.set_xlim(min(0, left), 114)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure
