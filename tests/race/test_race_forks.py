"""Changes from a checkpoint, in pairs of forks until they are decided, with a trainer that does not train."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from ablate_helpers import finish
from race_helpers import FakeTrainer

from gptperf.config import Config, command_line
from gptperf.errors import PREEMPTED, ConfigError
from gptperf.experiment.job import Job
from gptperf.race import __main__ as race
from gptperf.race.fork import alternatives

STEP = 1000


def _run(folder: Path, *flags: str, schedule: str = "wsd") -> Path:
    """A run with a checkpoint at a constant rate, as its log tells it."""
    argv = ["gpt2_124m", "--max_iters=5000", "--warmup_iters=100", f"--lr_schedule={schedule}", f"--out_dir={folder}"]
    config = command_line.resolve([*argv, *flags]).config
    job = Job(config.train.seed, folder, (), config, "")
    finish(job, 3.0, end=False)
    job.checkpoint(STEP).mkdir(parents=True)
    (job.checkpoint(STEP) / "MANIFEST.json").touch()
    return folder


def _loss(noise: float, effect: Callable[[Config], float]) -> Callable[[Config], float]:
    def loss(config: Config) -> float:
        seed = config.train.seed
        return 3 + math.sin(seed) + noise * math.sin(17 * seed + 1e5 * config.optimizer.learning_rate) + effect(config)

    return loss


def _record(out: Path) -> dict:
    return json.loads((out / "race.json").read_text())


def test_changes_are_tried_in_pairs_until_they_are_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run")
    good, bad = 1.2e-3, 3e-3
    trainer = FakeTrainer(
        monkeypatch,
        _loss(1e-3, lambda config: {good: -0.02, bad: 0.03}.get(config.optimizer.learning_rate, 0.0)),
    )
    argv = [f"{run}@{STEP}", f"--vary=learning_rate={good},{bad},7e-4", "--tolerance=0", f"--out={tmp_path / 'out'}"]
    assert race.main([*argv, f"--html={tmp_path / 'page.html'}"]) == 0
    found = _record(tmp_path / "out")
    better, worse, same = found["changes"]
    assert (better["verdict"], worse["verdict"], same["verdict"]) == ("better", "worse", "no difference found")
    assert better["low"] <= -0.02 <= better["high"] < 0 < worse["low"]
    assert len(same["differences"]) == 12
    assert len(better["differences"]) < 8
    out = capsys.readouterr().out
    assert "learning_rate=0.0012 has the lowest loss" in out
    assert "learning_rate=7e-4: the forks inherit what the unchanged run has done" in out
    # every arm of a pair has the same seed, and ends with a cooldown
    for config, start in trainer.ran:
        assert start == f"{run}@{STEP}"
        assert config.train.max_iters == 1500
        assert config.optimizer.lr_schedule == "wsd"
        assert 1500 * config.optimizer.wsd_decay_fraction == pytest.approx(300, abs=1)
    seeds = [config.train.seed for config, _ in trainer.ran]
    assert seeds[:4] == [1338] * 4
    assert seeds == sorted(seeds)
    assert found["tokens"] == len(seeds) * 500 * trainer.ran[0][0].tokens_per_iter
    assert "<figure>" in (tmp_path / "page.html").read_text()
    done = len(trainer.ran)
    assert race.main(argv) == 0
    assert len(trainer.ran) == done  # nothing is trained again


def test_pairs_from_the_start_are_short_runs_of_the_whole_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They need no checkpoint and no constant rate, and each pair has an initialization and data of its own."""
    run = _run(tmp_path / "run", schedule="cosine")
    effect = {"adamw": 0.0, "muon": -0.05}
    trainer = FakeTrainer(monkeypatch, _loss(1e-3, lambda config: effect[config.optimizer.optimizer]))
    assert race.main([f"{run}@0", "--vary=optimizer=muon", f"--out={tmp_path / 'out'}"]) == 0
    found = _record(tmp_path / "out")
    assert found["changes"][0]["verdict"] == "better"
    assert (found["step"], found["end"]) == (0, 1250)  # a quarter of the run
    for config, start in trainer.ran:
        assert start == "auto"
        assert config.train.max_iters == 1250
        assert (config.optimizer.lr_schedule, config.optimizer.wsd_decay_fraction) == ("wsd", 0.2)
        assert config.optimizer.warmup_iters == 100
    seeds = [config.train.seed for config, _ in trainer.ran]
    assert seeds == [1338 + place // 2 for place in range(len(seeds))]
    assert found["tokens"] == len(seeds) * 1250 * trainer.ran[0][0].tokens_per_iter
    assert "inherit" not in capsys.readouterr().out


def test_only_a_change_of_the_optimizer_inherits_from_the_unchanged_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run")
    FakeTrainer(monkeypatch, _loss(1e-3, lambda config: 0.05))
    vary = ("--vary=dtype=float32", "--vary=beta2=0.9", "--vary=kernels=eager,weight_decay=0")
    assert race.main([f"{run}@{STEP}", *vary, f"--out={tmp_path / 'out'}"]) == 0
    assert "longer runs. beta2=0.9, kernels=eager,weight_decay=0: the forks inherit" in capsys.readouterr().out


def test_a_small_difference_is_none_without_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of one checkpoint differ so little that a change without effect could be called better or worse."""
    run = _run(tmp_path / "run")
    FakeTrainer(monkeypatch, _loss(0.0, lambda config: 1e-4 if config.system.dtype == "float32" else 0.0))
    assert race.main([f"{run}@{STEP}", "--vary=dtype=float32", f"--out={tmp_path / 'out'}"]) == 0
    assert _record(tmp_path / "out")["changes"][0]["verdict"] == "the same"
    argv = [f"{run}@{STEP}", "--vary=dtype=float32", "--tolerance=0"]
    assert race.main([*argv, f"--out={tmp_path / 'exact'}"]) == 0
    assert _record(tmp_path / "exact")["changes"][0]["verdict"] == "worse"


def test_a_tolerance_decides_that_a_change_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "run")
    trainer = FakeTrainer(monkeypatch, _loss(1e-3, lambda config: 0.0))
    argv = [f"{run}@{STEP}", "--vary=dtype=float32,learning_rate=7e-4", f"--out={tmp_path / 'out'}"]
    assert race.main([*argv, "--tolerance=0.01"]) == 0
    assert _record(tmp_path / "out")["changes"][0]["verdict"] == "the same"
    assert len(trainer.ran) < 24
    trainer = FakeTrainer(monkeypatch, lambda config: None if config.system.dtype == "float32" else 3.0)
    assert race.main([f"{run}@{STEP}", "--vary=dtype=float32", f"--out={tmp_path / 'fails'}"]) == 0
    assert _record(tmp_path / "fails")["changes"][0]["verdict"] == "worse: exit code 5"


def test_forks_continue_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "run")
    trainer = FakeTrainer(
        monkeypatch, _loss(1e-3, lambda config: -0.02 if config.optimizer.learning_rate > 1e-3 else 0.0)
    )
    argv = [f"{run}@{STEP}", "--vary=learning_rate=1.2e-3"]
    assert race.main([*argv, f"--out={tmp_path / 'whole'}"]) == 0
    total = len(trainer.ran)
    trainer.stop_at = total + 4
    assert race.main([*argv, f"--out={tmp_path / 'parts'}"]) == PREEMPTED
    trainer.stop_at = None
    assert race.main([*argv, f"--out={tmp_path / 'parts'}"]) == 0
    assert len(trainer.ran) == 2 * total + 1
    whole, parts = (_record(tmp_path / name)["changes"] for name in ("whole", "parts"))
    assert whole == parts


def test_values_are_changes_of_their_own() -> None:
    assert alternatives(["learning_rate=1e-3,2e-3"]) == ["learning_rate=1e-3", "learning_rate=2e-3"]
    assert alternatives(["dtype=float32,beta2=0.9,0.99", "seed=1"]) == [
        "dtype=float32,beta2=0.9",
        "dtype=float32,beta2=0.99",
        "seed=1",
    ]


def test_what_cannot_be_forked_is_refused_first(tmp_path: Path) -> None:
    run, cosine = _run(tmp_path / "run"), _run(tmp_path / "cosine", schedule="cosine")
    cases = {
        (f"{run}@999", "--vary=learning_rate=1e-3"): f"wanted one of 1000; nearest: {run}@1000",
        (f"{cosine}@1000", "--vary=learning_rate=1e-3"): "found lr_schedule = cosine",
        (f"{run}@1000",): "found no --vary",
        (f"{run}@1000", "--vary=learning_rate=fast"): "learning_rate: found 'fast'",
        (f"{run}@1000", "--vary=learning_rate=6e-4"): "the same configuration as as it is",
        (f"{run}@1000", "--vary=batch_size=2"): "another number of tokens",
        (f"{run}@1000", "--vary=seed=2"): "seed is set by the race",
        (f"{run}@1000", "--vary=learning_rate=1e-3", "--max_iters=1001"): "wanted more than 1001",
        (f"{run}@0", "--vary=learning_rate=1e-3", "--max_iters=120"): "found 120, wanted 125 or more",
        (f"{run}@1000", "other", "--vary=learning_rate=1e-3"): "found 'other'",
        (f"{run}@999", "--n_layr=3", "--vary=n_heda=3"): f"{run}: found no checkpoint",
    }
    for words, message in cases.items():
        with pytest.raises(ConfigError) as error:
            race.main([*words, f"--out={tmp_path / 'out'}"])
        assert message in str(error.value), words
    for message in ("nearest: n_layer", "--vary n_heda=3: unknown key 'n_heda'; nearest: n_head"):  # of the last one
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
