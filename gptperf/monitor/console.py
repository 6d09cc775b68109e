"""The output of a run: plain lines or, on a terminal, a live panel with lines above it.

Plain text goes to the stream unchanged, without escape codes or wrapping, so that it can be piped and searched. The
panel is drawn by rich. `gptperf.monitor.blocks` makes the text and `gptperf.monitor.live` the panel; `Console` decides
where they go.
"""

import contextlib
import io
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.text import Text

from gptperf.distributed.progress import Progress
from gptperf.monitor.blocks import (
    WIDTH,
    checkpoint_lines,
    evaluation_lines,
    iteration_lines,
    printable,
    profile_lines,
    stability_parts,
    startup_lines,
    summary_lines,
)
from gptperf.monitor.live import DRAWING, Live, Panel, RichConsole

__all__ = ["Console"]

_QUEUED = 100  # warnings that a rank keeps for the main one


class Console:
    """Prints a run on the main rank; the other ranks keep their warnings until the main rank asks for them.

    It is a context manager, and its end ends the live panel.

    Args:
        max_iters: number of iterations of the run.
        mode: "live" or "plain"; "auto" is live on a terminal.
        enabled: False on every rank except rank 0.
        stream: where to print; stdout by default.
        progress: position of the main thread, which the panel shows between log lines.
    """

    def __init__(
        self,
        *,
        max_iters: int,
        mode: str = "auto",
        enabled: bool = True,
        stream: TextIO | None = None,
        progress: Progress | None = None,
    ):
        self.max_iters = max_iters
        self.enabled = enabled
        """Whether lines are printed; becomes False when the reader of the stream is gone."""
        self.stream = sys.stdout if stream is None else stream
        self._main = enabled
        self._pid = os.getpid()
        self._is_stdout = self.stream is sys.stdout
        self._waiting: deque[str] = deque(maxlen=_QUEUED)
        self._warned: set[str] = set()
        self._planned_gb: float | None = None
        self._flagged = ""
        self._rich: RichConsole | None = None
        self._live: Live | None = None
        self._panel = Panel(max_iters, progress)
        if self.stream is None:  # stdout was closed before the start
            self.enabled = False
        elif enabled and _draws(mode, self.stream):
            self._rich = RichConsole(self.stream)  # it obeys NO_COLOR itself

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def startup(self, info: Mapping[str, Any]) -> None:
        """Prints the blocks of a `StartupInfo`; on a terminal the panel then shows the first iteration."""
        self._planned_gb = self._panel.planned_gb = (info.get("plan") or {}).get("memory_gb")
        self._print(startup_lines(info, self._width))
        if self._panel.progress is not None:
            self._start()

    def iteration(self, record: Mapping[str, Any], eta_s: float | None = None) -> None:
        """Prints an `Iteration`, or shows it in the panel.

        Args:
            record: the iteration.
            eta_s: seconds until the end of the run, if they are known.
        """
        if not self.enabled:
            return
        if self._rich is None:
            unicode = _shows_unicode(self.stream)
            self._print(iteration_lines(record, self.max_iters, eta_s, self._width, self._planned_gb, unicode))
            return
        self._panel.iteration(record, eta_s)
        self._print_flags(record)
        self._start()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Prints an `Eval`."""
        self._panel.evaluated(record)
        self._print(evaluation_lines(record))

    def checkpoint(self, record: Mapping[str, Any]) -> None:
        """Prints where a `Checkpoint` is."""
        self._panel.checkpoint(record)
        self._print(checkpoint_lines(record))

    def profile(self, record: Mapping[str, Any]) -> None:
        """Prints a `Profile`."""
        self._print(profile_lines(record))

    def message(self, text: str) -> None:
        """Prints a line."""
        self._print([f" {text}"])

    def warning(self, text: str) -> None:
        """Prints a warning on the main rank; any other rank keeps it for `pending`."""
        if not self._main:
            self._waiting.append(text)
            return
        self._warned.add(text)
        self._print([f" WARNING: {text}"])

    def pending(self) -> list[str]:
        """Returns and clears the warnings that this rank kept; the main rank has none."""
        texts = list(self._waiting)
        self._waiting.clear()
        return texts

    def gathered(self, rank: int, lines: Iterable[str]) -> None:
        """Prints the warnings of another rank, except those already printed for any rank."""
        for text in lines:
            if text not in self._warned:
                self._warned.add(text)
                self._print([f" WARNING: rank {rank}: {text}"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the panel and prints a `Summary`."""
        self._stop()
        self._print(summary_lines(summary, self._width))

    @property
    def _width(self) -> int:
        """Width of a rule in columns. For plain text in a file it does not depend on a terminal."""
        if self._rich is not None:
            return max(1, min(WIDTH, self._rich.width))
        if not self.enabled or not self.stream.isatty():
            return WIDTH
        return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)

    def _print_flags(self, record: Mapping[str, Any]) -> None:
        """Prints a line when losses begin to spike or a step was skipped; the panel shows it for one log line only."""
        flags = "  ".join(part for part in stability_parts(record) if not part.startswith("loss variance"))
        if flags and flags != self._flagged:
            self._print([f" WARNING: iteration {record['iter']:,}: {flags}"])
        self._flagged = flags

    def _start(self) -> None:
        if self._rich is not None and self._live is None and self.enabled:
            with self._while_read():
                self._live = Live(self._rich, self._panel, self._silence)
                self._live.start()

    def _stop(self) -> None:
        if os.getpid() != self._pid:  # this is a forked child, and the panel belongs to its parent
            return
        live, self._live = self._live, None
        if live is not None:
            with self._while_read():
                live.stop()

    def _print(self, lines: Iterable[str]) -> None:
        if not self.enabled:
            return
        encoding = self.stream.encoding or "utf-8"
        text = printable("\n".join(lines)).encode(encoding, "replace").decode(encoding)
        with self._while_read(), DRAWING:  # the answer to a signal comes from another thread
            if self._rich is not None:
                self._rich.print(Text("\n").join(_styled(text)))
            else:
                self.stream.write(text + "\n")
                self.stream.flush()

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        """Stops printing when the reader or the terminal is gone; the run continues, and its log has everything."""
        try:
            yield
        except OSError:
            self._silence()

    def _silence(self) -> None:
        self.enabled = False
        if self._is_stdout:  # Python flushes stdout once more when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if self._rich is not None:
            self._rich.file = io.StringIO()
        self._stop()


def _draws(mode: str, stream: TextIO) -> bool:
    """Returns whether there is a live panel."""
    return _able() and mode != "plain" and (mode == "live" or stream.isatty())


def _able() -> bool:
    """Returns whether a terminal, if there is one, can do more than print lines."""
    return os.environ.get("TERM") not in ("dumb", "unknown")


def _shows_unicode(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal that shows box characters."""
    return _able() and stream.isatty() and (stream.encoding or "").lower().startswith("utf")


def _styled(text: str) -> Iterator[Text]:
    """Yields the lines of a text in terminal colours, chosen by how a line begins."""
    for line in text.split("\n"):
        if line.startswith(("===", "---")):
            yield Text(line, "dim")
        elif line.startswith(" WARNING:"):
            yield Text(line, "bold yellow")
        elif line.startswith(" Evaluation "):
            yield Text(line, "bold")
        elif line.isupper() and line.startswith(" ") and line[1] != " ":
            yield Text(line, "bold cyan")
        elif line.startswith(("  ", " Note:")):
            label, colon, rest = line.partition(": ")
            yield Text.assemble((label + colon, "dim"), rest) if colon else Text(line)
        else:
            yield Text(line)
