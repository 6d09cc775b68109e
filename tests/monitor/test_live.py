"""The panel of a run: on terminals of any size, with output of other code above it, and when the terminal is gone."""

import contextlib
import io
import itertools
import math
import re
import time
from typing import Any

import pytest
from console_helpers import RECORD, in_a_terminal, on_terminal, play, screen

from gptperf.distributed.progress import Progress
from gptperf.monitor.console import Console
from gptperf.monitor.live import Panel, sparkline


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def one_iteration(console: Console) -> None:
    with console:
        console.iteration(RECORD, eta_s=2559.0)


PANEL = [
    "\u2500",
    " 5/600 \u2500 0%  42:39 left",
    " Loss           10.6456  \u2581",
    " Learning rate  1.50e-06               \u2502 Gradient norm  2.3456",
    " MFU, strict    9.22% of 989 TF dense  \u2502 Tokens/s       114,350",
    " Memory         15.67 GB peak          \u2502 Time           4,298 ms/iteration",
]


def without_repeats(line: str) -> str:
    return re.sub("[\u2500\u2501]+", lambda found: found.group()[0], line)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_a_panel_and_no_blocks() -> None:
    text = on_terminal(one_iteration)
    assert [without_repeats(line) for line in screen(text)] == [*PANEL, ""]
    assert "\x1b[?25l" not in text  # the cursor is never hidden
    assert " Iter " not in text


@pytest.mark.usefixtures("terminal")
def test_lines_stay_above_the_panel() -> None:
    def act(console: Console) -> None:
        with console:
            for i in range(1, 31):
                spike = {"stability": {"window": 20, "spike": True}} if i == 20 else {}
                console.iteration(RECORD | spike | {"iter": i, "loss": 40.0 - i}, eta_s=2559.0)
                if i == 10:
                    console.warning("careful")
            console.evaluation({"iter": 30, "val_loss": 10.5, "best_val_loss": 10.5})
            console.checkpoint({"iter": 30, "path": "out/checkpoints/step-00000030"})

    lines = screen(on_terminal(act))
    assert lines[:5] == [
        " WARNING: careful",
        " WARNING: iteration 20: LOSS SPIKE",
        " Evaluation at 30: loss 10.5000  best 10.5000",
        " Checkpoint at 30: out/checkpoints/step-00000030",
        "\u2500" * 80,
    ]
    assert lines[5].startswith(" 30/600 \u2501")
    assert re.fullmatch(" Loss           10.0000  \u2588[\u2581-\u2588]{28}\u2581", lines[6])
    assert lines[-3:] == [
        " Validation     10.5000 at 30          \u2502 Best           10.5000 at 30",
        " Checkpoint     30: out/checkpoints/step-00000030",
        "",
    ]


@pytest.mark.usefixtures("terminal")
def test_the_panel_is_redrawn_four_times_a_second_at_most() -> None:
    def act(console: Console) -> None:
        with console:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                console.iteration(RECORD, eta_s=2559.0)
                time.sleep(0.001)
            calm.append(len(drawn))
            console.iteration(RECORD)
            time.sleep(0.6)

    drawn: list[int] = []
    calm: list[int] = []
    draw = Panel.__rich_console__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Panel, "__rich_console__", lambda self, *args: drawn.append(1) or draw(self, *args))
        on_terminal(act)
    assert 2 <= calm[0] <= 6
    assert len(drawn) <= calm[0] + 2  # no drawing without something new, except the last one


@pytest.mark.usefixtures("terminal")
def test_the_panel_moves_between_log_lines() -> None:
    """The training thread only counts, and each second the panel shows where it is."""
    progress = Progress()
    progress.max_iters = 600
    seen: list[tuple[float, int, str]] = []
    draw = Panel.__rich_console__

    def act(console: Console) -> None:
        with console:
            console.startup({})  # before the first log line, and with a first iteration that takes long
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                progress.start_iteration(progress.finished + 1, 40)
                for _ in range(20):
                    progress.end_part()
                    time.sleep(0.02)
                progress.end_iteration()
                progress.finished += 1

    def watched(self: Panel, *args: Any) -> Any:
        seen.append((time.monotonic(), progress.finished, "".join(line.plain for line in self._lines(80, "utf-8"))))
        return draw(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Panel, "__rich_console__", watched)
        text = on_terminal(act, progress=progress)
    during = [entry for entry in seen[:-1] if entry[1]]
    assert len(during) >= 2
    for _, finished, lines in during:
        assert f" {finished}/600 " in lines
        assert re.search(rf"Now +iteration {finished + 1}, micro-batch \d+ of 40, ", lines)
    assert " left" in during[-1][2]
    assert all(later - earlier < 1.0 + 0.5 for (earlier, *_), (later, *_) in itertools.pairwise(seen))
    assert "Now" not in screen(text)[-3:]


def test_nothing_moves_on_a_pipe() -> None:
    progress, stream = Progress(), io.StringIO()
    progress.start_iteration(1, 40)
    with Console(max_iters=600, stream=stream, progress=progress) as console:
        console.startup({})
        before = stream.getvalue()
        time.sleep(0.8)
        assert stream.getvalue() == before


@pytest.mark.usefixtures("terminal")
def test_an_error_comes_below_the_panel() -> None:
    def fail(console: Console) -> None:
        with contextlib.suppress(ZeroDivisionError), console:
            console.iteration(RECORD, eta_s=2559.0)
            raise ZeroDivisionError
        console.stream.write("gptperf: E5: what was wrong\n")

    lines = [without_repeats(line) for line in screen(on_terminal(fail))]
    assert lines == [*PANEL, "gptperf: E5: what was wrong", ""]


CHILDREN = f"""
import logging, multiprocessing, sys, time, warnings
from gptperf.monitor.console import Console
logging.basicConfig(format="%(message)s")
def child():
    raise RuntimeError("of a child")
with Console(max_iters=600) as console:
    for i in range(1, 31):
        console.iteration({RECORD!r} | {{"iter": i}})
        if i % 10 == 0:
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join()
        if i == 5:
            logging.warning("by logging")
            warnings.warn("by warnings")
        time.sleep(0.03)
    raise RuntimeError("of the parent")
"""


@pytest.mark.usefixtures("terminal")
def test_what_others_print_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    code, text = in_a_terminal(CHILDREN, 200)
    lines = screen(text, 200)
    assert code == 1
    panel = next(i for i, line in enumerate(lines) if line.startswith(" 30/600 "))
    assert lines.count("RuntimeError: of a child") == 3
    assert lines.count("Traceback (most recent call last):") == 4
    assert lines.index("by logging") < panel
    assert any("UserWarning: by warnings" in line for line in lines[:panel])
    assert sum("Learning rate" in line for line in lines) == 1
    assert lines.index("RuntimeError: of the parent") > panel + 4


@pytest.mark.usefixtures("terminal")
def test_a_narrower_terminal_keeps_one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    code = f"""
import fcntl, struct, termios, time
from gptperf.monitor.console import Console
with Console(max_iters=600) as console:
    console.iteration({RECORD!r})
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    time.sleep(0.4)
"""
    status, text = in_a_terminal(code)
    assert status == 0
    # At 50 columns each of the panel's six lines wraps once, except that of the loss.
    assert "\x1b[5A\x1b[J" in text
    last = screen(text[text.index("\x1b[J") :])
    assert max(map(len, last)) < 50
    assert " Gradient norm  2.3456" in last


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_a_killed_run_leaves_the_cursor(signal_name: str) -> None:
    code = f"""
import os, signal
from gptperf.errors import main_guard
from gptperf.monitor.console import Console
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
with main_guard(), Console(max_iters=600) as console:
    console.iteration({RECORD!r})
    os.kill(os.getpid(), signal.{signal_name})
"""
    status, text = in_a_terminal(code)
    assert status == {"SIGINT": 130, "SIGKILL": -9}[signal_name]
    assert screen(text)[-1] == ""  # the prompt comes on a line of its own
    assert "\x1b[?" not in text


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("mode", "terminal_stream", "term", "live"),
    [
        ("auto", True, "xterm", True),
        ("auto", False, "xterm", False),
        ("auto", True, "dumb", False),
        ("live", False, "xterm", True),
        ("live", True, "dumb", False),
        ("plain", True, "xterm", False),
    ],
)
def test_modes(monkeypatch: pytest.MonkeyPatch, mode: str, terminal_stream: bool, term: str, live: bool) -> None:
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal_stream)
    one_iteration(Console(max_iters=600, mode=mode, stream=stream))
    text = stream.getvalue()
    assert ("\x1b" in text) == live
    assert (" Iter      5" in text) != live


@pytest.mark.usefixtures("terminal")
def test_no_color_means_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)[0-8][;m]")
    monkeypatch.setenv("NO_COLOR", "1")
    text = on_terminal(play_little)
    assert not colour.search(text)
    assert " WARNING: careful" in text
    assert " 5/600 " in text
    monkeypatch.delenv("NO_COLOR")
    assert colour.search(on_terminal(play_little))


def test_sparkline() -> None:
    assert sparkline((0.0, 1.0, 2.0, math.nan, 4.0), 3) == "\u2581!\u2588"
    assert sparkline((5.0, 5.0), 9) == "\u2581\u2581"
    assert sparkline((), 9) == sparkline((1.0,), 0) == ""


def play_little(console: Console) -> None:
    with console:
        console.iteration(RECORD)
        console.warning("careful")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("columns", "encoding"), [(1, "utf-8"), (20, "ascii"), (20, "utf-8"), (200, "utf-8")])
def test_terminals_of_any_width(monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    code = f"""
from gptperf.monitor.console import Console
with Console(max_iters=600) as console:
    console.startup({{}})
    for i in range(1, 4):
        console.iteration({RECORD!r} | {{"iter": i}}, eta_s=2559.0)
        console.message("caf\\u00e9")
"""
    status, text = in_a_terminal(code, columns)
    assert status == 0, text
    assert "=" * min(columns, 80) in text.splitlines()[0]
    assert ("caf\u00e9" if encoding == "utf-8" else "caf?") in text
    assert encoding == "utf-8" or text.isascii()
    lines = screen(text, columns)
    if columns == 20:
        assert lines[-11:-1] == [
            " caf\u00e9" if encoding == "utf-8" else " caf?",
            "\u2500" * 19 if encoding == "utf-8" else "",
            " 3/600  0%  42:39 l",
            " Loss 10.6456" + ("  \u2581\u2581\u2581" if encoding == "utf-8" else ""),
            " Learning rate 1.50",
            " Gradient norm 2.34",
            " MFU, strict 9.22%",
            " Tokens/s 114,350",
            " Memory 15.67 GB pe",
            " Time 4,298 ms/iter",
        ]


class Gone(io.StringIO):
    """A stream whose reader is gone."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("terminal_stream", [True, False])
def test_a_gone_reader_does_not_end_the_run(terminal_stream: bool) -> None:
    with Console(max_iters=600, stream=Gone(terminal_stream)) as console:
        assert console.enabled
        console.iteration(RECORD)
        assert not console.enabled
        play(console)
