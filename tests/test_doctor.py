"""The doctor on working machines, and on machines where something is broken."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gptperf import doctor
from gptperf.hardware.compiler import compiler_problem

OPS = {"rms_norm": "triton", "rope": "eager"}
REASONS = {"rope": "it has no Triton kernel yet"}


class Usage(NamedTuple):
    """As shutil.disk_usage gives it."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU and with everything else."""
    monkeypatch.setattr(doctor, "resolve_ops", lambda *_: SimpleNamespace(chosen=OPS, reasons=REASONS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
    monkeypatch.setattr(doctor, "compiler_problem", lambda _: None)
    monkeypatch.setattr(doctor.hardware, "gpu_state", lambda: SimpleNamespace(driver=None))


def give_gpu(monkeypatch: pytest.MonkeyPatch, name: str, memory_gb: float, capability: tuple[int, int]) -> None:
    properties = SimpleNamespace(name=name, total_memory=memory_gb * 1e9, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: object())
    triton_says(monkeypatch, 0, "")


def triton_says(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str) -> None:
    result = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: result)


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.main([])
    return code, capsys.readouterr().out


def test_a_healthy_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == 0
    assert "VERDICT: ready to train" in text
    assert "Triton                 not usable: Triton's kernels run on a CUDA GPU" in text
    assert "device                 cpu: torch sees no CUDA GPU" in text
    assert "rms_norm               triton\n" in text
    assert "rope                   eager: it has no Triton kernel yet" in text


def test_a_healthy_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_gpu(monkeypatch, "NVIDIA H200", 150.1, (9, 0))
    code, text = run(capsys)
    assert code == 0
    assert "GPU 0                  NVIDIA H200, 150.1 GB, compute capability 9.0" in text
    assert "dense peak in TFLOPS: bfloat16 989.4, float16 989.4, float32 66.9, fp8 1978.9 (H200: " in text
    assert "nccl                   2.27.3" in text
    assert "device                 cuda: NVIDIA H200" in text
    assert "compile                block: torch.compile through Triton" in text


@pytest.mark.parametrize("reason", [None, "the package is not installed"])
def test_what_packs_attention(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "why_not_packed", lambda capability: reason)
    give_gpu(monkeypatch, "NVIDIA H200", 150.1, (9, 0))
    assert f"sdpa: cuDNN first, {'packed' if reason is None else f'not packed: {reason}'}\n" in run(capsys)[1]


def test_an_unknown_gpu_is_no_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_gpu(monkeypatch, "NVIDIA GB10", 128.5, (12, 1))
    code, text = run(capsys)
    assert code == 0
    assert "--peak_tflops=X" in text
    assert "989" not in text


def test_no_bfloat16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_gpu(monkeypatch, "Tesla V100-SXM2-32GB", 34.1, (7, 0))
    code, text = run(capsys)
    assert code == 6
    assert "PROBLEM: Tesla V100-SXM2-32GB has no bfloat16 units" in text
    assert "--dtype=float16" in text
    assert "dense peak in TFLOPS: float16 125, float32 15.7" in text
    assert "VERDICT: 1 problem\n" in text


def test_broken_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_gpu(monkeypatch, "NVIDIA H200", 150.1, (9, 0))
    triton_says(monkeypatch, 1, "Traceback ...\nRuntimeError: Failed to find C compiler\n")
    code, text = run(capsys)
    assert code == 6
    assert "PROBLEM: Triton does not work: a kernel failed (exit code 1): RuntimeError: Failed to find C" in text
    assert "compile                off: Triton does not work" in text


def test_torch_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, text = run(capsys)
    assert code == 6
    assert "PROBLEM: torch cannot be imported (import of torch halted" in text


@pytest.mark.parametrize(("version", "code"), [("2.10.1+cu128", 6), ("2.11.0a0+git", 0), ("3.0.0", 0)])
def test_torch_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, code: int
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found, text = run(capsys)
    assert found == code
    assert (f"PROBLEM: torch: found {version}, wanted 2.11 or newer" in text) == (code == 6)


def test_disk_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 990_000_000))
    code, text = run(capsys)
    assert code == 6
    assert "PROBLEM: disk: found 990.0 MB free" in text


def test_ops_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: str) -> Any:
        raise ModuleNotFoundError("No module named 'gptperf.kernels.reference'")

    monkeypatch.setattr(doctor, "resolve_ops", missing)
    code, text = run(capsys)
    assert code == 6
    assert "PROBLEM: the ops cannot be loaded: No module named 'gptperf.kernels.reference'" in text


def test_no_compiler_on_a_cpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "compiler_problem", compiler_problem)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    code, text = run(capsys)
    assert code == 0
    assert "C++ compiler           not found" in text
    assert "compile                off: torch.compile needs a C++ compiler" in text


def test_a_broken_compiler_on_a_cpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "compiler_problem", compiler_problem)
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    code, text = run(capsys)
    assert code == 0
    assert "compile                off: the C++ compiler " in text


def test_json_is_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_gpu(monkeypatch, "Tesla V100-SXM2-32GB", 34.1, (7, 0))
    assert doctor.main(["--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 6
    assert report["gpus"][0]["dense_peak_tflops"] == {"float16": 125, "float32": 15.7}
    assert report["choices"]["kernels"]["rms_norm"] == "triton"
    assert len(report["problems"]) == 1


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from gptperf import doctor
try:
    doctor.main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    help_run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert help_run.returncode == 0, help_run.stderr
    assert "--json" in help_run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "code"), [("2", 0), ("3", 1)])
def test_the_triton_trial_in_the_interpreter(factor: str, code: int) -> None:
    """The trial passes, and would not pass whatever the kernel does."""
    pytest.importorskip("triton")
    trial = f"""
import torch
from gptperf import doctor
arange = torch.arange
torch.arange = lambda n, device, dtype: {factor} * arange(n, dtype=dtype) / 2  # on the CPU
equal = torch.equal
torch.equal = lambda y, x: equal(y, 2.0 * arange(100))
doctor.try_triton()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", trial], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert ("gave wrong numbers" in result.stderr) == bool(code)
