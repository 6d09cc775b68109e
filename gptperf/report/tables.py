"""Tables as text and Markdown, and a page with tables and charts that needs nothing beside it.

matplotlib and jinja2 are loaded only where a page is made: `pip install 'gptperf[report]'`.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptperf.errors import DeviceError
from gptperf.report import page

__all__ = [
    "Line",
    "Section",
    "Table",
    "aligned",
    "check_packages",
    "escaped",
    "html",
    "lines_for",
    "markdown",
    "pyplot",
    "svg",
]

_COLORS = ("#2a8fbd", "#d9822b", "#4c9f50", "#c2504f", "#8b6cc0", "#9a7b4f", "#d16ba5", "#7f8c8d", "#a9a32a", "#2fa8a0")
_DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 2, 2, 2))
_TEMPLATE = "templates/comparison.html.j2"


class Line(NamedTuple):
    """How a curve looks, and its name."""

    name: str
    color: str
    dashes: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    """Columns that are aligned to the left."""
    keys: Sequence[Line | None] = ()
    """The curve of each row, shown on a page."""
    key_column: int = 0


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str = ""
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    below: Sequence[str] = ()
    """Lines under the tables."""
    legend: Sequence[Line] = ()
    charts: Sequence[str] = ()
    """SVG elements of `svg`."""


def lines_for(names: Sequence[str]) -> list[Line]:
    """A line a name, all different as far as colours and dashes go."""
    return [
        Line(name, _COLORS[number % len(_COLORS)], _DASHES[number // len(_COLORS) % len(_DASHES)])
        for number, name in enumerate(names)
    ]


def aligned(table: Table) -> str:
    """The table as text with straight columns."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = []
    for row in (table.columns, *table.rows):
        cells = [
            f"{text:<{width}}" if place in table.texts else f"{text:>{width}}"
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    rule = [" --- " if place in table.texts else " ---: " for place in range(len(table.columns))]
    rows = ["| " + " | ".join(map(escaped, row)) + " |" for row in (table.columns, *table.rows)]
    return "\n".join([rows[0], f"|{'|'.join(rule)}|", *rows[1:]])


def escaped(text: str) -> str:
    """Text that Markdown takes as it is, in one cell of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|\[\]]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DeviceError(f"a page needs {package}: {error}; pip install 'gptperf[report]'") from error


def check_packages() -> None:
    """Find out before hours of work whether a page can be made.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        _needed(module)


def pyplot() -> Any:
    """matplotlib without a screen, in the style of the pages.

    Raises:
        DeviceError: it is not installed.
    """
    found = page.pyplot("report")
    found.rcParams.update({"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False})
    return found


def svg(figure: Any, salt: str) -> str:
    """The SVG element of a figure, which is closed.

    Args:
        figure: of `pyplot`.
        salt: another one for each chart of a page, or the names inside would be the same.
    """
    found = page.svg(pyplot(), salt, lambda: figure, math=False)
    assert found is not None
    return found


def html(title: str, sections: Sequence[Section]) -> str:
    """One page; every text is escaped.

    Raises:
        DeviceError: jinja2 is not installed.
    """
    jinja2 = _needed("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8"))
    found: str = template.render(title=title, sections=sections)
    return found
