"""Starts and saves are timed from outside, with the commands that users call."""

import pytest

from bench.measure import start
from bench.report import metrics, outside
from gptperf.errors import DeviceError


def test_starts_and_saves_of_a_run_are_timed() -> None:
    found = start.measure("tiny", ["--n_layer=1", "--max_iters=8", "--save_interval=2"])
    assert len(found["stalls_ms"]) == 4  # of iterations 2, 4, 6 and 8
    assert max(found["stalls_ms"]) > 0
    assert found["save_ms"] > min(found["stalls_ms"])
    assert [list(found[what]) for what in ("iteration_s", "token_s")] == [["cold", "warm"]] * 2
    seconds = [*found["iteration_s"].values(), *found["token_s"].values()]
    assert min(seconds) > 0.1  # Python and torch were started
    assert "tiny" in start.line(found)
    record = {"cell": "start/tiny", "status": "done", "results": found}
    (section,) = outside.start({"start/tiny": record})
    (row,) = section.tables[0].rows
    assert row[:5] == ("tiny", *(f"{one:,.1f}" for one in seconds))
    assert len(metrics.metrics(record)) == 5


def test_a_command_that_fails_is_named_with_its_message() -> None:
    with pytest.raises(DeviceError, match=r"gptperf.train ended with exit code 2.*n_layer"):
        start.measure("tiny", ["--n_layer=zero"])
