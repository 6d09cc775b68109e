"""Forks: a run continued from a checkpoint of another one with other keys, bit for bit up to the change."""

import json
import shutil
from pathlib import Path

import pytest
from run_helpers import hashes, losses, run, run_log

from gptperf import prepare
from gptperf.config import command_line
from gptperf.config.fork import fork_of
from gptperf.errors import CheckpointError, ConfigError, DataError
from gptperf.training import trainer

FLAGS = ("--keep_checkpoints=9", "--dropout=0.2", "--sample_tokens=0", "--lr_schedule=wsd", "--log_interval=1")


@pytest.fixture(scope="module")
def parents(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 20 iterations with each optimizer."""
    folder = tmp_path_factory.mktemp("parents")
    found = {}
    for optimizer in ("adamw", "muon"):
        found[optimizer] = folder / optimizer
        assert run(corpus, found[optimizer], *FLAGS, f"--optimizer={optimizer}") == 0
    return found


def fork(parent: Path, step: int, out: Path, *flags: str) -> int:
    """Runs a fork with nothing but the changed keys."""
    resolved = command_line.resolve([f"--init_from={parent}@{step}", f"--out_dir={out}", *flags])
    return trainer.train(resolved.config, resolved.origins, resolved.changes)


def last(out: Path) -> dict[str, str]:
    return hashes(max((out / "checkpoints").glob("step-*")))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fork_that_changes_nothing_is_a_bitwise_copy(
    optimizer: str, parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = parents[optimizer]
    assert fork(parent, 5, tmp_path) == 0
    assert losses(tmp_path) == losses(parent)[5:]
    assert last(tmp_path) == last(parent)
    info = run_log(tmp_path)["startup_info"]
    assert info["parent"]["step"] == 5
    assert info["parent"]["run"] == run_log(parent)["run_name"]
    assert Path(info["parent"]["path"]).parent.parent == parent
    assert "nothing is changed" in capsys.readouterr().out


def test_the_run_is_the_parents_up_to_the_change(parents: dict[str, Path], tmp_path: Path) -> None:
    """A decay that begins at iteration 12 changes no bit before it, and every bit after it."""
    parent = parents["adamw"]
    assert fork(parent, 10, tmp_path, "--wsd_decay_fraction=0.4") == 0
    ours, theirs = losses(tmp_path), losses(parent)[10:]
    rates = [[entry["lr"] for entry in run_log(out)["training_iterations"]] for out in (tmp_path, parent)]
    same = [a == b for a, b in zip(rates[0], rates[1][10:], strict=True)]
    first = same.index(False)  # this iteration computes its loss before it updates the weights
    assert 0 < first < 9
    assert ours[: first + 1] == theirs[: first + 1]
    assert all(a != b for a, b in zip(ours[first + 1 :], theirs[first + 1 :], strict=True))


def test_a_fork_is_a_run_of_its_own(parents: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """It leaves its parent as it is, resumes bit for bit, and can be forked again."""
    parent = parents["adamw"]
    before = sorted((path, path.stat().st_mtime_ns) for path in parent.rglob("*"))
    changed = ("--learning_rate=5e-3", "--max_iters=16", "--lr_decay_iters=16")
    assert fork(parent, 10, tmp_path / "whole", *changed) == 0
    assert fork(parent, 10, tmp_path / "part", *changed, "--max_iters=13") == 0
    assert run(corpus, tmp_path / "part", *FLAGS, *changed, "--init_from=resume") == 0
    assert fork(tmp_path / "whole", 15, tmp_path / "again") == 0
    assert last(tmp_path / "part") == last(tmp_path / "again") == last(tmp_path / "whole")
    assert sorted((path, path.stat().st_mtime_ns) for path in parent.rglob("*")) == before
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-00000016" / "state.json").read_text())["train_state"]
    whole = json.loads((parent / "checkpoints" / "step-00000020" / "state.json").read_text())["train_state"]
    assert state["starts"] == 1
    assert state["run_name"] != whole["run_name"]
    assert state["tokens"] / 16 == whole["tokens"] / 20
    assert state["timed_tokens"] < state["tokens"] * 6 / 16 + 1  # the time of the parent is not its own


def test_the_configuration_is_the_parents_below_files_and_flags(parents: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "over.toml"
    file.write_text("[optimizer]\nbeta1 = 0.5\nbeta2 = 0.5\n")
    found = command_line.resolve([str(file), f"--init_from={parents['muon']}@10", "--beta2=0.75"])
    config = found.config
    assert (config.model.n_layer, config.optimizer.optimizer, config.model.dropout) == (2, "muon", 0.2)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.5, 0.75)
    assert (config.train.out_dir, config.train.overwrite) == ("out", False)
    assert found.origins["n_layer"].endswith("step-00000010")
    assert found.origins["beta1"] == str(file)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_layer=3", "--qk_norm=True"], "n_layer: 2 -> 3; qk_norm: False -> True"),
        (["--batch_size=4"], "batch_size: 2 -> 4"),
        (["--block_size=16"], "block_size: 32 -> 16"),
    ],
)
def test_what_a_fork_cannot_change(flags: list[str], said: str, parents: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"a fork cannot change these keys of its parent \(saved -> now\)"
    ) as error:
        fork(parents["adamw"], 10, tmp_path / "out", *flags)
    assert all(part in str(error.value) for part in said.split("; "))
    assert "--init_from=RUN, without @STEP, takes the weights alone" in str(error.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_other_micro_batches_are_the_same_samples(parents: dict[str, Path], tmp_path: Path) -> None:
    assert fork(parents["adamw"], 15, tmp_path, "--batch_size=4", "--gradient_accumulation_steps=2", "--dropout=0") == 0


def test_other_data_is_refused(parents: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    other.mkdir()
    (tmp_path / "text.txt").write_text("other words " * 3000)
    prepare.main([str(tmp_path / "text.txt"), "--name=text", f"--data_dir={other}"])
    with pytest.raises(DataError, match="was trained on other data"):
        fork(parents["adamw"], 10, tmp_path / "out", f"--data_dir={other}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_precision_may_change(dtype: str, parents: dict[str, Path], tmp_path: Path) -> None:
    assert fork(parents["adamw"], 15, tmp_path, f"--dtype={dtype}") == 0
    (_, first), (_, theirs) = losses(tmp_path)[0], losses(parents["adamw"])[15]
    assert float.fromhex(first) == pytest.approx(float.fromhex(theirs), rel=1e-2)


@pytest.mark.parametrize(("parent", "flags"), [("adamw", "muon"), ("muon", "adamw"), ("muon", "muon --normuon=True")])
def test_the_optimizer_may_change(parent: str, flags: str, parents: dict[str, Path], tmp_path: Path) -> None:
    """The first loss comes from the parent's weights, and states that only the new optimizer has begin at zero."""
    assert fork(parents[parent], 15, tmp_path, *f"--optimizer={flags} --max_iters=18 --lr_decay_iters=20".split()) == 0
    ours, theirs = losses(tmp_path), losses(parents[parent])[15:18]
    assert ours[0] == theirs[0]
    assert ours[1:] != theirs[1:]
    assert all(float.fromhex(loss) < 6 for _, loss in ours)


def test_another_seed_is_other_data_from_the_fork_on(parents: dict[str, Path], tmp_path: Path) -> None:
    parent = parents["adamw"]
    for out, seed in ((tmp_path / "a", 1), (tmp_path / "b", 1), (tmp_path / "c", 2)):
        assert fork(parent, 15, out, f"--seed={seed}") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    others = {losses(out)[0] for out in (parent, tmp_path / "a", tmp_path / "c")}
    assert len(others) == 3


def test_a_step_that_is_not_there(parents: dict[str, Path], tmp_path: Path) -> None:
    parent = parents["adamw"]
    with pytest.raises(
        ConfigError, match=r"no checkpoint of step 11 in .*wanted one of the steps 5, 10, 15, 20; nearest: 10"
    ):
        command_line.resolve([f"--init_from={parent}@11"])
    with pytest.raises(ConfigError, match=r"found no checkpoint in .*wanted RUN@STEP with a checkpoint of RUN"):
        command_line.resolve([f"--init_from={tmp_path}@11"])
    with pytest.raises(ConfigError, match="leaves nothing to train; nearest max_iters: 21"):
        command_line.resolve([f"--init_from={parent}@20"])
    with pytest.raises(CheckpointError, match="found checkpoints of another run"):
        fork(parent, 10, parent)


def test_what_a_value_means(tmp_path: Path) -> None:
    (tmp_path / "run@5").mkdir()
    assert fork_of(str(tmp_path / "run@5")) is None  # a path that exists
    found = fork_of(f"{tmp_path / 'run@5'}@7")
    assert found is not None
    assert (found.checkpoints, found.step) == (tmp_path / "run@5", 7)
    for text in ("scratch", "resume", "out/run", "out/run@", "@5", "out/run@five", "out/run@-1", "out/run@5.0"):
        assert fork_of(text) is None, text


def test_a_damaged_parent_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(parents["adamw"], copy)
    state = copy / "checkpoints" / "step-00000010" / "state.json"
    state.write_text(state.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(CheckpointError, match=r"state.json"):
        fork(copy, 10, tmp_path / "out")
    state.write_text("{")
    with pytest.raises(ConfigError, match="wanted an intact checkpoint"):
        fork(copy, 10, tmp_path / "out")
