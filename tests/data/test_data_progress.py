"""Progress of a preparation: a bar that fits any terminal, elsewhere a line per minute."""

import functools
import io
import re
import time

import pytest
import rich.console

from gptperf.data.progress import progress_bar
from gptperf.data.readers import Meter


class Read(Meter):
    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def read(self) -> int:
        return self.done


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("name", ["web", "train:32768: the sample of the text", "x[red]" * 20])
@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 200])
def test_a_bar_shows_share_and_time_left_on_any_terminal(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    out, meter = io.StringIO(), Read()
    terminal = functools.partial(rich.console.Console, file=out, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(rich.console, "Console", lambda **_: terminal())
    with progress_bar(name, 1000, meter, quiet=False) as progress:
        for tokens in range(0, 900_000_000, 100_000_000):
            clock.now += 1
            meter.done += 100
            progress(tokens)
    states = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", out.getvalue()) if "%" in line]
    last = states[-1].rstrip()
    assert " 90% 0:00:" in last, last
    assert all(len(state.rstrip()) <= width for state in states)
    assert "..." not in last and "\u2026" not in last  # noqa: PT018
    if width >= 80 and name == "web":
        assert last.startswith("web: 800,000,000 tokens")


def test_lines_where_there_is_no_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Read()
    for total in (10_000, None):
        meter.done = 5_000  # a preparation that goes on where it was
        with progress_bar("web", total, meter, quiet=False) as progress:
            for second in range(150):
                clock.now += 1
                progress(1_000 * second)
                meter.done += 10
    assert capsys.readouterr().err.splitlines() == [
        "gptperf: web: 59,000 tokens, 56%, about 7.5 minutes left",
        "gptperf: web: 119,000 tokens, 62%, about 6.4 minutes left",
        "gptperf: web: 59,000 tokens",
        "gptperf: web: 119,000 tokens",
    ]


def test_a_quiet_preparation_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("web", 10, Read(), quiet=True) as progress:
        clock.now += 1000
        progress(5)
    assert capsys.readouterr() == ("", "")
