"""A progress bar on a terminal, with the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from gptperf.data.readers import Meter

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[int], None]
"""Called with the number of tokens so far."""
_SECONDS = 0.2


@contextlib.contextmanager
def progress_bar(name: str, total: int | None, meter: Meter, quiet: bool) -> Iterator[Progress]:
    """Shows how much of `total` bytes the meter has counted, on a terminal; elsewhere, or if `quiet`, nothing.

    Args:
        name: What is done.
        total: Bytes to be read; None: not known.
        meter: Counts the bytes that are read.
        quiet: Whether nothing is shown.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda tokens: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        shown = 0.0

        def show(tokens: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _SECONDS:
                shown = time.monotonic()
                said = f"{name}: {tokens:,} tokens" if tokens else name
                bar.update(task, completed=meter.read(), description=said)

        yield show
