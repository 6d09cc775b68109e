"""Renders a self-contained HTML page from sections with tables and SVG charts.

The page loads nothing from other addresses, and every text in it is escaped. Only `render` loads jinja2, which
`pip install 'gptperf[report]'` installs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptperf.report.figures import Line, required
from gptperf.report.tables import Table

__all__ = ["Section", "Tile", "check_packages", "clean", "render"]

_TEMPLATE = Path(__file__).parent / "templates" / "page.html.j2"
_MOST = 20_000
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Tile:
    """One of the figures that a reader looks for first."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None
    """True shows the value in green, False in red, and None in the colour of the text."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading and the content under it."""

    title: str = ""
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()
    """Names of charts, which are shown above the tables."""
    folded: bool = False
    """Whether the page shows the section closed at first, because it is long."""
    code: Sequence[str] = ()
    """Lines that are shown in a fixed-width font."""
    tiles: Sequence[Tile] = ()
    below: Sequence[str] = ()
    """Notes under the tables."""
    legend: Sequence[Line] = ()
    """Curves that all charts of the section share. The charts are then shown side by side under one legend."""


def clean(text: str, most: int = _MOST) -> str:
    """Replaces control characters and marks that change the direction of text, and cuts text longer than `most`."""
    text = _UNSEEN.sub("\ufffd", text)
    return text if len(text) <= most else f"{text[:most]}\u2026 ({len(text):,} characters)"


def check_packages() -> None:
    """Checks that a page can be made, so that a long command can fail before its work and not after it.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        required(module)


def render(
    title: str,
    sections: Sequence[Section],
    charts: Mapping[str, str | None],
    captions: Mapping[str, str] | None = None,
) -> str:
    """Returns the page.

    Args:
        title: Title of the page.
        sections: The sections in their order.
        charts: Name of a chart -> SVG from `figures.svg`, or None if there was nothing to draw.
        captions: Name of a chart -> the line above the chart.

    Raises:
        DeviceError: jinja2 is not installed.
    """
    jinja2 = required("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalized)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    shown = dict.fromkeys(charts, "") | dict(captions or {})
    page: str = template.render(title=title, sections=sections, charts=charts, captions=shown)
    return page


def _finalized(value: Any) -> Any:
    """Cleans every text that the template inserts, except SVG, which is marked as safe."""
    return value if hasattr(value, "__html__") else clean(str(value))
