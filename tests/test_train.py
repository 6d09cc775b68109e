"""Whole runs: bitwise resume after a kill, the same run on any number of processes, faults before the first step."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptperf import cli, registry, trainer
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.errors import PREEMPTED, CheckpointError, ConfigError, DataError, DeviceError, DiskError, NonFiniteError
from gptperf.train import main

ROOT = Path(__file__).parent.parent
SMALL = """
[model]
arch_preset = "llama"
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
block_size = 32
vocab_size = 257
vocab_multiple = 8
[data]
dataset = "text"
[train]
batch_size = 2
gradient_accumulation_steps = 4
max_iters = 20
eval_interval = 10
eval_iters = 4
save_interval = 5
[optimizer]
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
[system]
device = "cpu"
dtype = "float32"
compile = false
[log]
log_interval = 1
sample_tokens = 8
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small prepared data set and a small configuration."""
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).integers(97, 107, (4000, 5)).astype(np.uint8)
    text = b" ".join(bytes(row) for row in words)
    (folder / "text.txt").write_bytes(text)
    prepare(str(folder / "text.txt"), data_dir=folder / "data", name="text", quiet=True)
    (folder / "small.toml").write_text(SMALL)
    return folder


def _argv(corpus: Path, out: Path, *flags: str) -> list[str]:
    return [str(corpus / "small.toml"), f"--data_dir={corpus / 'data'}", f"--out_dir={out}", *flags]


def _run(corpus: Path, out: Path, *flags: str) -> int:
    resolved = cli.resolve(_argv(corpus, out, *flags))
    return trainer.train(resolved.config, resolved.origins)


def _command(corpus: Path, out: Path, *flags: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *(launcher or ["-m"]), "gptperf.train", *_argv(corpus, out, *flags)]


def _log(out: Path) -> dict[str, Any]:
    (path,) = out.glob("run_*.json")
    return json.loads(path.read_text())


def _losses(out: Path) -> list[tuple[int, str]]:
    return [(entry["iter"], float(entry["loss"]).hex()) for entry in _log(out)["training_iterations"]]


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in files}


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_is_bitwise_the_straight_run(dtype: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    path = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    flags = ["--plugins=killer", "--normalization=killer", f"--dtype={dtype}", "--dropout=0.1"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(_command(corpus, straight, *flags), env=env, check=True, capture_output=True)
    # 5 norms a forward pass, 4 passes a step: the middle of step 13, after the checkpoint of step 10.
    killed = subprocess.run(
        _command(corpus, broken, *flags), env=env | {"KILL_AT": str(12 * 20 + 4 * 5 + 7)}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert (broken / "checkpoints" / "step-00000010").is_dir()
    subprocess.run(_command(corpus, broken, *flags, "--init_from=resume"), env=env, check=True, capture_output=True)
    assert _hashes(broken / "checkpoints" / "step-00000020") == _hashes(straight / "checkpoints" / "step-00000020")
    assert _losses(broken) == _losses(straight)
    assert [entry["iter"] for entry in _log(broken)["training_iterations"]] == list(range(1, 21))
    evaluations = [[(e["iter"], e["val_loss"].hex()) for e in _log(out)["eval_steps"]] for out in (straight, broken)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("step", [5, 15])
def test_resume_from_any_checkpoint_is_bitwise(step: int, corpus: Path, tmp_path: Path) -> None:
    assert _run(corpus, tmp_path / "a", "--keep_checkpoints=9", "--dropout=0.2") == 0
    a, b = (tmp_path / x / "checkpoints" for x in "ab")
    b.mkdir(parents=True)
    (a / f"step-{step:08d}").rename(b / f"step-{step:08d}")
    assert _run(corpus, tmp_path / "b", "--init_from=auto", "--dropout=0.2") == 0
    assert _hashes(a / "step-00000020") == _hashes(b / "step-00000020")


def test_without_the_optimizers_state_resume_is_not_bitwise(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the tests above."""
    _run(corpus, tmp_path / "a", "--keep_checkpoints=9")
    b = tmp_path / "b" / "checkpoints"
    b.mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-00000010").rename(b / "step-00000010")
    monkeypatch.setattr("gptperf.parallel.Replicated.optimizer_views", lambda *_: iter(()))
    _run(corpus, tmp_path / "b", "--init_from=resume")
    assert _hashes(tmp_path / "a/checkpoints/step-00000020") != _hashes(b / "step-00000020")


@pytest.mark.slow
def test_two_processes_train_as_one(corpus: Path, tmp_path: Path) -> None:
    assert _run(corpus, tmp_path / "one") == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = _command(corpus, tmp_path / "two", launcher=launcher)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = _log(tmp_path / "one"), _log(tmp_path / "two")
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
    command = _command(corpus, tmp_path / "again", "--init_from=resume", launcher=launcher)
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    hashes = [_hashes(tmp_path / out / "checkpoints/step-00000020") for out in ("two", "again")]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]
    assert hashes[0]["optimizer.safetensors"] == hashes[1]["optimizer.safetensors"]


def test_log_has_the_described_schema(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path, "--max_iters=4", "--log_interval=2")
    log = _log(tmp_path)
    described = [
        "run_name",
        "start_time",
        "config",
        "startup_info",
        "training_iterations",
        "eval_steps",
        "checkpoints",
        "summary",
    ]
    assert [key for key in described if key not in log] == []
    assert log["run_name"] == next(tmp_path.glob("run_*.json")).stem
    assert [entry["iter"] for entry in log["training_iterations"]] == [1, 2, 4]
    entry = log["training_iterations"][-1]
    assert {"iter", "loss", "time_ms", "mfu", "memory", "gradients"} <= entry.keys()
    assert entry["mfu"].keys() == {
        "achieved_tflops",
        "tokens_per_sec",
        "flops_per_token",
        "convention",
    }  # no GPU: no MFU
    assert entry["tokens"] == 4 * 8 * 32
    assert log["config"]["origins"]["n_embd"] == str(corpus / "small.toml")
    assert log["startup_info"]["components"]["normalization"] == "rmsnorm"
    assert log["summary"]["iterations"] == 4


# The description's table of options: component, flag, and what the log calls it.
OPTIONS = [
    *(("normalization", n) for n in ("layernorm", "layernorm_nobias", "rmsnorm")),
    *(("activation", n) for n in ("gelu", "silu", "relu", "leaky_relu")),
    *(("position_encoding", n) for n in ("learned_absolute", "rope", "none")),
    *(("attention_backend", n) for n in ("sdpa", "manual")),
    *(("norm_position", n) for n in ("pre", "post")),
    *(("ffn_type", n) for n in ("standard", "swiglu")),
    *(("bias", n) for n in (True, False)),
    *(("weight_tying", n) for n in (True, False)),
    *(("dropout", n) for n in (0.0, 0.5, 1.0)),
]


@pytest.mark.parametrize(("key", "value"), OPTIONS)
def test_every_described_option_is_built_and_logged(
    key: str, value: object, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Any] = []
    original = trainer.build_engine

    def spy(*args: Any) -> Any:
        built.append(original(*args))
        return built[-1]

    flags = [f"--{key}={value}", "--max_iters=1", "--sample_tokens=0", "--eval_iters=1"]
    flags += ["--ffn_type=standard"] if key == "activation" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_engine", spy)
        assert _run(corpus, tmp_path, *flags) == 0
    info = _log(tmp_path)["startup_info"]
    assert info["components"][key] == value
    label = key.replace("_", " ").capitalize().replace("Ffn", "FFN")
    assert re.search(rf"^  {label}: +{value}$", capsys.readouterr().out, re.MULTILINE)
    model = built[0].model
    assert info["total_parameters"] == sum(p.numel() for p in model.parameters())
    made = {
        "normalization": type(model.norm),
        "position_encoding": type(model.position),
        "attention_backend": type(model.blocks[0].attention.backend),
        "norm_position": type(model.blocks[0]),
        "ffn_type": type(model.blocks[0].ffn),
    }
    if key in made:
        assert made[key] is registry.component(key, str(value))
    elif key == "bias":
        assert (model.blocks[0].attention.out.bias is not None) is value
    elif key == "weight_tying":
        assert (model.lm_head.weight is model.wte.weight) is value
    elif key == "dropout":
        assert model.dropout.p == value


def test_max_iters_is_that_many_iterations(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *a, **k: steps.append(a[2]) or original(*a, **k))  # type: ignore[func-returns-value]
    _run(corpus, tmp_path, "--max_iters=3")
    assert steps == [0, 1, 2]
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_a_run_learns(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path, "--max_iters=40", "--weight_tying=False")
    first, last = _log(tmp_path)["training_iterations"][0], _log(tmp_path)["training_iterations"][-1]
    assert first["loss"] == pytest.approx(np.log(264), abs=0.2)
    assert last["loss"] < 2.6  # words of ten letters: ln 10 = 2.30 a letter, 5/6 of the text


def test_old_checkpoints_are_not_lost(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path, "--max_iters=2")
    with pytest.raises(
        CheckpointError,
        match=r"found checkpoints of another run; wanted --init_from=resume.*--overwrite=True",
    ):
        _run(corpus, tmp_path, "--max_iters=2")
    _run(corpus, tmp_path, "--max_iters=3", "--overwrite=True")
    (aside,) = tmp_path.glob("checkpoints.*")
    assert (aside / "step-00000002" / "MANIFEST.json").is_file()
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_init_from(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no checkpoint to resume"):
        _run(corpus, tmp_path / "a", "--init_from=resume")
    assert _run(corpus, tmp_path / "a", "--init_from=auto") == 0
    assert (
        _run(
            corpus,
            tmp_path / "b",
            f"--init_from={tmp_path / 'a'}",
            "--max_iters=1",
            "--learning_rate=1e-9",
            "--min_lr=0",
        )
        == 0
    )
    a, b = _log(tmp_path / "a"), _log(tmp_path / "b")
    assert b["training_iterations"][0]["iter"] == 1
    assert b["eval_steps"][-1]["val_loss"] == pytest.approx(a["eval_steps"][-1]["val_loss"], rel=1e-5)


def test_another_model_or_data_set_is_not_resumed(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path, "--max_iters=2")
    with pytest.raises(CheckpointError, match=r"\(saved -> now\): n_layer: 2 -> 3$"):
        _run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--n_layer=3")
    with pytest.raises(CheckpointError, match=r"batch_size: 2 -> 4"):
        _run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--batch_size=4")
    with pytest.raises(CheckpointError, match=r"dtype: float32 -> bfloat16"):
        _run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--dtype=bfloat16")
    (corpus / "other.txt").write_text("other text " * 5000)
    prepare(str(corpus / "other.txt"), data_dir=corpus / "data", name="other", quiet=True, overwrite=True)
    with pytest.raises(DataError, match="wanted the same shards"):
        _run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--dataset=other")
    assert _run(corpus, tmp_path, "--max_iters=4", "--init_from=resume", "--learning_rate=0.02") == 0


def test_a_lost_run_stops_before_its_weights_are(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.train_step

    def poisoned(engine: Any, batches: Any, step: int, **keys: Any) -> Any:
        if step == 7:
            handle = engine.model.lm_head.weight.register_hook(lambda g: g * float("nan"))
            try:
                return original(engine, batches, step, **keys)
            finally:
                handle.remove()
        return original(engine, batches, step, **keys)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match="iteration 8: 1 iterations had gradients that are not finite"):
        _run(corpus, tmp_path, "--log_interval=10", "--save_interval=4")
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_a_run_that_ends_without_its_checkpoint_has_failed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTPERF_FAILPOINT", "save.3:enospc")
    with pytest.raises(DiskError, match="No space left"):
        _run(corpus, tmp_path, "--max_iters=5", "--save_interval=100")
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_full_disk_on_the_way_does_not_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer.checkpoint.save

    def full_at_ten(*args: Any, step: int, **keys: Any) -> Path:
        if step == 10:
            monkeypatch.setenv("GPTPERF_FAILPOINT", "save.2:enospc")
        else:
            monkeypatch.delenv("GPTPERF_FAILPOINT", raising=False)
        return save(*args, step=step, **keys)

    monkeypatch.setattr(trainer.checkpoint, "save", full_at_ten)
    assert _run(corpus, tmp_path) == 0
    saved = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000005", "step-00000015", "step-00000020"]
    assert [m["iter"] for m in _log(tmp_path)["messages"]] == [10]


def test_buffers_of_a_plugin_are_resumed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            return y / self.ema, residual

    monkeypatch.setattr(registry, "_components", dict(registry._components))
    registry.register("normalization", "averaging", Averaging)
    _run(corpus, tmp_path / "a", "--normalization=averaging", "--keep_checkpoints=9")
    b = tmp_path / "b" / "checkpoints"
    b.mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-00000010").rename(b / "step-00000010")
    _run(corpus, tmp_path / "b", "--normalization=averaging", "--init_from=resume")
    assert _hashes(tmp_path / "a/checkpoints/step-00000020") == _hashes(b / "step-00000020")


def test_a_component_cannot_take_a_name_of_gptperfs_own() -> None:
    with pytest.raises(ValueError, match="gptperf's own"):
        registry.register("normalization", "rmsnorm", object)


def test_float16_scales(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = torch.amp.GradScaler.scale
    poisoned = {5}  # backward passes

    def overflowing(self: torch.amp.GradScaler, loss: torch.Tensor) -> Any:
        poisoned_now = len(calls) in poisoned
        calls.append(1)
        return scale(self, loss) * (float("inf") if poisoned_now else 1)

    calls: list[int] = []
    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflowing)
    _run(corpus, tmp_path, "--dtype=float16", "--max_iters=6")
    scales = [entry["loss_scale"] for entry in _log(tmp_path)["training_iterations"]]
    assert scales == [65536, 32768, 32768, 32768, 32768, 32768]  # the second step overflowed and was left out
    losses = [entry["loss"] for entry in _log(tmp_path)["training_iterations"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_commits_a_checkpoint(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    command = _command(corpus, tmp_path, "--max_iters=100000", "--save_interval=100000", "--eval_interval=100000")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(" Iter      3"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    assert f"asked to stop: iteration {int(saved.name[5:])} is saved" in rest


def test_data_faults_come_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text"):
        _run(corpus, tmp_path, "--dataset=txt")
    with pytest.raises(DataError, match="wanted --vocab_size=257 or more"):
        _run(corpus, tmp_path, "--vocab_size=200")
    with pytest.raises(DataError, match="wanted at least"):
        _run(corpus, tmp_path, "--block_size=100000")
    (corpus / "short.txt").write_text("a" * 1000)
    prepare(str(corpus / "short.txt"), data_dir=corpus / "data", name="short", val_fraction=0.02, quiet=True)
    with pytest.raises(DataError, match="found 21 tokens in the split 'val'"):
        _run(corpus, tmp_path, "--dataset=short")
    assert not list(tmp_path.rglob("step-*"))


def test_exit_codes_and_one_line_errors(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"--dataset=nothing": 3, "--init_from=resume": 4, "--n_layer=0": 2}
    if not torch.cuda.is_available():
        cases |= {"--device=cuda": 6, "--kernels=triton --device=auto": 6}
    for flags, code in cases.items():
        argv = [f for f in _argv(corpus, tmp_path) if not f.startswith("--device")]
        with pytest.raises(SystemExit) as ended:
            main([*argv, *flags.split()])
        assert ended.value.code == code
        error = capsys.readouterr().err
        assert error.startswith(f"gptperf: E{code}: ")
        assert "Traceback" not in error
    with pytest.raises(ConfigError):
        main(["--n_layer=0", "--debug"])


def test_asking_for_triton_names_the_cause() -> None:
    with pytest.raises(DeviceError, match=r"rms_norm: .*Use kernels = 'auto' or 'eager'"):
        registry.resolve_ops("triton", "cpu")
    assert registry.resolve_ops("auto", "cpu").chosen == dict.fromkeys(registry.OPS, "eager")


def test_the_step_time_leaves_out_evaluation_and_saving(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, save = trainer.evaluate, trainer.checkpoint.save

    def slow_save(*args: Any, **keys: Any) -> Path:
        time.sleep(1.0)
        return save(*args, **keys)

    monkeypatch.setattr(trainer, "evaluate", lambda run: time.sleep(1.0) or evaluate(run))  # type: ignore[func-returns-value]
    monkeypatch.setattr(trainer.checkpoint, "save", slow_save)
    _run(corpus, tmp_path, "--eval_interval=2", "--save_interval=1", "--max_iters=4", "--log_interval=3")
    assert all(entry["time_ms"] < 500 for entry in _log(tmp_path)["training_iterations"][1:])


def test_tokens_of_a_step_do_not_depend_on_dropout_or_resume(corpus: Path) -> None:
    """The loader draws from no global generator: the same batches whatever was drawn before."""
    source = TokenSource.open(corpus / "data" / "text", "train")
    from gptperf.data.loader import Loader

    keys = {"block_size": 32, "batch_size": 2, "micro_batches": 4, "seed": 1}
    with Loader(source, **keys) as a, Loader(source, **keys, start_step=2) as b:  # type: ignore[arg-type]
        torch.manual_seed(5)
        first = [next(a) for _ in range(12)]
        assert all(torch.equal(x, next(b)) for x in first[8:])
