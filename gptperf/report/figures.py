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

__all__ = ["BLUE", "COLORS", "GRAY", "GREEN", "ORANGE", "PURPLE", "RED", "TEXT_COLOR", "Line"]
__all__ += ["lines_for", "logarithmic", "pyplot", "required", "svg", "waterfall"]

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


def waterfall(title: str, points: Mapping[str, float], timed: float | None = None, basis: str = "dense") -> Any:
    """Draws the bars from 100% of the peak down to the MFU, and returns the figure.

    Args:
        title: Title of the figure.
        points: Part of a step -> points of MFU that it costs, in the order of the bars.
        timed: MFU in percent of the steps without a profiler, drawn as a dotted line.
        basis: Basis of the peak, "dense" or "sparse".
    """
    labels, left = ["peak"], 100.0
    figure, axes = pyplot().subplots(figsize=(8.5, 3.6))
    axes.bar(0, 100, color=GRAY)
    for place, (part, lost) in enumerate(points.items(), 1):
        axes.bar(place, -lost, bottom=left, color=RED)
        left -= lost
        axes.text(place, left - 1.5, f"{0 - round(lost, 1):.1f}", ha="center", va="top")
        axes.plot([place - 1.4, place + 0.4], [left + lost] * 2, color=TEXT_COLOR, linewidth=0.5)
        labels.append(part.replace("_", "\n").replace("communication", "communi-\ncation"))
    axes.bar(len(points) + 1, left, color=BLUE)
    axes.text(len(points) + 1, left + 1, f"{left:.1f}%", ha="center", va="bottom", fontweight="bold")
    if timed is not None:
        ends = [len(points) + 0.5, len(points) + 1.5]
        axes.plot(ends, [timed] * 2, color=TEXT_COLOR, linewidth=1.2, linestyle=":")
    axes.set_xticks(range(len(points) + 2), [*labels, "MFU"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"% of the {basis} peak")
    axes.set_ylim(0, 105)
    axes.set_title(title, loc="left")
    return figure
