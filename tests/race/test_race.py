"""Races: trainings and their order, tuning, continuing, verdicts and reports, with a trainer that does not train."""

import json
import shutil
from pathlib import Path

import pytest
from race_helpers import FakeTrainer, power_law

from gptperf.config import Config
from gptperf.errors import PREEMPTED, ConfigError
from gptperf.experiment import runner
from gptperf.race import __main__ as race
from gptperf.race.arms import arms_of, seed_chain

ARMS = ["gpt2_124m", "--max_iters=2000", "--warmup_iters=100", "--vary", "n_layer=6"]


def _loss(config: Config) -> float:
    """The change, 6 layers, needs 0.8 times the tokens, and has a best rate twice as high."""
    small = config.model.n_layer == 6
    return power_law(config, 1 / 0.8 if small else 1, 1.2e-3 if small else 6e-4)


def _argv(out: Path, *flags: str) -> list[str]:
    return [*ARMS, f"--out={out}", *flags]


def _record(out: Path) -> dict:
    return json.loads((out / "race.json").read_text())


def test_a_race_finds_the_ratio_that_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = FakeTrainer(monkeypatch, _loss)
    assert race.main(_argv(tmp_path, "--price=3", f"--html={tmp_path / 'page.html'}")) == 0
    found = _record(tmp_path)
    ratio = found["token_ratio"]
    assert ratio["low"] < ratio["ratio"] < ratio["high"] < 1
    assert ratio["ratio"] == pytest.approx(0.8, rel=0.02)
    assert found["speed"]["ratio"]["ratio"] == pytest.approx(1.25)
    assert found["time_ratio"]["ratio"] == pytest.approx(1.25 * ratio["ratio"])
    assert found["time_ratio"]["high"] / found["time_ratio"]["ratio"] >= ratio["high"] / ratio["ratio"]
    for row in found["at_loss"]:
        for (cost, tokens), seconds in zip(zip(row["costs"], row["tokens"], strict=True), (1, 1.25), strict=True):
            assert cost["seconds"] == pytest.approx(tokens * seconds * 1e-6, rel=0.05)
            assert cost["dollars"] == pytest.approx(3 * cost["seconds"] / 3600)
            assert cost["joules"] == pytest.approx(5e-4 * tokens)
    # the same budget for both arms: 5 rates at a quarter, 3 over the whole length, then trunk and 3 cooldowns a seed
    for layers in (12, 6):
        runs = [config for config, _ in trainer.ran if config.model.n_layer == layers]
        tuning = [config for config in runs if config.train.seed > 10**6]
        assert [config.train.max_iters for config in tuning] == [500] * 5 + [2000] * 3
        best = 1.2e-3 if layers == 6 else 6e-4
        seeds = [config for config in runs if config.train.seed < 10**6]
        assert {config.optimizer.learning_rate for config in seeds} == {best}
        assert [config.train.max_iters for config in seeds] == [1600, 500, 1000, 2000] * 5
        for config in seeds[::4]:
            assert config.optimizer.lr_schedule == "constant"
        for config in seeds[1::4]:
            assert (config.optimizer.lr_schedule, config.optimizer.wsd_decay_fraction) == ("wsd", 0.2)
    starts = [start.rpartition("@")[2] for config, start in trainer.ran if "@" in start]
    assert starts == ["400", "800", "1600"] * 10
    assert not list(tmp_path.rglob("step-*"))  # no training needs a checkpoint any more
    printed = capsys.readouterr().out
    assert "n_layer=6 needs 0." in printed
    rows = [line.split() for line in printed.splitlines() if line.endswith("  best")]
    assert [row[:3] for row in rows] == [
        ["baseline", "1/4", "0.0006"],
        ["baseline", "1", "0.0006"],
        ["n_layer=6", "1/4", "0.0012"],
        ["n_layer=6", "1", "0.0012"],
    ]
    page = (tmp_path / "page.html").read_text()
    assert "time ratio" in page
    assert page.count("<figure>") > 4
    assert "https:" not in page
    plan = json.loads((tmp_path / "plan.json").read_text())["trainings"]
    assert len(plan) == len(trainer.ran) == 2 * (5 + 3 + 5 * 4)
    assert {row["state"] for row in plan} == {"finished"}


def test_a_race_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped before any training, the race ends with the same result, and no training is done twice."""
    trainer = FakeTrainer(monkeypatch, _loss)
    assert race.main(_argv(tmp_path / "whole")) == 0
    whole = _record(tmp_path / "whole")
    total, done, codes = len(trainer.ran), 0, []
    for stop in (3, 14, 19):
        trainer.ran.clear()
        trainer.stop_at = stop - done
        codes.append(race.main(_argv(tmp_path / "parts")))
        done += len(trainer.ran) - 1
        assert _record(tmp_path / "parts")["verdict"].startswith(("No verdict yet", "To equal loss"))
    assert codes == [PREEMPTED] * 3
    assert "run the same command again" in capsys.readouterr().out
    trainer.stop_at = None
    trainer.ran.clear()
    assert race.main(_argv(tmp_path / "parts")) == 0
    assert done + len(trainer.ran) == total
    parts = _record(tmp_path / "parts")
    assert (parts["token_ratio"], parts["arms"]) == (whole["token_ratio"], whole["arms"])
    trainer.ran.clear()
    assert race.main(_argv(tmp_path / "parts")) == 0
    assert not trainer.ran


def test_logs_alone_carry_a_race_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk whose checkpoints were not copied is trained again only if a cooldown needs it."""
    trainer = FakeTrainer(monkeypatch, _loss)
    trainer.stop_at = 16 + 4 + 3  # in the second cooldown of the second arm's first seed
    assert race.main(_argv(tmp_path)) == PREEMPTED
    for folder in tmp_path.rglob("checkpoints"):
        shutil.rmtree(folder)
    trainer.stop_at = None
    trainer.ran.clear()
    assert race.main(_argv(tmp_path)) == 0
    again = [(Path(config.train.out_dir).relative_to(tmp_path), start) for config, start in trainer.ran[:3]]
    seed = tmp_path / "n_layer=6/seed1337"
    assert again == [
        (Path("n_layer=6/seed1337/trunk"), "auto"),
        (Path("n_layer=6/seed1337/cooldown1000"), f"{seed / 'trunk'}@800"),
        (Path("n_layer=6/seed1337/cooldown2000"), f"{seed / 'trunk'}@1600"),
    ]


def test_a_trunk_that_has_passed_a_lost_checkpoint_starts_again(tmp_path: Path) -> None:
    (first, _) = arms_of(ARMS[:3], [ARMS[4]], tmp_path)
    (_, trunk), *_ = seed_chain(first, 1.0, 7)
    assert trunk.keeps == (400, 800, 1600)
    assert trunk.command()[-1] == "--init_from=auto"
    for step in (400, 600):  # the second save comes from a stop
        trunk.checkpoint(step).mkdir(parents=True)
        (trunk.checkpoint(step) / "MANIFEST.json").touch()
    assert trunk.command()[-1] == "--init_from=auto"
    shutil.rmtree(trunk.checkpoint(400))
    assert trunk.command()[-2:] == ["--overwrite=True", "--init_from=scratch"]


@pytest.mark.parametrize("edge", [0.2, 5.0])
def test_a_best_rate_at_the_edge_voids_the_verdict(
    edge: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = FakeTrainer(monkeypatch, lambda config: power_law(config, 1, 6e-4 * edge))
    assert race.main(_argv(tmp_path)) == 1
    assert len(trainer.ran) == 10  # nothing is spent on a race without a verdict
    printed = capsys.readouterr().out
    rate = "0.00015" if edge < 1 else "0.0024"
    assert f"{rate}, is at the edge of those tried" in printed
    assert f"Set learning_rate = {rate}" in printed
    assert _record(tmp_path)["token_ratio"] is None
    assert len(_record(tmp_path)["problems"]) == 2


def test_a_best_rate_that_moves_to_the_edge_over_the_whole_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(config: Config) -> float:
        return power_law(config, 1, 6e-4 if config.train.max_iters == 500 else 1.6e-3)

    trainer = FakeTrainer(monkeypatch, loss)
    assert race.main(_argv(tmp_path)) == 1
    assert len(trainer.ran) == 16
    assert "0.0012, is at the edge of those tried" in _record(tmp_path)["verdict"]


def test_a_rate_that_diverges_is_worse_than_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTrainer(monkeypatch, lambda config: None if config.optimizer.learning_rate > 1.3e-3 else _loss(config))
    assert race.main(_argv(tmp_path)) == 0
    quarter = _record(tmp_path)["arms"][0]["quarter"]
    assert [row["val_loss"] is None for row in quarter] == [False, False, False, False, True]


def test_few_seeds_and_no_common_loss_give_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTrainer(monkeypatch, _loss)
    assert race.main(_argv(tmp_path / "few", "--seeds=3")) == 0
    found = _record(tmp_path / "few")
    assert found["token_ratio"]["low"] is None
    assert "no verdict: a bootstrap over 3 seeds has no 95% interval, wanted 5 or more" in found["verdict"]
    FakeTrainer(monkeypatch, lambda config: power_law(config, 1 if config.model.n_layer == 6 else 0.1, 6e-4))
    assert race.main(_argv(tmp_path / "far", "--seeds=1")) == 0
    found = _record(tmp_path / "far")
    assert found["token_ratio"] is None
    assert "no loss in common, and nothing is extrapolated. n_layer=6 is below" in found["verdict"]


def test_a_run_that_fails_ends_its_chain_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(config: Config) -> float | None:
        bad = config.train.seed == 1338 and config.train.max_iters == 1600 and config.model.n_layer == 6
        return None if bad else _loss(config)

    FakeTrainer(monkeypatch, loss)
    assert race.main(_argv(tmp_path)) == 1
    found = _record(tmp_path)
    assert list(found["arms"][0]["losses"]) == ["1337", "1339", "1340", "1341"]  # pairs of seeds alone
    assert list(found["failed"].values()) == ["exit code 5"]


def test_every_mistake_of_a_race_is_told_before_it_begins(tmp_path: Path) -> None:
    cases = {
        ("gpt2_124m",): "found 1 configuration and 0 changes",
        ("gpt2_124m", "llama_124m", "--vary=n_layer=6"): "found 2 configurations and 1 change",
        ("gpt2_124m", "--vary=n_layer=6", "--max_iters=2001", "--warmup_iters=9"): "a multiple of 20; nearest: 2000",
        ("gpt2_124m", "--vary=n_layer=6", "--max_iters=200", "--warmup_iters=50"): "a tenth of its 200 iterations",
        ("gpt2_124m", "--vary=n_layer=12", "--max_iters=200", "--warmup_iters=9"): "the same configuration as baseline",
        ("gpt2_124m", "--vary=n_layr=6"): "nearest: n_layer",
        ("gpt2_124m", "--vary=n_layer=6", "--lr_schedule=cosine"): "lr_schedule is set by the race",
        ("gpt2_124m", "--vary=eval_iters=3"): "wanted the same in both",
        ("gpt2_124m", "--vary=dataset=x"): "wanted the same in both",
        ("gpt2_124m", "--vary=n_layer=6", "--lr_factors=1,2"): "wanted 3 or more",
        ("gpt2_124m", "--vary=n_layer=6", "--lr_factors=a"): "nearest: --lr_factors=0.25,0.5,1,2,4",
    }
    for words, message in cases.items():
        with pytest.raises(ConfigError) as error:
            race.main([*words, f"--out={tmp_path}"])
        assert message in str(error.value), words
    assert not list(tmp_path.iterdir())


def test_an_arm_with_larger_batches_gets_as_many_tokens(tmp_path: Path) -> None:
    first, second = arms_of(
        ["gpt2_124m", "--max_iters=2000", "--warmup_iters=100"], ["gradient_accumulation_steps=80"], tmp_path
    )
    assert second.length == 1000
    assert second.config.optimizer.warmup_iters == 50
    assert first.tokens == second.tokens


def test_the_time_limit_asks_to_stop() -> None:
    with runner.Runner().listening(minutes=1e-4) as started:
        code = started.run(["sleep", "60"])
    assert code < 0
    assert started.asked()
