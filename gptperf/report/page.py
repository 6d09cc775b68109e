"""One HTML page that needs nothing beside it: sections with tables, and matplotlib's charts as SVG within.

No address is asked for and every text is escaped. jinja2 and matplotlib are loaded by `render` and `pyplot` only.
"""

import importlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptperf.errors import DeviceError

__all__ = ["TEXT", "Section", "Table", "Tile", "clean", "pyplot", "render", "svg", "waterfall"]

TEXT = "#123456"
"""Stands for the page's own text colour, which is put in its place: right on a light page and on a dark one."""
_TEMPLATE = "templates/page.html.j2"
_LOST, _KEPT, _WHOLE = "#c25b5b", "#2a8fbd", "#8a8a8a"
_MOST = 20_000
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    """Words rather than figures: aligned to the left, and wrapped."""


@dataclass(frozen=True)
class Tile:
    """One figure that a reader looks for first."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()
    """Names of charts."""
    folded: bool = False
    """Long, and closed at first where the page can do that."""
    code: Sequence[str] = field(default=())
    """Lines in a fixed font."""
    tiles: Sequence[Tile] = ()


def clean(text: str, most: int = _MOST) -> str:
    """Text without control characters, those that turn its direction among them, and no longer than `most`."""
    text = _UNSEEN.sub("\ufffd", text)
    return text if len(text) <= most else f"{text[:most]}\u2026 ({len(text):,} characters)"


def render(
    title: str,
    sections: Sequence[Section],
    charts: Mapping[str, str | None],
    extra: str,
    captions: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        title: of the page.
        sections: in their order.
        charts: SVG by name, None where there was nothing to draw.
        extra: of this package, that installs what is missing.
        captions: of charts, by name.

    Raises:
        DeviceError: jinja2 is not installed.
    """
    try:
        jinja2: Any = importlib.import_module("jinja2")
    except ImportError as error:
        raise DeviceError(f"a report needs jinja2: {error}; pip install 'gptperf[{extra}]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalized)
    template = environment.from_string((Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8"))
    told = dict.fromkeys(charts, "") | dict(captions or {})
    page: str = template.render(title=title, sections=sections, charts=charts, captions=told)
    return page


def _finalized(value: Any) -> Any:
    return value if hasattr(value, "__html__") else clean(str(value))


def pyplot(extra: str) -> Any:
    """matplotlib without a screen.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        found = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise DeviceError(f"a report needs matplotlib: {error}; pip install 'gptperf[{extra}]'") from error
    colors = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    found.rcParams.update({name: TEXT for name in colors})
    found.rcParams.update({"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none"})
    found.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    return found


def svg(plots: Any, name: str, make: Callable[[], Any], *, math: bool = True) -> str | None:
    """The SVG element of the figure that `make` returns, or None where that returns None.

    Args:
        plots: what `pyplot` returned.
        name: of the chart, another one for each chart of a page.
        make: draws.
        math: whether text between dollar signs is a formula.
    """
    own = {"svg.hashsalt": name, "text.parse_math": math}  # or the clip paths of two charts would share their names
    with plots.rc_context(own), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        found = make()
        if found is None:
            return None
        out, box = io.StringIO(), "tight" if found.get_layout_engine() is None else None
        try:
            found.savefig(out, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
        finally:
            plots.close(found)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(TEXT, "currentColor")
    return text.replace("<svg", '<svg role="img"', 1)


def waterfall(
    plots: Any, title: str, points: Mapping[str, float], timed: float | None = None, basis: str = "dense"
) -> Any:
    """A figure from 100% of the peak down to the MFU.

    Args:
        plots: what `pyplot` returned.
        title: of the figure.
        points: of MFU that each part costs, in the order of the bars.
        timed: MFU of the steps without a profiler, a dotted line.
        basis: of the peak.
    """
    labels, left = ["peak"], 100.0
    found, axes = plots.subplots(figsize=(8.5, 3.6))
    axes.bar(0, 100, color=_WHOLE)
    for place, (part, lost) in enumerate(points.items(), 1):
        axes.bar(place, -lost, bottom=left, color=_LOST)
        left -= lost
        axes.text(place, left - 1.5, f"{0 - round(lost, 1):.1f}", ha="center", va="top")
        axes.plot([place - 1.4, place + 0.4], [left + lost] * 2, color=TEXT, linewidth=0.5)
        labels.append(part.replace("_", "\n").replace("communication", "communi-\ncation"))
    axes.bar(len(points) + 1, left, color=_KEPT)
    axes.text(len(points) + 1, left + 1, f"{left:.1f}%", ha="center", va="bottom", fontweight="bold")
    if timed is not None:
        ends = [len(points) + 0.5, len(points) + 1.5]
        axes.plot(ends, [timed] * 2, color=TEXT, linewidth=1.2, linestyle=":")
    axes.set_xticks(range(len(points) + 2), [*labels, "MFU"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"% of the {basis} peak")
    axes.set_ylim(0, 105)
    axes.set_title(title, loc="left")
    return found
