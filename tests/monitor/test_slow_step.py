"""A step that takes ten times as long as the others is explained, once."""

import os
from pathlib import Path

import pytest
from run_helpers import run

from gptperf.monitor import slow_step
from gptperf.monitor.slow_step import SlowSteps, Usage, usage
from gptperf.training import start, trainer


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[Usage]:
    """The counts of the operating system: the last one is the current one."""
    found = [Usage(10.0, 0, 0)]
    monkeypatch.setattr(slow_step, "usage", lambda cgroups: found[-1])
    monkeypatch.setattr(slow_step, "usable_cpus", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 0, 0))
    return found


def test_what_is_known_is_said_once(counts: list[Usage]) -> None:
    said: list[str] = []
    slow = SlowSteps(said.append)
    for iteration in range(6):
        slow.add(iteration, 100.0)
    slow.add(6, 900.0)  # not ten times
    assert said == []
    counts.append(Usage(10.5, 3, 12))
    slow.add(7, 2000.0, 0.7)
    slow.add(8, 2000.0)
    assert said == [
        "iteration 7 took 2.0 s, 20 times the median of 100 ms: 0.7 s of it waiting for data; the CPU quota of its "
        "cgroup stopped this process in 12 periods; this process read 3 pages from disk, so memory may be short; load "
        "average 7.2 on 2 usable CPUs; this process had 0.5 s of CPU time"
    ]


@pytest.mark.parametrize(("times", "last"), [([100.0] * 4, 5000.0), ([1.0] * 20, 150.0), ([5000.0, *[100.0] * 9], 900)])
def test_short_and_first_steps_and_slow_starts_say_nothing(
    counts: list[Usage], times: list[float], last: float
) -> None:
    said: list[str] = []
    slow = SlowSteps(said.append)
    for iteration, step_ms in enumerate([*times, last]):
        slow.add(iteration, step_ms)
    assert said == []


def test_on_a_gpu_only_synchronized_times_count(counts: list[Usage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_step, "gpu_state", lambda uuid: f"clocks of {uuid}")
    said: list[str] = []
    slow = SlowSteps(said.append, "GPU-1")
    for iteration in range(20):
        with slow.watching(iteration, lambda: 0.0):
            pass
    for iteration in range(5):
        slow.add(iteration, 50.0)
    slow.add(5, 700.0)
    assert len(said) == 1
    assert said[0].endswith("; clocks of GPU-1")


def test_the_counts_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("nr_periods 9\nnr_throttled 4\nthrottled_time 12\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cpu.stat").write_text("one two three")
    found = usage([tmp_path, tmp_path / "broken", tmp_path / "absent"])
    assert found.throttled == 4
    assert found.cpu_s > 0


def test_a_run_reports_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, clock = trainer.train_step, [0.0]

    def stalled(engine: object, loader: object, done: int, **keys: object) -> object:
        clock[0] += 30.0 if done == 9 else 0.1
        return step(engine, loader, done, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(start, "estimate", lambda *_: None)  # it measures this machine
    monkeypatch.setattr(trainer, "train_step", stalled)
    monkeypatch.setattr(slow_step.time, "perf_counter", lambda: clock[0])
    assert run(corpus, tmp_path, "--max_iters=12") == 0
    text = capsys.readouterr()
    assert (text.out + text.err).count("iteration 10 took 30.0 s, 300 times the median of 100 ms: load average") == 1
