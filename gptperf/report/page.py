"""One HTML page that needs nothing beside it: sections with tables, and charts as SVG within.

It asks for no address, and every text is escaped. jinja2 is loaded by `render` only: `pip install 'gptperf[report]'`.
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
    """One figure that a reader looks for first."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None
    """Shows the value in green or red; None: in the text's own colour."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading with what stands under it."""

    title: str = ""
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()
    """Names of charts. They stand above the tables."""
    folded: bool = False
    """The section is long: a page shows it closed at first, where the browser can do that."""
    code: Sequence[str] = ()
    """Lines in a fixed font."""
    tiles: Sequence[Tile] = ()
    below: Sequence[str] = ()
    """Notes under the tables."""
    legend: Sequence[Line] = ()
    """Curves that all charts of the section share: the charts stand side by side under one legend."""


def clean(text: str, most: int = _MOST) -> str:
    """Text without control characters and marks that change its direction, cut where it is longer than `most`."""
    text = _UNSEEN.sub("\ufffd", text)
    return text if len(text) <= most else f"{text[:most]}\u2026 ({len(text):,} characters)"


def check_packages() -> None:
    """Finds out before hours of work whether a page can be made.

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
        charts: Name of a chart -> SVG of `figures.svg`, or None where there was nothing to draw.
        captions: Name of a chart -> the line above it.

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
    """Cleans every text of the template; SVG, which is marked as safe, passes."""
    return value if hasattr(value, "__html__") else clean(str(value))
