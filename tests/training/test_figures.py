"""The figures that a run logs, found in another way: by a clock that only steps move, and by PyTorch."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_helpers import run, run_argv, run_log
from task_helpers import TARGET, write_lines

from gptperf import api, flops
from gptperf.config import command_line
from gptperf.data.loader import Loader, validation_batches
from gptperf.data.ngram import trigram_loss
from gptperf.data.shards import TokenSource
from gptperf.distributed.process import Process
from gptperf.hardware import Peak
from gptperf.model import GPT
from gptperf.monitor.console import Console
from gptperf.training import start, trainer
from gptperf.training.preflight import throughput_of

TOKENS = 2 * 4 * 32
"""Tokens of an iteration of the small run."""


class Clock:
    """A clock that a step moves by `step_s`, and an evaluation by 100 s. The evaluations find given losses."""

    def __init__(self, patch: pytest.MonkeyPatch, losses: list[float]) -> None:
        self.now, self.step_s, self.left_s = 0.0, 7.0, list[float | None]()
        step, show = trainer.train_step, Console.iteration

        def slow_step(*args: Any, **keys: Any) -> Any:
            self.now += self.step_s
            return step(*args, **keys)

        def slow_evaluate(*args: Any) -> float:
            self.now += 100
            return losses.pop(0)

        def shown(console: Console, record: Any, left_s: float | None) -> None:
            self.left_s.append(left_s)
            show(console, record, left_s)

        class SlowLoader(Loader):
            def __next__(self) -> torch.Tensor:
                self.wait_s += 0.5
                return super().__next__()

        patch.setattr(start, "estimate", lambda *_: None)  # it measures this machine
        patch.setattr(time, "perf_counter", lambda: self.now)
        patch.setattr(trainer, "train_step", slow_step)
        patch.setattr(trainer, "evaluate", slow_evaluate)
        patch.setattr(trainer, "Loader", SlowLoader)
        patch.setattr(Console, "iteration", shown)


def test_times_and_losses_of_a_run_and_of_its_resume(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, [3.0, 2.0, 2.5, 2.4, 2.3])
    flags = ["--log_interval=2", "--eval_interval=2", "--save_interval=3"]
    run(corpus, tmp_path, *flags, "--max_iters=6")
    log = run_log(tmp_path)
    assert [entry["iter"] for entry in log["training_iterations"]] == [1, 2, 4, 6]
    for entry in log["training_iterations"]:
        assert entry["time_ms"] == 7e3
        assert entry["data_wait_ms"] == 4 * 500
        assert entry["tokens"] == entry["iter"] * TOKENS
        assert entry["mfu"].get("tokens_per_sec") == (None if entry["iter"] == 1 else pytest.approx(TOKENS / 7))
    assert clock.left_s[0] is None
    assert clock.left_s[1:] == pytest.approx([4 * 7, 2 * 7, 0], abs=0.1)  # evaluations add their own, real time
    assert [entry["time_ms"] for entry in log["eval_steps"]] == [100e3] * 3
    assert [entry["best_val_loss"] for entry in log["eval_steps"]] == [3.0, 2.0, 2.0]
    assert [(entry["iter"], entry["val_loss"]) for entry in log["checkpoints"]] == [(3, None), (6, 2.5)]
    summary = log["summary"]
    assert (summary["best_val_loss"], summary["best_iter"], summary["val_loss"]) == (2.0, 4, 2.5)
    assert summary["tokens_per_sec"] == pytest.approx(TOKENS / 7)

    clock.step_s = 3.0
    run(corpus, tmp_path, *flags, "--max_iters=10", "--init_from=resume")
    log = run_log(tmp_path)
    assert [entry["iter"] for entry in log["training_iterations"]][4:] == [7, 8, 10]
    assert all(entry["time_ms"] == 3e3 for entry in log["training_iterations"][4:])
    assert log["training_iterations"][-1]["tokens"] == 10 * TOKENS
    summary = log["summary"]
    assert (summary["best_val_loss"], summary["best_iter"], summary["val_loss"]) == (2.0, 4, 2.3)
    timed_s = 5 * 7 + 3 * 3  # all iterations but the first of each process
    assert summary["tokens_per_sec"] == pytest.approx(8 * TOKENS / timed_s)


def test_tasks_take_no_time_of_an_iteration(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [3.0, 2.0, 2.5])

    def slow_tasks(*args: Any) -> dict[str, dict[str, float]]:
        clock.now += 1000
        return {"own": {"items": 3, "acc": 0.5, "centred": 0.25}}

    monkeypatch.setattr(trainer, "score_tasks", slow_tasks)
    tasks = write_lines(tmp_path / "own.jsonl", [TARGET])
    flags = ["--log_interval=1", "--eval_interval=2", "--eval_tasks_interval=4", f"--eval_tasks={tasks}"]
    run(corpus, tmp_path, *flags, "--max_iters=6")
    log = run_log(tmp_path)
    assert [entry["time_ms"] for entry in log["training_iterations"]] == [7e3] * 6
    found = [(entry["time_ms"], entry.get("tasks_ms")) for entry in log["eval_steps"]]
    assert found == [(100e3, None), (1100e3, 1000e3), (1100e3, 1000e3)]
    assert log["eval_steps"][-1]["core"] == 0.25
    assert log["summary"]["tokens_per_sec"] == pytest.approx(TOKENS / 7)


def test_losses_are_those_of_model_and_data(corpus: Path, tmp_path: Path) -> None:
    """The first loss, the last validation loss, the baseline and the sample, from the model and the data alone."""
    flags = ["--max_iters=2", "--dropout=0.0", "--seed=7", "--eval_iters=3", "--trigram_baseline=True"]
    run(corpus, tmp_path, *flags)
    log = run_log(tmp_path)
    config = command_line.resolve(run_argv(corpus, tmp_path, *flags)).config
    train, val = (TokenSource.open(corpus / "data" / "text", split) for split in ("train", "val"))

    def loss_of(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
        tokens, targets = torch.cat(batches, dim=1)
        with torch.no_grad():
            return F.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten()).item()

    torch.manual_seed(7)
    with Loader(train, block_size=32, batch_size=2, micro_batches=4, seed=7) as loader:
        first = loss_of(GPT(config.model), [next(loader) for _ in range(4)])
    assert log["training_iterations"][0]["loss"] == pytest.approx(first, rel=1e-5)
    loaded = api.load_model(tmp_path, device="cpu")
    last = loss_of(loaded.model, list(validation_batches(val, block_size=32, batch_size=2, max_batches=3)))
    assert log["eval_steps"][-1]["val_loss"] == pytest.approx(last, rel=1e-5)
    assert log["summary"]["val_loss"] == log["eval_steps"][-1]["val_loss"]
    assert log["summary"]["trigram_loss"] == pytest.approx(trigram_loss(train, val))
    assert trigram_loss(val, val) != pytest.approx(trigram_loss(train, val), rel=1e-2)


def test_the_sample_has_no_dropout(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=1", "--dropout=0.9", "--sample_tokens=40")
    (sample,) = api.generate(api.load_model(tmp_path, device="cpu"), "", tokens=40, seed=1337)
    assert run_log(tmp_path)["summary"]["sample"] == sample


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_speed_of_a_job_is_shared_by_its_gpus(recompute: str) -> None:
    config = command_line.resolve(["tiny", f"--recompute={recompute}", "--gradient_accumulation_steps=8"]).config
    peak = Peak(1e12, "dense", "")
    record = throughput_of(config, Process(0, 4, torch.device("cpu")), peak, print).record(500.0)
    tokens_s = config.tokens_per_iter / 0.5
    per_token = float(flops.flops_per_token(config.model).training_per_token)
    assert record["tokens_per_sec"] == tokens_s
    assert record["mfu_percent"] == pytest.approx(100 * tokens_s * per_token / 4 / 1e12)
    again = float(flops.flops_per_token(config.model, "hfu", recompute="full").training_per_token)
    wanted = 100 * tokens_s * again / 4 / 1e12 if recompute == "full" else None
    assert record.get("hfu_percent") == (wanted if wanted is None else pytest.approx(wanted))


@dataclasses.dataclass(eq=False)
class BesideOneThatIsAsked(Process):
    """A rank whose peer gets a request to stop before the exchange of number `heard_at`."""

    heard_at: int = 0
    asked: list[int] = dataclasses.field(default_factory=list)

    def highest_of(self, *values: int) -> list[int]:
        self.asked.append(values[0])
        return [2 if len(self.asked) >= self.heard_at else values[0], *values[1:]]


# The ranks agree before step 1, after each step, and after the evaluation that follows every second one.
@pytest.mark.parametrize(("heard_at", "saved"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_a_request_that_another_rank_hears_stops_this_one_too(
    heard_at: int, saved: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = BesideOneThatIsAsked(0, 1, torch.device("cpu"), heard_at=heard_at)
    monkeypatch.setattr(trainer, "start_process", lambda *_: process)
    assert run(corpus, tmp_path, "--eval_interval=2", "--eval_iters=1", "--save_interval=100") != 0
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{saved:08d}"]
    assert run_log(tmp_path)["summary"]["stopped"] == "asked to"
