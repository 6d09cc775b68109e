"""Resume of whole runs: the same bits as without a kill, values that may differ, disks that fail."""

import dataclasses
import os
import random
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import ROOT, hashes, losses, run, run_command, run_log

from gptperf import checkpoint, registry
from gptperf.checkpoint import write
from gptperf.config import KEYS, command_line
from gptperf.data.prepare import prepare
from gptperf.errors import CheckpointError, DataError, DiskError
from gptperf.training import matching, reporting, saving
from gptperf.training.kernel_digest import kernel_digest
from gptperf.training.optimizers.adamw import AdamW

KILLER = """
import os, signal
from gptperf.model import RMSNorm
from gptperf.registry import register
calls = 0
class Killer(RMSNorm):
    def forward(self, x, residual=None):
        global calls
        calls += 1
        if calls == int(os.environ.get("KILL_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, residual)
register("normalization", "killer", Killer)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_is_bitwise_the_straight_run(dtype: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    path = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    flags = ["--plugins=killer", "--normalization=killer", f"--dtype={dtype}", "--dropout=0.1"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(run_command(corpus, straight, *flags), env=env, check=True, capture_output=True)
    # 5 norms a forward pass, 4 passes a step: the middle of step 13, after the checkpoint of step 10.
    killed = subprocess.run(
        run_command(corpus, broken, *flags), env=env | {"KILL_AT": str(12 * 20 + 4 * 5 + 7)}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert (broken / "checkpoints" / "step-00000010").is_dir()
    subprocess.run(run_command(corpus, broken, *flags, "--init_from=resume"), env=env, check=True, capture_output=True)
    assert hashes(broken / "checkpoints" / "step-00000020") == hashes(straight / "checkpoints" / "step-00000020")
    assert losses(broken) == losses(straight)
    assert [entry["iter"] for entry in run_log(broken)["training_iterations"]] == list(range(1, 21))
    evaluations = [[(e["iter"], e["val_loss"].hex()) for e in run_log(out)["eval_steps"]] for out in (straight, broken)]
    assert evaluations[0] == evaluations[1]


SINGLE = "--dtype=bfloat16 --gradient_accumulation_steps=1"  # gradients then stay in bfloat16


@pytest.mark.parametrize(("step", "more"), [(5, ""), (15, "--optimizer_state_dtype=bfloat16"), (10, SINGLE)])
def test_resume_from_any_checkpoint_is_bitwise(step: int, more: str, corpus: Path, tmp_path: Path) -> None:
    flags = ["--dropout=0.2", *more.split()]
    assert run(corpus, tmp_path / "a", "--keep_checkpoints=9", *flags) == 0
    a, b = (tmp_path / x / "checkpoints" for x in "ab")
    b.mkdir(parents=True)
    (a / f"step-{step:08d}").rename(b / f"step-{step:08d}")
    assert run(corpus, tmp_path / "b", "--init_from=auto", *flags) == 0
    assert hashes(a / "step-00000020") == hashes(b / "step-00000020")


@pytest.mark.parametrize("moments", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_moments_are_converted_where_a_resume_asks_for_it(
    moments: tuple[str, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iters, dtype in zip((3, 4), moments, strict=True):
        flags = [f"--max_iters={iters}", f"--optimizer_state_dtype={dtype}"]
        assert run(corpus, tmp_path, *flags, "--init_from=auto") == 0
        stored = checkpoint.load(tmp_path / "checkpoints" / f"step-{iters:08d}").tensors["optimizer"]
        kinds = {x.dtype for name, x in stored.items() if name.startswith("exp_avg")}
        assert kinds == {getattr(torch, dtype)}
    assert f"(saved -> now): optimizer_state_dtype: {moments[0]} -> {moments[1]}" in capsys.readouterr().out


def test_without_the_optimizers_state_resume_is_not_bitwise(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the tests above."""
    run(corpus, tmp_path / "a", "--keep_checkpoints=9")
    b = tmp_path / "b" / "checkpoints"
    b.mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-00000010").rename(b / "step-00000010")
    monkeypatch.setattr(AdamW, "states", lambda self, bucket: {})
    run(corpus, tmp_path / "b", "--init_from=resume")
    stem = "model.safetensors"
    assert hashes(tmp_path / "a/checkpoints/step-00000020")[stem] != hashes(b / "step-00000020")[stem]


def test_old_checkpoints_are_not_lost(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    with pytest.raises(
        CheckpointError,
        match=r"found checkpoints of another run; wanted --init_from=resume.*--overwrite=True",
    ):
        run(corpus, tmp_path, "--max_iters=2")
    run(corpus, tmp_path, "--max_iters=3", "--overwrite=True")
    (aside,) = tmp_path.glob("checkpoints.*")
    assert (aside / "step-00000002" / "MANIFEST.json").is_file()
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_init_from(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no checkpoint to resume"):
        run(corpus, tmp_path / "a", "--init_from=resume")
    assert run(corpus, tmp_path / "a", "--init_from=auto") == 0
    assert (
        run(
            corpus,
            tmp_path / "b",
            f"--init_from={tmp_path / 'a'}",
            "--max_iters=1",
            "--learning_rate=1e-9",
            "--min_lr=0",
        )
        == 0
    )
    again = [f"--init_from={tmp_path / 'a'}", "--max_iters=1", "--overwrite=True"]
    assert run(corpus, tmp_path / "a2", *again) == 0
    a, b = run_log(tmp_path / "a"), run_log(tmp_path / "b")
    assert run(corpus, tmp_path / "a", *again) == 0  # from the checkpoints that it moves aside
    assert b["training_iterations"][0]["iter"] == 1
    assert b["eval_steps"][-1]["val_loss"] == pytest.approx(a["eval_steps"][-1]["val_loss"], rel=1e-5)


def test_a_summary_covers_all_starts_of_a_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ages = iter(10.0 * (i + 1) for i in range(100))
    for module in (saving, reporting):
        monkeypatch.setattr(module, "process_age_s", lambda: age)
    age = next(ages)
    assert run(corpus, tmp_path, "--max_iters=10") == 0
    first = run_log(tmp_path)["summary"]
    assert (first["starts"], first["iterations"], first["tokens"], first["wall_time_s"]) == (1, 10, 2560, 10.0)
    assert "this_start" not in first
    age = next(ages)
    assert run(corpus, tmp_path, "--max_iters=16", "--init_from=resume") == 0
    both = run_log(tmp_path)["summary"]
    assert (both["starts"], both["iterations"], both["tokens"], both["wall_time_s"]) == (2, 16, 4096, 30.0)
    assert both["this_start"] == {"first_iter": 11, "iterations": 6, "tokens": 1536, "wall_time_s": 20.0}
    assert both["tokens_per_sec"] > 0
    losses = [entry["loss"] for entry in run_log(tmp_path)["training_iterations"]]
    assert (both["train_loss"], both["train_loss_iterations"]) == (pytest.approx(np.mean(losses[-5:]), rel=1e-6), 5)
    assert "Added by this start:   6 iterations from 11 on" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["resume", "auto"])
def test_a_run_that_is_done_says_so_and_stays_as_it_is(
    how: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path, "--max_iters=4")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    for max_iters in (2, 4):
        capsys.readouterr()
        assert run(corpus, tmp_path, f"--max_iters={max_iters}", f"--init_from={how}") == 0
        text = capsys.readouterr().out
        assert f"nothing was left to do: {tmp_path}/checkpoints/step-00000004 is at iteration 4 of" in text
        assert f"max_iters = {max_iters};" in text
        assert "TRAINING" not in text
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_a_run_that_was_killed_after_its_last_save_gets_its_summary(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    (journal,) = tmp_path.glob("run_*.jsonl")
    lines = [line for line in journal.read_text().splitlines(True) if '"event":"summary"' not in line]
    journal.write_text("".join(lines))
    journal.with_suffix(".json").unlink()
    assert run(corpus, tmp_path, "--max_iters=2", "--init_from=resume") == 0
    assert run_log(tmp_path)["summary"]["iterations"] == 2


def test_another_model_or_data_set_is_not_resumed(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=2")
    with pytest.raises(CheckpointError, match=r"\(saved -> now\): n_layer: 2 -> 3$"):
        run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--n_layer=3")
    with pytest.raises(CheckpointError, match=r"batch_size: 2 -> 4"):
        run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--batch_size=4")
    with pytest.raises(CheckpointError, match=r"dtype: float32 -> bfloat16"):
        run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--dtype=bfloat16")
    (corpus / "other.txt").write_text("other text " * 5000)
    prepare(str(corpus / "other.txt"), data_dir=corpus / "data", name="other", quiet=True, overwrite=True)
    with pytest.raises(DataError, match="wanted the same data sets, weights and shards"):
        run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--dataset=other")
    assert run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--learning_rate=0.02") == 0


def test_a_run_that_ends_without_its_checkpoint_has_failed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTPERF_FAILPOINT", "save.3:enospc")
    with pytest.raises(DiskError, match="No space left"):
        run(corpus, tmp_path, "--max_iters=5", "--save_interval=100")
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_full_disk_on_the_way_does_not_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = write.save  # which the thread that saves calls

    def full_at_ten(*args: Any, step: int, **keys: Any) -> Path:
        if step == 10:
            monkeypatch.setenv("GPTPERF_FAILPOINT", "save.2:enospc")
        else:
            monkeypatch.delenv("GPTPERF_FAILPOINT", raising=False)
        return save(*args, step=step, **keys)

    monkeypatch.setattr(write, "save", full_at_ten)
    assert run(corpus, tmp_path) == 0
    saved = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000005", "step-00000015", "step-00000020"]
    assert [m["iter"] for m in run_log(tmp_path)["messages"]] == [10]


@pytest.mark.parametrize(("failing", "ends"), [((2, 4, 6), False), ((2, 3, 4), True)])
def test_failed_saves_in_a_row_end_a_run(
    failing: tuple[int, ...], ends: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = write.save

    def full(*args: Any, step: int, **keys: Any) -> Path:
        if step in failing:
            raise DiskError("full", full=True)
        return save(*args, step=step, **keys)

    monkeypatch.setattr(write, "save", full)
    flags = ["--save_interval=1", "--max_iters=7", "--eval_iters=1", "--async_save=False"]
    if ends:
        with pytest.raises(DiskError, match="full"):
            run(corpus, tmp_path, *flags)
    else:
        assert run(corpus, tmp_path, *flags) == 0
        assert [message["iter"] for message in run_log(tmp_path)["messages"]] == [2, 4, 6]


def test_buffers_and_draws_of_a_plugin_are_resumed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptperf.model import RMSNorm

    class Averaging(RMSNorm):
        ema: torch.Tensor

        def __init__(self, *args: Any):
            super().__init__(*args)
            self.register_buffer("ema", torch.ones(()))

        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            y, residual = super().forward(x, residual)
            if self.training:
                self.ema.mul_(0.9).add_(0.1 * y.detach().abs().mean())
            noise = random.random() + float(np.random.rand())  # nobody seeds these but the run
            return y / self.ema + 1e-2 * noise, residual

    monkeypatch.setattr(registry, "_components", dict(registry._components))
    registry.register("normalization", "averaging", Averaging)
    run(corpus, tmp_path / "a", "--normalization=averaging", "--keep_checkpoints=9")
    b = tmp_path / "b" / "checkpoints"
    b.mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-00000010").rename(b / "step-00000010")
    run(corpus, tmp_path / "b", "--normalization=averaging", "--init_from=resume")
    assert hashes(tmp_path / "a/checkpoints/step-00000020") == hashes(b / "step-00000020")


@pytest.mark.slow
def test_two_processes_train_as_one(corpus: Path, tmp_path: Path) -> None:
    flags = ["--dropout=0.1"]  # dropped by the place in the run, not by the process
    assert run(corpus, tmp_path / "one", *flags) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = run_command(corpus, tmp_path / "two", *flags, launcher=launcher)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = run_log(tmp_path / "one"), run_log(tmp_path / "two")
    for a, b in zip(one["training_iterations"], two["training_iterations"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["gradients"]["global_norm"] == pytest.approx(a["gradients"]["global_norm"], rel=1e-5)
    for a, b in zip(one["eval_steps"], two["eval_steps"], strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-5)
    assert two["startup_info"]["parallelism"] == "DDP over 2 processes"
    assert done.stdout.count("STARTING TRAINING") == 1
    # Saved by two, resumed by two: the bits of the run that was not broken.
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    os.rename(tmp_path / "two/checkpoints/step-00000015", tmp_path / "again/checkpoints/step-00000015")
    command = run_command(corpus, tmp_path / "again", *flags, "--init_from=resume", launcher=launcher)
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = [hashes(tmp_path / out / "checkpoints/step-00000020") for out in ("two", "again")]
    assert saved[0].keys() >= {f"{stem}-0000{rank}.safetensors" for stem in ("model", "optimizer") for rank in "01"}
    assert saved[0] == saved[1]


def test_a_key_that_came_after_the_checkpoint_had_its_default() -> None:
    config = command_line.resolve(["tiny"]).config
    derived = {name: getattr(config.model, name) for name in matching.DERIVED}
    saved: dict[str, Any] = {"config": config.sections(), "model": derived}
    for key in ("qk_norm", "rope_theta", "grad_clip"):
        section = KEYS[key].section
        saved["config"][section] = {name: value for name, value in saved["config"][section].items() if name != key}
    assert matching.changed_keys(saved, config) == []
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, qk_norm=True))
    with pytest.raises(CheckpointError, match="qk_norm: False -> True"):
        matching.changed_keys(saved, changed)


def test_what_may_differ_at_a_resume() -> None:
    """What changes the function of the weights, the data order or the bits is refused; other keys give a warning."""
    config = command_line.resolve(["tiny"]).config
    sizes = {name: getattr(config.model, name) for name in matching.DERIVED}

    def told(key: str, value: object = "another") -> list[str] | None:
        """Returns the warnings about a checkpoint that was made with another value, or None if it is refused."""
        sections = {name: dict(section) for name, section in config.sections().items()}
        saved = {"config": sections, "model": dict(sizes)}
        (saved["model"] if key in sizes else sections[KEYS[key].section])[key] = value
        try:
            return matching.changed_keys(saved, config)
        except CheckpointError:
            return None

    numbers = {"max_iters": 7, "lr_decay_iters": 7}
    warnings = {key: told(key, numbers.get(key, "another")) for key in (*KEYS, *sizes)}
    same_model = {"arch_preset", "attention_backend", "dropout", "d_ff_multiple", "vocab_multiple", "residual_init"}
    by_size = {"d_ff", "n_kv_head", "head_dim", "attention_bias"}
    refused = {key for key in KEYS if KEYS[key].section == "model"} - same_model - by_size | set(sizes)
    refused |= {"dtype", "seed", "batch_size", "gradient_accumulation_steps", "optimizer", "normuon"}
    assert {key for key, lines in warnings.items() if lines is None} == refused
    of_the_process = {"init_from", "overwrite", "out_dir", "data_dir", "plugins", "debug"}
    of_the_process |= {"collective_timeout_s", "verify_data"}
    assert {key for key, lines in warnings.items() if lines == []} == of_the_process | by_size
    assert warnings["learning_rate"] == [f"learning_rate: another -> {config.optimizer.learning_rate}"]


def test_a_key_that_is_left_out_is_the_same_as_its_default() -> None:
    def told(before: list[str], now: list[str], *, older: bool = False) -> list[str] | None:
        """Returns the warnings about a checkpoint that was made with other flags, or None if it is refused."""
        saved, config = (command_line.resolve(["tiny", *flags]).config for flags in (before, now))
        sections = {name: dict(section) for name, section in saved.sections().items()}
        derived = {name: getattr(saved.model, name) for name in matching.DERIVED}
        if older:  # made before there were these keys
            for name in ("head_dim", "attention_bias", "head_width", "attention_biases"):
                sections["model"].pop(name, None)
                derived.pop(name, None)
        try:
            return matching.changed_keys({"config": sections, "model": derived}, config)
        except CheckpointError:
            return None

    width = command_line.resolve(["tiny"]).config.model.head_width
    for flags in ([f"--head_dim={width}"], ["--attention_bias=none"], ["--head_dim=none", "--attention_bias=none"]):
        assert told([], flags) == told(flags, []) == told([], flags, older=True) == []
    assert told(["--bias=True"], ["--bias=True", "--attention_bias=all"], older=True) == []
    for flags in ([f"--head_dim={2 * width}"], ["--attention_bias=qkv"], ["--attention_bias=all"]):
        assert told([], flags) is told(flags, []) is told([], flags, older=True) is None
    assert told(["--attention_bias=qkv"], ["--attention_bias=all"]) is None


def _engine_for_versions(kernels: str) -> Any:
    return SimpleNamespace(
        process=SimpleNamespace(device=torch.device("cpu"), world_size=1),
        ops=SimpleNamespace(chosen={"rms_norm": kernels}),
        weights=SimpleNamespace(collectives=SimpleNamespace(name="process_group")),
    )


def test_the_code_of_kernels_counts_where_they_run() -> None:
    """Their bits depend on shapes of programs, which a version of gptperf may change."""
    assert matching.versions(_engine_for_versions("eager"))["kernel_code"] == ""
    assert matching.versions(_engine_for_versions("triton"))["kernel_code"] == kernel_digest()


def test_a_version_that_a_checkpoint_does_not_record_is_unknown() -> None:
    engine = _engine_for_versions("triton")
    saved = matching.versions(engine)
    assert matching.changed_versions({"versions": saved}, engine) == []
    assert matching.changed_versions({"versions": saved | {"kernel_code": "0"}}, engine) == [
        f"kernel_code: 0 -> {saved['kernel_code']}"
    ]
    del saved["kernel_code"]
    older = saved | {"kernel_sources": "0123456789ab"}  # a digest over the files as they were
    assert matching.changed_versions({"versions": older}, engine) == []
