"""Requests to stop: the answer at once, the iteration or evaluation that is dropped, and the resume after it."""

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import ROOT, hashes, losses, run, run_command, run_log

from gptperf import registry
from gptperf.distributed.process import Process
from gptperf.distributed.progress import Progress
from gptperf.errors import PREEMPTED
from gptperf.model import RMSNorm
from gptperf.training import stopping, trainer
from gptperf.training.signals import StopRequest
from gptperf.training.stopping import StopPoints, answer

STOP = StopRequest.STOP


def test_the_answer_does_not_wait_for_the_main_thread() -> None:
    answered: list[tuple[int, float]] = []
    with StopRequest(lambda request: answered.append((request, time.monotonic()))).listening() as stop:
        asked = time.monotonic()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while time.monotonic() - asked < 0.6:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # compiled code, in which no handler of Python runs
        busy_until = time.monotonic()
        assert stop.take() == STOP
    ((request, when),) = answered
    assert request == STOP
    assert when < busy_until - 0.1


def test_a_forked_childs_signals_are_its_own() -> None:
    answered: list[int] = []
    with StopRequest(answered.append).listening() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        while not answered:
            time.sleep(0.01)
    assert (answered, stop.requested) == ([StopRequest.SAVE], False)


def _at(progress: Progress, kind: str, part: int, parts: int, part_s: float) -> Progress:
    """Moves to part `part` of a task whose parts take `part_s` seconds each."""
    progress._begin(kind, parts)
    progress.part, progress._part_s = part, part_s if part else 0.0
    progress._since -= part * part_s
    return progress


@pytest.mark.parametrize(
    ("iterations", "iteration_s", "kind", "part", "parts", "part_s", "text"),
    [
        (1, None, "start", 0, 1, 0.0, "stopping before the first iteration"),
        (1, None, "iteration", 0, 1, 0.0, "stopping after this iteration, the first one, whose time is not known"),
        (1, None, "iteration", 0, 4, 0.0, "stopping at the next micro-batch, iteration 7 is dropped"),
        (5, 12.0, "iteration", 0, 1, 0.0, "stopping after this iteration (about 12 s)"),
        (5, 1.6, "iteration", 1, 4, 0.4, "stopping after this iteration (about 1 s)"),
        (5, 0.1, "iteration", 1, 4, 0.02, "stopping after this iteration (less than 1 s)"),
        (5, 80.0, "iteration", 1, 4, 20.0, "stopping at the next micro-batch (about 20 s), iteration 7 is dropped"),
        (5, 80.0, "iteration", 3, 4, 20.0, "stopping after this iteration (about 20 s)"),
        (5, 80.0, "evaluation", 1, 9, 2.0, "stopping at the next batch of the evaluation (about 2 s)"),
        (5, 80.0, "save", 0, 1, 0.0, "stopping after this save"),
        (5, 80.0, "end", 0, 1, 0.0, "the run is finished and saved, stopping without what is left"),
    ],
)
def test_the_answer_says_when_the_run_stops(
    iterations: int, iteration_s: float | None, kind: str, part: int, parts: int, part_s: float, text: str
) -> None:
    progress = _at(Progress(), kind, part, parts, part_s)
    progress.iterations, progress.number, progress.iteration_s = iterations, 7, iteration_s
    progress.may_drop = parts > 1
    assert answer(STOP, progress, 0.0) == f"{text}; press again to stop now without saving"
    assert answer(STOP, progress, 5.0) == f"{text}; press again after 5 s to stop now without saving"


class _Volatile(RMSNorm):
    """A norm with a buffer that follows its inputs, and with draws that only the run seeds."""

    ema: torch.Tensor
    calls = 0
    stop_at = 0

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("ema", torch.ones(()))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        _Volatile.calls += 1
        if _Volatile.calls == _Volatile.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        y, residual = super().forward(x, residual)
        if self.training:
            self.ema.mul_(0.9).add_(0.1 * y.detach().abs().mean())
            y = y + 1e-2 * (random.random() + float(np.random.rand()))
        return y / self.ema, residual


@pytest.fixture
def run_stopped_at(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Callable[..., int]:
    """Returns a function that trains, and asks the run to stop in call N of a norm, of which a pass has 5."""
    monkeypatch.setattr(stopping, "PATIENCE_S", -1.0)  # every iteration and evaluation counts as long
    monkeypatch.setattr(registry, "_components", dict(registry._components))
    registry.register("normalization", "volatile", _Volatile)

    def stopped(out: Path, call: int, *flags: str) -> int:
        _Volatile.calls, _Volatile.stop_at = 0, call
        keys = ["--normalization=volatile", "--dropout=0.1", "--max_iters=6", "--eval_interval=4", "--save_interval=4"]
        return run(corpus, out, *keys, *flags)

    return stopped


ITERATION = 4 * 5  # calls: 4 micro-batches of 5 norms


def test_a_dropped_iteration_changes_nothing(run_stopped_at: Callable[..., int], tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_stopped_at(straight, 0) == 0
    assert run_stopped_at(broken, 2 * ITERATION + 7) == PREEMPTED  # in the second micro-batch of iteration 3
    assert _Volatile.calls == 2 * ITERATION + 10  # no third micro-batch
    assert [path.name for path in (broken / "checkpoints").glob("step-*")] == ["step-00000002"]
    summary = run_log(broken)["summary"]
    mean = sum(entry["loss"] for entry in run_log(broken)["training_iterations"]) / 2
    assert (summary["iterations"], summary["train_loss_iterations"]) == (2, 2)
    assert summary["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert run_stopped_at(broken, 0, "--init_from=resume") == 0
    last = "checkpoints/step-00000006"
    assert hashes(straight / last) == hashes(broken / last)
    assert losses(straight) == losses(broken)


def test_a_dropped_evaluation_is_made_up_for(run_stopped_at: Callable[..., int], tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_stopped_at(straight, 0)
    assert run_stopped_at(broken, 4 * ITERATION + 3) == PREEMPTED  # in the first batch of the first evaluation
    assert _Volatile.calls == 4 * ITERATION + 5
    assert run_log(broken)["eval_steps"] == []
    assert run_stopped_at(broken, 0, "--init_from=resume") == 0
    assert run_stopped_at(broken, 0, "--init_from=resume", "--max_iters=6") == 0
    for key in ("iter", "val_loss", "best_val_loss"):
        assert [e[key] for e in run_log(broken)["eval_steps"]] == [e[key] for e in run_log(straight)["eval_steps"]]
    assert hashes(straight / "checkpoints/step-00000006") == hashes(broken / "checkpoints/step-00000006")


def test_the_last_evaluation_is_made_up_for(run_stopped_at: Callable[..., int], tmp_path: Path) -> None:
    assert run_stopped_at(tmp_path, 2 * ITERATION + 3, "--max_iters=2") == PREEMPTED
    assert run_stopped_at(tmp_path, 0, "--max_iters=2", "--init_from=resume") == 0
    log = run_log(tmp_path)
    assert [entry["iter"] for entry in log["eval_steps"]] == [2]
    assert log["summary"]["val_loss"] == log["eval_steps"][0]["val_loss"]


def test_before_the_first_iteration_there_is_nothing_to_save(
    run_stopped_at: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stopped_at(tmp_path, 2) == PREEMPTED
    assert "no iteration is finished, so there is nothing to save; start the run again" in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoints/step-*"))
    assert run_stopped_at(tmp_path, 0, "--max_iters=1") == 0


def test_a_short_iteration_is_finished(
    run_stopped_at: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "PATIENCE_S", 1e6)
    assert run_stopped_at(tmp_path, 2 * ITERATION + 7) == PREEMPTED
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_request_during_the_sample_leaves_it_out(
    run_stopped_at: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = trainer.sample_text

    def asked(*args: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args)

    monkeypatch.setattr(trainer, "sample_text", asked)
    assert run_stopped_at(tmp_path, 0, "--max_iters=1") == 0
    assert "sample" not in run_log(tmp_path)["summary"]


@dataclass(eq=False)
class _Beside(Process):
    """One of two ranks; the other one has these values."""

    other: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def highest_of(self, *values: int) -> list[int]:
        self.asked.append(values)
        return [max(pair) for pair in zip(values, self.other.pop(0), strict=True)]


def test_ranks_agree_inside_long_iterations_only() -> None:
    process, stop = _Beside(0, 2, torch.device("cpu")), StopRequest()
    points = StopPoints(stop, process)

    def iterate(other_ms: int, drops: tuple[int, int] = (0, 0)) -> list[bool]:
        process.asked.clear()
        process.progress.start_iteration(1, 8)
        decisions = []
        for _ in range(7 if points.may_drop else 0):
            process.progress.end_part()
            process.other[:] = [drops]
            decisions.append(points.drops())
        process.other[:] = [(StopRequest.NOTHING, other_ms)]
        assert points.after_iteration(8) == StopRequest.NOTHING
        return decisions

    iterate(100)
    assert len(process.asked) == 8  # after each micro-batch of the first iteration, and after the iteration
    iterate(2900)
    assert len(process.asked) == 1  # the last iteration was short on both ranks
    iterate(4000)
    assert len(process.asked) == 1
    iterate(4000)
    assert len(process.asked) == 2  # the other rank took 4 s: once in the middle, after 2 s
    assert iterate(4000, (1, 5000))[3]  # the other rank is asked to stop, and 5 s are left
    assert not any(iterate(4000, (1, 100)))  # 0.1 s are left


JOB = """
import os, signal
from gptperf.model import RMSNorm
from gptperf.registry import register
from gptperf.training import stopping
stopping.PATIENCE_S, stopping._AGREE_S = -1.0, 0.0
class Stopper(RMSNorm):
    calls = 0
    def forward(self, x, residual=None):
        Stopper.calls += 1
        if Stopper.calls == 2 * 20 + 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x, residual)
register("normalization", "stopper", Stopper)
"""


@pytest.mark.slow
def test_all_ranks_drop_the_same_iteration(corpus: Path, tmp_path: Path) -> None:
    """Under FSDP reductions of the dropped micro-batches are in flight."""
    (tmp_path / "stopper.py").write_text(JOB)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    flags = ["--plugins=stopper", "--normalization=stopper", "--gradient_accumulation_steps=8", "--max_iters=9"]
    command = run_command(corpus, tmp_path / "out", *flags, "--use_fsdp=True", launcher=launcher)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert "asked to stop: iteration 3 is dropped, iteration 2 is saved" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "out/checkpoints").glob("step-*")] == ["step-00000002"]
    assert run_log(tmp_path / "out")["summary"]["iterations"] == 2
