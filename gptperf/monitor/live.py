"""The panel at the bottom of a terminal that shows the state of a run.

The training thread only assigns new values, and another thread draws them at most four times a second. Between log
lines it draws the position of the main thread (`Progress`) more than once a second, which no GPU waits for. The cursor
stays visible on the empty line below the panel, so that a process that is killed leaves the terminal usable.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.live
from rich.text import Text

from gptperf.distributed.progress import Progress
from gptperf.formats import byte_text, count_text, duration, number, percent, with_unit
from gptperf.monitor.blocks import WIDTH, printable, stability_parts

__all__ = ["DRAWING", "Live", "Panel", "RichConsole", "sparkline"]

DRAWING = threading.RLock()
"""Held while the terminal is written to. A fork waits for it, so a child process never inherits a lock that is held."""
os.register_at_fork(before=DRAWING.acquire, after_in_parent=DRAWING.release, after_in_child=DRAWING.release)

_PAUSE_S = 0.25
_TICK_S = 0.7  # longest time between two drawings of the position
_LOSSES = 60  # losses in the sparkline
_LABEL = 14  # columns of a label
_NO_PADDING = 36  # columns of a terminal below which labels are not padded
_BLOCKS = "".join(chr(0x2581 + i) for i in range(8))


class RichConsole(rich.console.Console):
    """A rich console for plain lines and one panel."""

    def __init__(self, stream: TextIO):
        super().__init__(
            file=stream,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            force_terminal=True,
            force_interactive=True,
        )

    def on_broken_pipe(self) -> None:
        """Raises an error where rich would end the process, so that `gptperf.errors.main_guard` decides."""
        raise BrokenPipeError

    def show_cursor(self, show: bool = True) -> bool:
        """Leaves the cursor visible."""
        return False


def sparkline(values: tuple[float, ...], width: int) -> str:
    """Returns the last `width` values as blocks of eight heights, with "!" for a value that is not finite."""
    last = values[-width:] if width > 0 else ()
    finite = [value for value in last if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = 7.99 / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[int((v - low) * scale)] if math.isfinite(v) else "!" for v in last)


class Panel:
    """Holds the state of a run, and draws it for a given width and height.

    Args:
        max_iters: number of iterations of the run.
        progress: position of the main thread; without it the panel shows log entries alone.
    """

    def __init__(self, max_iters: int, progress: Progress | None = None):
        self.max_iters, self.progress = max_iters, progress
        self.planned_gb: float | None = None
        self.record: Mapping[str, Any] = {}
        self.eta_s: float | None = None
        self.losses: tuple[float, ...] = ()
        self.evaluation: Mapping[str, Any] = {}
        self.best: tuple[float, int] | None = None
        self.saved: Mapping[str, Any] = {}
        self.changed = False
        self.drawn_at = 0.0
        """Monotonic time of the last drawing."""
        self.closed = False
        """Whether the next drawing is the last one, which has no empty line below it."""
        self.rows: list[int] = []
        """Width in columns of each line of the last drawing."""

    @property
    def due(self) -> bool:
        """Whether the panel should be drawn: a value is new, or the main thread moves on."""
        moves = self.progress is not None and not self.closed
        return self.changed or (moves and time.monotonic() - self.drawn_at >= _TICK_S)

    def iteration(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Stores an `Iteration` and the seconds until the end of the run."""
        loss = math.nan if record["loss"] is None else record["loss"]
        self.losses = (*self.losses[1 - _LOSSES :], loss)
        self.record, self.eta_s, self.changed = record, eta_s, True

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Stores an `Eval`."""
        loss, best = record["val_loss"], record.get("best_val_loss")
        if best is not None and (self.best is None or best != self.best[0]):
            self.best = (best, record["iter"] if best == loss else 0)
        self.evaluation, self.changed = record, True

    def checkpoint(self, record: Mapping[str, Any]) -> None:
        """Stores a `Checkpoint`."""
        self.saved, self.changed = record, True

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        self.changed, self.drawn_at = False, time.monotonic()
        width = max(1, min(WIDTH, options.size.width - 1))
        lines = list(self._lines(width, options.encoding))[: max(1, options.size.height - 4)]
        for line in lines:
            line.truncate(width, overflow="crop")
        self.rows = [line.cell_len for line in lines]
        above = Text("\u2500" * width, "dim") if options.encoding.startswith("utf") else Text()
        self.rows = [above.cell_len, *self.rows]
        yield Text("\n", no_wrap=True).join([above, *lines] if self.closed else [above, *lines, Text()])

    def _lines(self, width: int, encoding: str) -> Iterator[Text]:
        blocks = encoding.startswith("utf")
        yield self._bar(width, blocks)
        if self.progress is not None and not self.closed:
            yield _cell("Now", _now(self.progress), width)
        if not self.record:
            return
        yield self._loss(width, blocks)
        cells = [_cell(label, value, width) for label, value in self._cells()]
        left, right = (max(cell.cell_len for cell in cells[i::2]) for i in (0, 1))
        bar = " \u2502" if blocks else "  "
        start = max(width // 2, left + len(bar))
        if start + right > width:
            start = left + len(bar)
        if start + right <= width:
            for first, second in zip(cells[::2], [*cells[1::2], *[None] * (len(cells) % 2)], strict=True):
                if second is not None:
                    first.pad_right(start - first.cell_len - len(bar))
                    first.append(bar, "dim").append_text(second)
                yield first
        else:
            yield from cells
        if self.saved:
            path = Path(printable(str(self.saved["path"])).encode(encoding, "replace").decode(encoding))
            line = _cell("Checkpoint", f"{self.saved['iter']:,}: {path}", width)
            yield line if line.cell_len <= width else _cell("Checkpoint", path.name, width)

    def _bar(self, width: int, blocks: bool) -> Text:
        """Returns the progress bar: "  60/2,500 ====----  2%  34.0 s left"."""
        done, left_s = self.record.get("iter", 0), self.eta_s
        if self.progress is not None:
            done, left_s = max(done, self.progress.finished), self.progress.run_left_s()
        share = min(1.0, done / max(1, self.max_iters))
        before = f" {done:,}/{self.max_iters:,} "
        left = "" if left_s is None or share == 1 else f"  {duration(left_s)} left"
        after = f" {math.floor(100 * share)}%{left}"
        cells = max(0, width - len(before) - len(after))
        full = round(share * cells)
        heavy, light = ("\u2501", "\u2500") if blocks else ("=", "-")
        return Text.assemble((before, "bold"), (heavy * full, "green"), (light * (cells - full), "dim"), after)

    def _loss(self, width: int, blocks: bool) -> Text:
        """Returns the line with the loss, its sparkline, and flags such as a spike."""
        line = _cell("Loss", number(self.record.get("loss"), ".4f", "nan"), width)
        line.append("  ")
        flags = " ".join(part for part in stability_parts(self.record) if not part.startswith("loss variance"))
        if blocks:
            room = width - line.cell_len - (len(flags) + 2 if flags else 0)
            line.append(sparkline(self.losses, min(_LOSSES, room)), "cyan")
        return line.append(f"  {flags}" if flags else "", "bold yellow")

    def _cells(self) -> list[tuple[str, str]]:
        """Returns pairs of label and value; two consecutive pairs are drawn side by side."""
        record = self.record
        mfu, memory = record.get("mfu") or {}, record.get("memory") or {}
        norm = (record.get("gradients") or {}).get("global_norm")
        found = [("Learning rate", f"{record.get('lr', 0.0):.2e}"), ("Gradient norm", number(norm, ".4f", "nan"))]
        if "mfu_percent" in mfu or not mfu:
            peak = f" of {mfu['hardware_peak_tflops']:,.0f} TF" if "hardware_peak_tflops" in mfu else ""
            peak += f" {mfu.get('peak_basis', '')}"
            label = f"MFU, {mfu['convention']}" if "convention" in mfu else "MFU"
            speed = (label, f"{percent(mfu['mfu_percent'])}{peak}".rstrip() if mfu else "-")
        else:
            speed = ("Achieved", with_unit(mfu["achieved_tflops"] * 1e12, "FLOP/s"))
        found += [speed, ("Tokens/s", count_text(mfu["tokens_per_sec"]) if mfu else "-")]
        if "peak_gb" in memory:
            plan = "" if self.planned_gb is None else f", {byte_text(1e9 * self.planned_gb)} planned"
            found.append(("Memory", f"{byte_text(1e9 * memory['peak_gb'])} peak{plan}"))
        else:
            found.append(("Memory", f"{byte_text(1e9 * memory['rss_gb'])} resident" if "rss_gb" in memory else "-"))
        iteration_s = None if self.progress is None else self.progress.iteration_s
        time_ms = record.get("time_ms", 0.0) if iteration_s is None else 1e3 * iteration_s
        found.append(("Time", f"{count_text(time_ms)} ms/iteration"))
        if self.evaluation:
            found.append(
                ("Validation", f"{number(self.evaluation['val_loss'], '.4f', 'nan')} at {self.evaluation['iter']:,}")
            )
        if self.best is not None:
            found.append(("Best", f"{self.best[0]:.4f}" + (f" at {self.best[1]:,}" if self.best[1] else "")))
        return found


def _now(progress: Progress) -> str:
    """Returns what the main thread does: "iteration 42, micro-batch 3 of 40, 12.3 s"."""
    kind, part, parts, seconds = progress.kind, progress.part, progress.parts, progress.seconds
    what = {"iteration": f"iteration {progress.number:,}", "end": "end of the run"}.get(kind, kind)
    name = {"iteration": "micro-batch", "evaluation": "batch"}.get(kind, "part")
    within = f", {name} {part + 1:,} of {parts:,}" if part < parts and parts > 1 else ""
    return f"{what}{within}, {duration(seconds)}"


def _cell(label: str, value: str, width: int) -> Text:
    return Text.assemble((f" {label:<{0 if width < _NO_PADDING else _LABEL}} ", "dim"), (value, ""))


class Live(rich.live.Live):
    """Draws the panel on a terminal. Text that other code prints through Python appears above it.

    Args:
        console: console of the terminal.
        panel: panel to draw.
        failed: called when the terminal is gone.
    """

    def __init__(self, console: RichConsole, panel: Panel, failed: Callable[[], None]):
        self.panel, self.failed = panel, failed
        self._drawn_width = console.width
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._ended = threading.Event()
        here = console.file.isatty()
        super().__init__(
            console=console,
            # rich's own thread would deadlock: it takes rich's lock before `DRAWING`, other threads take it after.
            auto_refresh=False,
            vertical_overflow="crop",
            redirect_stdout=here and sys.stdout is not None and sys.stdout.isatty(),
            redirect_stderr=here and sys.stderr is not None and sys.stderr.isatty(),
        )

    def get_renderable(self) -> Panel:
        return self.panel

    def start(self, refresh: bool = False) -> None:
        """Starts to draw. From now on `logging` handlers that write to stderr write above the panel."""
        stderr = sys.stderr
        super().start(refresh=False)
        self.refresh()
        threading.Thread(target=self._redraw, name="console", daemon=True).start()
        if sys.stderr is stderr:
            return
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for logger in loggers:
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    handler.setStream(sys.stderr)
                    self._handlers.append((handler, stderr))

    def stop(self) -> None:
        """Draws once more and leaves the panel on the screen."""
        self._ended.set()
        with DRAWING:
            self.panel.closed = self.panel.changed = True
            super().stop()
        while self._handlers:
            handler, stream = self._handlers.pop()
            handler.setStream(stream)

    def refresh(self) -> None:
        """Draws the panel if something has changed. If the terminal is gone, the drawing ends and the run continues."""
        with DRAWING:
            width = self.console.width
            if not self.panel.due and (width == self._drawn_width or self.panel.closed):
                return
            try:
                if width < self._drawn_width:
                    self._erase_wrapped(width)
                self._drawn_width = width
                super().refresh()
            except OSError:
                self.failed()

    def _redraw(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            self.refresh()

    def _erase_wrapped(self, width: int) -> None:
        """Erases the rows that appeared when the terminal became narrower and wrapped the lines of the panel."""
        more = sum((columns - 1) // width for columns in self.panel.rows if columns)
        if more:
            self.console.file.write(f"\x1b[{more}A\x1b[J")
