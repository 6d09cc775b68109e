"""Whole runs: components and log, requests to stop, and mistakes that are found before the first step."""

import functools
import importlib
import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import ROOT, run, run_argv, run_command, run_log

from gptperf import registry
from gptperf.checkpoint import write
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.errors import PREEMPTED, ConfigError, DataError, DeviceError, NonFiniteError, run_main
from gptperf.kernels import reference
from gptperf.monitor.runs import read_runs
from gptperf.ops import OPS, resolve_ops
from gptperf.train import main
from gptperf.training import start, trainer


def test_log_has_the_described_schema(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=4", "--log_interval=2")
    log = run_log(tmp_path)
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


# Every option of every component: key and value.
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
    original = start.build_engine

    def spy(*args: Any) -> Any:
        built.append(original(*args))
        return built[-1]

    flags = [f"--{key}={value}", "--max_iters=1", "--sample_tokens=0", "--eval_iters=1"]
    flags += ["--ffn_type=standard"] if key == "activation" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "build_engine", spy)
        assert run(corpus, tmp_path, *flags) == 0
    info = run_log(tmp_path)["startup_info"]
    assert info["components"][key] == value
    label = key.replace("_", " ").capitalize().replace("Ffn", "FFN")
    assert re.search(rf"^  {label}: +{value}$", capsys.readouterr().out, re.MULTILINE)
    model = built[0].model
    assert info["total_parameters"] == sum(p.numel() for p in model.parameters())
    table = model.position.wpe.weight.numel() if value == "learned_absolute" else 0
    assert info["non_embedding_parameters"] == info["total_parameters"] - table
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
    run(corpus, tmp_path, "--max_iters=3")
    assert steps == [0, 1, 2]
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_a_run_learns(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, "--max_iters=40", "--weight_tying=False")
    first, last = run_log(tmp_path)["training_iterations"][0], run_log(tmp_path)["training_iterations"][-1]
    assert first["loss"] == pytest.approx(np.log(264), abs=0.2)
    assert last["loss"] < 2.6  # ten different letters: ln 10 = 2.30 per letter, 5/6 of the text


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
    with pytest.raises(NonFiniteError, match="iteration 8: the updates of 1 iteration were skipped"):
        run(corpus, tmp_path, "--log_interval=10", "--save_interval=4")
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert run_log(tmp_path)["summary"]["stopped"].startswith("E5: iteration 8: the updates of 1 iteration")


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
    run(corpus, tmp_path, "--dtype=float16", "--max_iters=6")
    scales = [entry["loss_scale"] for entry in run_log(tmp_path)["training_iterations"]]
    assert scales == [65536, 32768, 32768, 32768, 32768, 32768]  # the second step overflowed and was skipped
    losses = [entry["loss"] for entry in run_log(tmp_path)["training_iterations"]]
    assert losses[-1] < losses[0]


def test_a_loss_scale_below_one_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step overflows, so the scale, which starts at 4 here, halves in each one."""
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * float("inf"))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=4.0))
    with pytest.raises(NonFiniteError, match=r"iteration 3: the loss scale fell to 0\.5"):
        run(corpus, tmp_path, "--dtype=float16", "--save_interval=100", "--eval_interval=100")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_commits_a_checkpoint(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    command = run_command(corpus, tmp_path, "--max_iters=100000", "--save_interval=100000", "--eval_interval=100000")
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
    assert "TRAINING STOPPED" in rest
    summary = run_log(tmp_path)["summary"]
    assert (summary["stopped"], summary["iterations"]) == ("asked to", int(saved.name[5:]))
    assert [found.state for found in read_runs([tmp_path])[0]] == ["stopped"]
    run(corpus, tmp_path, "--init_from=resume", f"--max_iters={int(saved.name[5:]) + 1}")
    assert "stopped" not in run_log(tmp_path)["summary"]
    assert [found.state for found in read_runs([tmp_path])[0]] == ["finished"]


def test_data_faults_come_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text"):
        run(corpus, tmp_path, "--dataset=txt")
    with pytest.raises(DataError, match="wanted --vocab_size=257 or more"):
        run(corpus, tmp_path, "--vocab_size=200")
    with pytest.raises(DataError, match="wanted at least"):
        run(corpus, tmp_path, "--block_size=100000")
    (corpus / "short.txt").write_text("a" * 1000)
    prepare(str(corpus / "short.txt"), data_dir=corpus / "data", name="short", val_fraction=0.02, quiet=True)
    with pytest.raises(DataError, match="found 21 tokens in the split 'val'"):
        run(corpus, tmp_path, "--dataset=short")
    assert not list(tmp_path.rglob("step-*"))


def test_exit_codes_and_one_line_errors(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"--dataset=nothing": 3, "--init_from=resume": 4, "--n_layer=0": 2}
    if not torch.cuda.is_available():
        cases |= {"--device=cuda": 6, "--kernels=triton --device=auto": 6}
    for flags, code in cases.items():
        argv = [f for f in run_argv(corpus, tmp_path) if not f.startswith("--device")]
        with pytest.raises(SystemExit) as ended:
            run_main(main, [*argv, *flags.split()])
        assert ended.value.code == code
        error = capsys.readouterr().err
        assert error.startswith(f"gptperf: E{code}: ")
        assert "Traceback" not in error
    with pytest.raises(ConfigError):
        run_main(main, ["--n_layer=0", "--debug"])


def test_asking_for_triton_names_the_cause() -> None:
    with pytest.raises(DeviceError, match=r"rms_norm: .*Use kernels = 'auto' or 'eager'"):
        resolve_ops("triton", "cpu")
    assert resolve_ops("auto", "cpu").chosen == dict.fromkeys(OPS, "eager")


def test_an_op_that_a_run_does_not_call_does_not_refuse_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 cannot run the op of Muon, and trains with AdamW and Triton all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", _import_any)
    ops = resolve_ops("triton", "cuda", unused=("symmetric_matmul",))
    assert ops.chosen == {op: "triton" for op in OPS if op != "symmetric_matmul"}
    assert ops.symmetric_matmul is reference.symmetric_matmul
    with pytest.raises(DeviceError, match=r"symmetric_matmul: Triton needs compute capability 8\.0 or higher"):
        resolve_ops("triton", "cuda")


def _import_any(name: str) -> Any:
    """Returns a module, or a stand-in with every op for one that needs Triton."""
    if name.startswith("gptperf.kernels.") and not name.endswith("reference"):
        return SimpleNamespace(**dict.fromkeys(OPS))
    return sys.modules[name]


def test_the_step_time_leaves_out_evaluation_and_saving(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation and save advance the clock by 100 s each, which a slow machine does not take for a step."""
    evaluate, save, now, added_s = trainer.evaluate, write.save, time.perf_counter, [0.0]

    def slow_save(*args: Any, **keys: Any) -> Path:
        added_s.append(100.0)
        return save(*args, **keys)

    def slow_evaluate(*args: Any) -> float:
        added_s.append(100.0)
        return evaluate(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: now() + sum(added_s))
    monkeypatch.setattr(trainer, "evaluate", slow_evaluate)
    monkeypatch.setattr(write, "save", slow_save)
    flags = ["--eval_interval=2", "--save_interval=1", "--max_iters=4", "--log_interval=3", "--async_save=False"]
    run(corpus, tmp_path, *flags)
    log = run_log(tmp_path)
    assert len(added_s) == 1 + 2 + 4
    assert all(entry["time_ms"] > 90e3 for entry in (*log["eval_steps"], *log["checkpoints"]))
    assert all(entry["time_ms"] < 50e3 for entry in log["training_iterations"])


def test_tokens_of_a_step_do_not_depend_on_dropout_or_resume(corpus: Path) -> None:
    """The loader uses no global generator, so earlier draws do not change the batches."""
    source = TokenSource.open(corpus / "data" / "text", "train")
    from gptperf.data.loader import Loader

    keys = {"block_size": 32, "batch_size": 2, "micro_batches": 4, "seed": 1}
    with Loader(source, **keys) as a, Loader(source, **keys, start_step=2) as b:  # type: ignore[arg-type]
        torch.manual_seed(5)
        first = [next(a) for _ in range(12)]
        assert all(torch.equal(x, next(b)) for x in first[8:])
