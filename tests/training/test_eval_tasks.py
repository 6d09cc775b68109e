"""Tasks in the evaluations of whole runs: when, with which scores, under which strategy, and what they leave alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_helpers import on_two_ranks
from run_helpers import hashes, losses, run, run_log
from task_helpers import ASKED, CHOICES, write_lines

from gptperf.config import Config, TrainConfig
from gptperf.errors import DataError
from gptperf.evaluate.__main__ import main as evaluate
from gptperf.prepare import main as prepare_main
from gptperf.training import trainer
from gptperf.training.estimate import Estimate, evaluations


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Task files with commas, of items of several lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    names = ("hellaswag", "arc", "winogrande", "lambada", "choices")
    return ",".join(str(write_lines(folder / f"{name}.jsonl", [ASKED[name][0]] * 3)) for name in names)


def scored(log: dict[str, Any]) -> dict[int, Any]:
    return {entry["iter"]: entry["tasks"] for entry in log["eval_steps"] if "tasks" in entry}


@pytest.mark.slow
def test_tasks_change_no_bit_of_a_run(
    corpus: Path, files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dropout=0.1", "--log_interval=1", "--save_interval=10"]
    run(corpus, tmp_path / "without", *flags)
    run(corpus, tmp_path / "with", *flags, f"--eval_tasks={files}", "--eval_tasks_interval=4")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for step in (10, 20):
        left, right = (hashes(tmp_path / name / "checkpoints" / f"step-{step:08d}") for name in ("with", "without"))
        assert left["model.safetensors"] == right["model.safetensors"]
        assert left["optimizer.safetensors"] == right["optimizer.safetensors"]
        assert left["rng.safetensors"] == right["rng.safetensors"]
    before, after = (run_log(tmp_path / name) for name in ("without", "with"))
    kept = {entry["iter"]: entry["val_loss"] for entry in before["eval_steps"]}
    found = {entry["iter"]: entry["val_loss"] for entry in after["eval_steps"]}
    assert {step: found[step] for step in kept} == kept
    assert sorted(scored(after)) == [4, 8, 12, 16, 20]
    assert sorted(found) == [4, 8, 10, 12, 16, 20]

    capsys.readouterr()
    assert evaluate([str(tmp_path / "with"), f"--tasks={files}", "--json", "--device=cpu"]) == 0
    said, last = json.loads(capsys.readouterr().out), after["eval_steps"][-1]
    assert (said["tasks"], said["core"], said["core_stderr"]) == (last["tasks"], last["core"], last["core_stderr"])
    assert 0 < last["tasks_ms"] < last["time_ms"]


def test_a_run_says_its_scores(corpus: Path, files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(corpus, tmp_path, "--max_iters=2", "--eval_interval=2", "--console=plain", f"--eval_tasks={files}")
    shown = capsys.readouterr().out
    (scores,) = scored(run_log(tmp_path)).values()
    for name, one in scores.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {name}:")]
        assert f"acc {one['acc']:.4f} +- {one['acc_stderr']:.4f}" in line
    assert "\n  core:  " in shown
    assert "an evaluation, " in shown
    assert " its tasks, and " in shown


STRATEGIES = {"ddp": [], "zero1": ["--use_zero1=True"], "fsdp": ["--use_fsdp=True", "--fsdp_min_num_params=0"]}


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one_under_every_strategy(corpus: Path, files: str, tmp_path: Path) -> None:
    """A rank has fewer batches than the other one, and both go on to train."""
    flags = ["--max_iters=4", "--eval_interval=2", "--batch_size=1", "--sample_tokens=0", f"--eval_tasks={files}"]
    run(corpus, tmp_path / "one", *flags)
    wanted = run_log(tmp_path / "one")
    for name, more in STRATEGIES.items():
        on_two_ranks(lambda name=name, more=more: run(corpus, tmp_path / name, *flags, *more), tmp_path)  # type: ignore[misc]
        found = run_log(tmp_path / name)
        for left, right in zip(found["training_iterations"], wanted["training_iterations"], strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert list(scored(found)) == [2, 4]
        for step, tasks in scored(wanted).items():
            for task, scores in tasks.items():
                assert scored(found)[step][task] == pytest.approx(scores, rel=1e-4), (name, step, task)


def test_what_cannot_be_scored_is_refused_before_training(corpus: Path, files: str, tmp_path: Path) -> None:
    long = write_lines(tmp_path / "long.jsonl", [CHOICES | {"choices": ["4", "x" * 40]}])
    for names, wrong in (
        (f"{files},nope.jsonl", r"nope\.jsonl: cannot be read: No such file"),
        (
            str(long),
            r"long\.jsonl:1: found a continuation of 41 tokens .* at most block_size = 32",
        ),
    ):
        with pytest.raises(DataError, match=wrong):
            run(corpus, tmp_path / "out", f"--eval_tasks={names}")
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 65, 3000).astype("<u2").tofile(tmp_path / f"{split}.bin")
    prepare_main([f"bin:{tmp_path}", f"--data_dir={tmp_path / 'data'}", "--name=ids", "--tokenizer=ids:65"])
    flags = ["--dataset=ids", f"--data_dir={tmp_path / 'data'}", "--sample_tokens=0"]
    with pytest.raises(DataError, match="these ids have no vocabulary"):
        run(corpus, tmp_path / "out", f"--eval_tasks={files}", *flags)
    assert not list((tmp_path / "out").rglob("run_*"))


def test_an_evaluation_that_is_dropped_has_no_scores(
    corpus: Path, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run that resumes makes up for it, with the scores of a run that was never stopped."""
    flags = ["--max_iters=2", "--eval_interval=2", "--sample_tokens=0", f"--eval_tasks={files}"]
    run(corpus, tmp_path / "whole", *flags)
    score = trainer.score_tasks

    def dropped(engine: Any, tasks: Any, drops: Any) -> Any:
        return score(engine, tasks, lambda: True)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_tasks", dropped)
        run(corpus, tmp_path / "cut", *flags)
    assert run_log(tmp_path / "cut")["eval_steps"] == []
    run(corpus, tmp_path / "cut", *flags, "--init_from=resume")
    assert scored(run_log(tmp_path / "cut")) == scored(run_log(tmp_path / "whole"))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(0, 45), st.booleans())
def test_the_estimate_counts_every_evaluation(every: int, tasks: int, last: int, done: int, given_files: bool) -> None:
    train = TrainConfig(
        max_iters=last, eval_interval=every, eval_tasks="a" if given_files else "", eval_tasks_interval=tasks
    )
    config = Config(train=train)
    ahead = range(done + 1, last + 1)
    scored_at = [i for i in ahead if given_files and (i % tasks == 0 or i == last)]
    at = [i for i in ahead if i % every == 0 or i == last or i in scored_at]
    assert evaluations(config, done) == len(at)
    found = Estimate(1.0, 10.0, 5.0, 100.0 if given_files else 0.0)
    assert found.total_s(config, done) == len(ahead) + 10 * len(at) + 5 + 100 * len(scored_at)
