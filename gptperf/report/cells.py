"""Values of a log as text for the cells of a page."""

from typing import Any

from gptperf import formats
from gptperf.monitor.run_log import finite
from gptperf.report.page import clean

__all__ = ["CELL", "ROWS", "figure", "text"]

CELL, ROWS = 600, 200
"""Largest number of characters in a cell, and of rows in a table of texts."""


def text(value: Any) -> str:
    """Returns a value of a log as text for a cell."""
    return clean(formats.value_text(value), CELL)


def figure(value: Any, digits: int = 2) -> str:
    """Returns a number of a log as text for a cell, or \"-\" for what is not a finite number."""
    return formats.number(finite(value), f",.{digits}f")
