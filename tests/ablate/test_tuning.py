"""Learning rates that are found for every arm of an ablation before the arms are compared."""

import json
import math
import shutil
from pathlib import Path

import pytest
from ablate_helpers import GPT2, finish

from gptperf.ablate import __main__ as ablate
from gptperf.config import command_line
from gptperf.errors import ConfigError
from gptperf.experiment import runner
from gptperf.experiment.job import Job


class Trained:
    """Stands in for the runs of an ablation: writes the log of a run whose loss depends on its learning rate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.argv: list[list[str]] = []
        self.diverges_above = 1.0
        monkeypatch.setattr(runner.Runner, "run", lambda _, line: self.run(line[line.index("gptperf.train") + 1 :]))

    def run(self, argv: list[str]) -> int:
        self.argv.append(argv)
        config = command_line.resolve(argv).config
        rate = config.optimizer.learning_rate
        if rate > self.diverges_above:
            return 5
        best = 6e-4 if config.model.n_layer == 12 else 1.2e-3
        loss = 3.0 + abs(math.log(rate / best)) + 1e-3 * (config.train.seed % 10) * (1 + config.model.n_layer / 100)
        finish(Job(config.train.seed, Path(config.train.out_dir), (), config, ""), loss)
        return 0

    def rates(self) -> list[tuple[float, float, int]]:
        configs = [command_line.resolve(argv).config for argv in self.argv]
        return [(c.optimizer.learning_rate, c.optimizer.min_lr, c.train.seed) for c in configs]


def test_learning_rates_are_found_for_every_arm_with_another_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(monkeypatch)
    argv = [*GPT2, "--vary=n_layer=6", "--seeds=2", f"--out={tmp_path}", "--tune_lr"]
    assert ablate.main(argv) == 0
    rates = trained.rates()
    assert sorted(rates[:6]) == sorted(
        2 * [(3e-4, 3e-5, 1_001_337), (6e-4, 6e-5, 1_001_337), (1.2e-3, 1.2e-4, 1_001_337)]
    )
    assert rates[6:] == [(6e-4, 6e-5, 1337), (1.2e-3, 1.2e-4, 1337), (6e-4, 6e-5, 1338), (1.2e-3, 1.2e-4, 1338)]
    text = capsys.readouterr().out
    assert "Learning rate tuned per arm" in text
    assert "not tuned" not in text
    assert "n_layer=6: validation loss by learning rate: 0.0003 -> 4.3" in text
    assert "0.0012 is compared" in text
    assert "n_layer=6: the best learning rate is at the end of those tried" in text
    record = json.loads((tmp_path / "ablation.json").read_text())
    assert [len(row["tuning"]) for row in record["variants"]] == [3, 3]
    assert [row["learning_rate"] for row in record["variants"]] == [6e-4, 1.2e-3]
    losses = [run["val_loss"] for row in record["variants"] for run in row["runs"]]
    assert all(loss < 3.1 for loss in losses)

    assert ablate.main(argv) == 0  # takes up where it is: nothing is trained again
    assert len(trained.argv) == 10
    shutil.rmtree(tmp_path / "baseline" / "tuning" / "lr0.0006")
    assert ablate.main(argv) == 0
    assert [rate[0] for rate in trained.rates()[10:]] == [6e-4]
    assert ablate.main([*argv, "--list"]) == 0
    assert len(trained.argv) == 11
    with pytest.raises(
        ConfigError, match=r"n_layer=6/seed1337: holds a run of another .*learning_rate: 0.0012 there, 0.0009"
    ):
        ablate.main([*argv, "--lr_factors=0.5,1.5"])
    with pytest.raises(ConfigError, match=r"--vary learning_rate=1: learning_rate is set by the ablation"):
        ablate.main([*argv, "--vary=learning_rate=1"])


def test_a_learning_rate_that_diverges_is_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(monkeypatch)
    trained.diverges_above = 7e-4
    argv = [*GPT2, "--vary=n_layer=6", "--seeds=1", f"--out={tmp_path}", "--tune_lr"]
    assert ablate.main(argv) == 0
    assert [rate[0] for rate in trained.rates()[6:]] == [6e-4, 6e-4]
    assert "0.0012 -> exit code 5" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    trained.diverges_above = 0.0
    trained.argv.clear()
    assert ablate.main(argv) == 1
    assert len(trained.argv) == 6
    assert "no learning rate works for baseline, n_layer=6; nothing is compared" in capsys.readouterr().err


@pytest.mark.parametrize("factors", ["", "1", "1,1", "0,1", "-1,2", "fast,1", "nan,1", "1,2,3,4,5,6,7,8,9,10", "1,1e9"])
def test_wrong_factors_of_the_learning_rate(factors: str) -> None:
    argv = [*GPT2, "--vary=n_layer=6", f"--lr_factors={factors}"]
    with pytest.raises(ConfigError, match=r"lr_factors: found .*; nearest: --lr_factors=0\.5,1,2"):
        ablate.main([*argv, "--tune_lr"])
    with pytest.raises(ConfigError, match="without --tune_lr; nearest: --tune_lr"):
        ablate.main(argv)
