"""Progress of a preparation, with the time left: a bar on a terminal, elsewhere a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

from gptperf.data.readers import Meter
from gptperf.errors import note
from gptperf.formats import counted, rough_duration

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[int], None]
"""Called with the number of tokens so far."""
_SECONDS, _LINE_SECONDS = 0.2, 60.0
"""Seconds between two states of the bar, and between two lines."""
_OTHERS = len(" 100% 0:00:00")
_BAR_COLUMNS = 12


@contextlib.contextmanager
def progress_bar(name: str, total: int | None, meter: Meter, quiet: bool) -> Iterator[Progress]:
    """Shows how much of `total` bytes the meter has counted, on a terminal as a bar, elsewhere as lines.

    Args:
        name: What is done.
        total: Bytes to be read; None: not known.
        meter: Counts the bytes that are read.
        quiet: Whether nothing is shown.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda tokens: None
        return
    if not console.is_terminal:
        yield _lines(name, total, meter)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # Percentage and time left are whole on any terminal: the bar gives way first, then the name.
    wide = console.width >= 60
    room = console.width - _OTHERS - (_BAR_COLUMNS if wide else 0)
    columns = (TextColumn("{task.description}", markup=False), *([BarColumn()] if wide else []))
    columns += (TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name[: max(room, 0)], total=total)
        shown = 0.0

        def show(tokens: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _SECONDS:
                shown = time.monotonic()
                bar.update(task, completed=meter.read(), description=_said(name, tokens)[: max(room, 0)])

        yield show


def _said(name: str, tokens: int) -> str:
    return f"{name}: {counted(tokens, 'token')}" if tokens else name


def _lines(name: str, total: int | None, meter: Meter) -> Progress:
    """Returns a function that prints a line per minute, for a log file."""
    begin = shown = time.monotonic()
    skipped: int | None = None  # what was read before the first call: a preparation may go on where it was

    def show(tokens: int) -> None:
        nonlocal shown, skipped
        now, read = time.monotonic(), meter.read()
        skipped = read if skipped is None else skipped
        if now - shown < _LINE_SECONDS:
            return
        shown, left = now, ""
        if total and skipped < read <= total:
            seconds = (now - begin) * (total - read) / (read - skipped)
            left = f", {read / total:.0%}, about {rough_duration(seconds)} left"
        note(_said(name, tokens) + left)

    return show
