"""Races of models that are really trained: a small race from its command to its page, and forks of a run."""

import json
from pathlib import Path

import pytest
from run_helpers import ROOT, hashes, losses, run

from gptperf import train
from gptperf.config import command_line
from gptperf.experiment import runner
from gptperf.race import __main__ as race
from gptperf.race import speed

TINY = ("--n_layer=1", "--gradient_accumulation_steps=1", "--sample_tokens=0")


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains and times in this process, where torch is loaded already."""

    def run_here(_: runner.Runner, line: list[str], gpu: str | None = None, log: Path | None = None) -> int:
        if "gptperf.train" not in line:
            return speed.measure(line[3:])
        return train.main(line[line.index("gptperf.train") + 1 :])

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner.Runner, "run", run_here)
    monkeypatch.setattr(speed, "WINDOW_S", 0.1)
    monkeypatch.setattr(speed, "TURNS", 3)


def _small(corpus: Path) -> list[str]:
    flags = [f"--data_dir={corpus / 'data'}", "--max_iters=20", "--warmup_iters=2", *TINY]
    return [str(corpus / "small.toml"), *flags]


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_a_small_race_from_command_to_page(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [*_small(corpus), "--vary=position_encoding=none", "--seeds=1", f"--out={out}", "--keep_models", "--price=2"]
    code = race.main([*argv, "--lr_factors=0.01,1,100", f"--html={tmp_path / 'page.html'}"])
    found = json.loads((out / "race.json").read_text())
    assert code == 0, found["verdict"]
    assert found["unit"] == "bits per byte"
    assert found["speed"]["device"] == "CPU"
    first, second = (arm["losses"]["1337"] for arm in found["arms"])
    assert all(0 < loss < 9 for loss in (*first, *second))
    assert "A race" not in (tmp_path / "page.html").read_text()
    # The end of a cooldown that was forked has the bits of a whole run of its length.
    folder = out / "baseline" / "seed1337"
    rate = found["arms"][0]["factor"] * command_line.resolve(_small(corpus)).config.optimizer.learning_rate
    keys = ("--max_iters=10", "--warmup_iters=2", "--lr_schedule=wsd", f"--learning_rate={rate}", "--eval_interval=10")
    lowest = found["arms"][0]["factor"] * 1e-3
    assert run(corpus, tmp_path / "whole", *keys, f"--min_lr={lowest}", *TINY) == 0
    assert losses(folder / "cooldown10") == losses(tmp_path / "whole")[8:]
    last = "checkpoints/step-00000010"
    assert hashes(folder / "cooldown10" / last) == hashes(tmp_path / "whole" / last)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_forks_of_a_run_from_command_to_verdict(corpus: Path, tmp_path: Path) -> None:
    """A learning rate that is far too low is worse, and every arm of a pair reads the same data."""
    parent = tmp_path / "run"
    assert run(corpus, parent, "--max_iters=8", "--lr_schedule=constant", *TINY) == 0
    argv = [f"{parent}@8", f"--out={tmp_path / 'out'}", "--vary=learning_rate=1e-6", "--vary=optimizer=muon"]
    assert race.main([*argv, "--seeds=2", "--min_lr=1e-7", "--keep_models"]) in (0, 1)
    found = json.loads((tmp_path / "out" / "race.json").read_text())
    slow, muon = found["changes"]
    assert slow["mean"] > 0
    assert len(muon["differences"]) == 2
    arms = ("as_it_is", "learning_rate=1e-6", "optimizer=muon")
    folders = [next((tmp_path / "out").glob(f"{name}*")) / "pair1" for name in arms]
    assert len({losses(folder)[0] for folder in folders}) == 1  # the same weights and the same data
    # From the start, the arms of a pair have one initialization and its first batch, and pairs have others.
    argv = [f"{parent}@0", f"--out={tmp_path / 'start'}", "--vary=optimizer=muon", "--max_iters=5"]
    assert race.main([*argv, "--seeds=2"]) == 0
    arms, pairs = ("as_it_is", "optimizer=muon"), ("pair1", "pair2")
    first = [{losses(next((tmp_path / "start").glob(f"{arm}*")) / pair)[0] for arm in arms} for pair in pairs]
    assert [len(found) for found in first] == [1, 1]
    assert first[0] != first[1]


def test_windows_take_turns() -> None:
    """The arm that goes first changes, and each window is for one step."""
    order: list[str] = []

    def arm(name: str, seconds: float) -> object:
        def run_steps(steps: int) -> speed.Window:
            order.append(name)
            return speed.Window(seconds * steps, 2.0 * steps)

        return run_steps

    found = speed.in_turns([arm("a", 0.1), arm("b", 0.3)], 4, 1.0)
    assert order[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(windows) for windows in found] == [4, 4]
    for windows, seconds in zip(found, (0.1, 0.3), strict=True):
        assert all(window == pytest.approx((seconds, 2.0)) for window in windows)
