"""Whole runs under faults. Each test fails if the line of code that protects against its fault is removed."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_helpers import reseal
from run_helpers import ROOT, run, run_command, run_log

from gptperf import checkpoint, files
from gptperf.checkpoint import write
from gptperf.config import command_line
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.distributed.process import start_process
from gptperf.errors import (
    PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    DiskError,
    OutOfMemoryError,
)
from gptperf.monitor.run_lock import RunLock
from gptperf.training import evaluation, trainer
from gptperf.training.signals import StopRequest


def saved_state(out: Path, step: int) -> Path:
    """Returns the file with a checkpoint's state."""
    return out / "checkpoints" / f"step-{step:08d}" / "state.json"


def change_state(out: Path, step: int, *keys: str, value: Any) -> None:
    """Changes one value, and seals the checkpoint again."""
    path = saved_state(out, step)
    state = json.loads(path.read_text())
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(state))
    reseal(path.parent)


@contextlib.contextmanager
def killed(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kills the process after the body, whatever happens in it."""
    try:
        yield
    finally:
        process.kill()


# Signals.


def test_a_scheduler_and_torchrun_may_both_pass_a_request_on(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    restored: list[int] = []
    libc = SimpleNamespace(signal=lambda number, handler: restored.append(number))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = StopRequest()
    alone._asked_to_stop(signal.SIGTERM)
    assert (alone.take(), killed) == (StopRequest.STOP, [])
    alone._asked_to_stop(signal.SIGTERM)
    assert killed == restored == [signal.SIGTERM]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    in_a_job = StopRequest()
    for _ in range(3):
        in_a_job._asked_to_stop(signal.SIGTERM)
    assert killed == [signal.SIGTERM]
    assert in_a_job._first is not None
    in_a_job._first -= StopRequest.SAME_S
    in_a_job._asked_to_stop(signal.SIGINT)
    assert killed == [signal.SIGTERM, signal.SIGINT]


@pytest.mark.slow
def test_a_second_request_ends_the_process(corpus: Path, tmp_path: Path) -> None:
    flags = ["--max_iters=100000", "--eval_interval=100000", "--save_interval=100000"]
    env = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    with subprocess.Popen(
        run_command(corpus, tmp_path, *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        with killed(process):
            assert any(line.startswith(" Iter      3") for line in process.stdout)
            process.send_signal(signal.SIGSTOP)  # both signals are pending until SIGCONT, with no step between them
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
                process.send_signal(number)
            process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    flags = ["--max_iters=100000", "--eval_interval=100000", "--save_interval=100000", "--keep_checkpoints=9"]
    with subprocess.Popen(
        run_command(corpus, tmp_path, *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        with killed(process):
            assert any(line.startswith(" Iter      3") for line in process.stdout)
            process.send_signal(signal.SIGUSR1)
            assert any(line.startswith(" Checkpoint at ") for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def test_a_request_during_an_evaluation_is_heard_after_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation.evaluate(*args)

    monkeypatch.setattr(trainer, "evaluate", asked)
    assert run(corpus, tmp_path, "--save_interval=1000") == PREEMPTED
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000010"]
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[0].metric is not None


def test_a_preparation_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import itertools; from gptperf.data import readers; from gptperf import prepare\n"
        "endless = ({'text': f'{i} ' * 1000} for i in itertools.count())\n"
        "readers.STRUCTURED['.jsonl'] = lambda file, path, fields: endless\n"
        f"prepare.main(['endless.jsonl', '--data_dir={tmp_path / 'data'}'])\n"
    )
    (tmp_path / "endless.jsonl").write_text("{}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    popen = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    with popen as process, killed(process):
        for _ in range(600):
            if list(tmp_path.glob("data/.endless.tmp-*/*.bin")):
                break
            time.sleep(0.1)
        assert list(tmp_path.glob("data/.endless.tmp-*"))
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert list((tmp_path / "data").iterdir()) == []


# Folders and checkpoints.


@pytest.mark.parametrize("how", ["scratch", "auto", "resume"])
def test_checkpoints_without_their_manifests_are_not_replaced(how: str, corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    (tmp_path / "checkpoints" / "step-00000002" / "MANIFEST.json").unlink()
    before = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(CheckpointError, match=r"found checkpoints of another run|without MANIFEST.*: step-00000002"):
        run(corpus, tmp_path, "--max_iters=2", f"--init_from={how}")
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == before


def test_a_manifest_that_nobody_may_look_at_is_not_absent(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    lstat = Path.lstat

    def refused(path: Path) -> os.stat_result:
        if path.name == "MANIFEST.json":
            raise PermissionError(13, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refused)
    for how in ("scratch", "auto", "resume"):
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be examined: .*Permission denied"):
            run(corpus, tmp_path, "--max_iters=2", f"--init_from={how}")


def test_one_run_a_folder(corpus: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError, match="run is live on"):
        run(corpus, tmp_path, "--max_iters=2")


def test_room_for_two_checkpoints_is_asked_for_first(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda directory: 1000)
    with pytest.raises(
        DiskError, match=r": 1\.000 kB free, two checkpoints of \d{3}\.\d kB need 1\.\d{3} MB; free space"
    ):
        run(corpus, tmp_path, "--max_iters=2")


def test_what_killed_saves_left_is_removed(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    left = tmp_path / "checkpoints" / ".tmp-00000003-0123abcd"
    left.mkdir()
    run(corpus, tmp_path, "--max_iters=3", "--init_from=resume")
    assert not left.exists()


def test_the_third_save_that_fails_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **keys: Any) -> Path:
        raise DiskError("no room", full=True)

    monkeypatch.setattr(write, "save", full)
    with pytest.raises(DiskError, match="no room"):
        run(corpus, tmp_path, "--save_interval=2", "--max_iters=41", "--eval_interval=100")
    assert 5 <= run_log(tmp_path)["summary"]["iterations"] <= 10


@pytest.mark.parametrize(
    ("keys", "value", "what"),
    [
        (("config",), [1], "does not fit this version"),
        (("versions",), [1], "does not fit this version"),
        (("scaler",), [], "does not fit this version"),
        (("rng", "python"), 7, "does not fit this version"),
        (("train_state",), {}, "found the state of step 0, wanted that of 2"),
        (("train_state", "step"), 1, "found the state of step 1, wanted that of 2"),
        (("train_state", "step"), "2", "does not fit this version"),
        (("train_state", "train_s"), "x", "does not fit this version"),
        (("train_state", "best_val_loss"), [1], "does not fit this version"),
    ],
)
def test_a_state_that_is_none_is_refused(
    keys: tuple[str, ...], value: Any, what: str, corpus: Path, tmp_path: Path
) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    change_state(tmp_path, 2, *keys, value=value)
    with pytest.raises(CheckpointError, match=what):
        run(corpus, tmp_path, "--max_iters=3", "--init_from=resume")


# What is resumed.


def test_the_best_loss_is_resumed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(corpus, tmp_path, "--max_iters=10")
    best = run_log(tmp_path)["summary"]["best_val_loss"]
    monkeypatch.setattr(trainer, "evaluate", lambda *args: 99.0)
    run(corpus, tmp_path, "--max_iters=20", "--init_from=resume")
    summary = run_log(tmp_path)["summary"]
    assert (summary["best_val_loss"], summary["best_iter"], summary["val_loss"]) == (best, 10, 99.0)


def test_other_validation_data_are_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    change_state(tmp_path, 2, "train_state", "validation", value="0" * 64)
    with pytest.raises(DataError, match="losses on other validation data than now"):
        run(corpus, tmp_path, "--max_iters=3", "--init_from=resume")


def test_draws_go_on_where_they_were(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    original = trainer.train_step

    def drawing(*args: Any, **keys: Any) -> Any:
        drawn.append(torch.rand(2, generator=torch.default_generator).tolist())
        state = torch.get_rng_state()
        try:
            return original(*args, **keys)
        finally:
            torch.set_rng_state(state)  # dropout does not depend on the generator: only the draw above does

    monkeypatch.setattr(trainer, "train_step", drawing)
    flags = ["--sample_tokens=0", "--save_interval=2", "--eval_interval=2"]
    run(corpus, tmp_path / "a", "--max_iters=4", *flags)
    straight, drawn[:] = list(drawn), []
    run(corpus, tmp_path / "b", "--max_iters=2", *flags)
    torch.manual_seed(5)
    run(corpus, tmp_path / "b", "--max_iters=4", *flags, "--init_from=resume")
    assert drawn == straight


def test_the_loss_scale_is_resumed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, calls = torch.amp.GradScaler.scale, 0

    def overflowing(self: torch.amp.GradScaler, loss: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        return scale(self, loss) * (float("inf") if calls == 5 else 1)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflowing)
    run(corpus, tmp_path, "--dtype=float16", "--max_iters=2")
    run(corpus, tmp_path, "--dtype=float16", "--max_iters=4", "--init_from=resume")
    scales = [entry["loss_scale"] for entry in run_log(tmp_path)["training_iterations"]]
    assert scales == [65536, 32768, 32768, 32768]


def test_a_full_gpu_is_said_with_what_helps(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **keys: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(trainer, "train_step", full)
    with pytest.raises(OutOfMemoryError, match=r"iteration 1: CUDA out of memory.* Lower batch_size = 2 and raise"):
        run(corpus, tmp_path)
    assert run_log(tmp_path)["summary"]["stopped"].startswith("E7: the GPU ran out of memory in iteration 1")


def test_a_tokenizer_whose_ids_have_changed_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "0" * 64)
    with pytest.raises(
        DataError, match="tokenizer 'byte': installed here has the fingerprint 000000000000, wanted 833d"
    ):
        run(corpus, tmp_path)


# What a user types.


@pytest.mark.parametrize("key", ["out_dir", "data_dir", "dataset"])
def test_an_empty_name_is_a_mistake(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: found '', wanted a name"):
        command_line.resolve([f"--{key}="])


def test_names_that_are_too_long_are_said_in_a_line(corpus: Path, tmp_path: Path) -> None:
    long = "x" * 300
    with pytest.raises(ConfigError, match="wanted scratch, resume, auto, the path"):
        command_line.resolve([f"--init_from={long}"])
    with pytest.raises(ConfigError):
        command_line.resolve([f"{long}/{long}.toml"])
    with pytest.raises(DataError):
        run(corpus, tmp_path, f"--dataset={long}")
    with pytest.raises((DataError, DiskError)):
        run(corpus, tmp_path, f"--data_dir={long}", "--dataset=python_stdlib")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"RANK": "x"}, "found RANK = 'x', wanted whole numbers"),
        ({"MASTER_PORT": None}, "the environment has no MASTER_PORT"),
    ],
)
def test_a_job_that_torchrun_did_not_start(
    changed: dict[str, str | None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    for key, value in (given | changed).items():
        if value is not None:
            monkeypatch.setenv(key, value)
    with pytest.raises(DeviceError, match=text):
        start_process("cpu")
