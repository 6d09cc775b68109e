"""Tables, and their forms as plain text and as Markdown. This module does not import torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptperf.report.figures import Line

__all__ = ["Table", "aligned", "escaped", "markdown", "words"]


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    """Numbers of the columns that are aligned to the left; the others are aligned to the right."""
    keys: Sequence[Line | None] = ()
    """The line of each row's curve, which a page draws as a key in the column `key_column`."""
    key_column: int = 0


def words(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table of words, not figures: all columns are aligned to the left, and a page wraps long cells."""
    return Table(columns, rows, frozenset(range(len(columns))))


def aligned(table: Table) -> str:
    """Returns the table as text with aligned columns."""
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
    """Returns the table in Markdown."""
    rule = [" --- " if place in table.texts else " ---: " for place in range(len(table.columns))]
    rows = ["| " + " | ".join(map(escaped, row)) + " |" for row in (table.columns, *table.rows)]
    return "\n".join([rows[0], f"|{'|'.join(rule)}|", *rows[1:]])


def escaped(text: str) -> str:
    """Escapes text so that Markdown shows it unchanged in one cell of a table.

    An underscore inside a word has no meaning in Markdown and is not escaped.
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|\[\]]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)
