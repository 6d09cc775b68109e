"""Examines this machine: `python -m gptperf.doctor` prints what it has, what a default run would use, and problems.

The exit code is 0, or 6 when something that a default run needs is missing or broken.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gptperf
from gptperf import hardware
from gptperf.config import ModelConfig, SystemConfig, command_line
from gptperf.config.flags import Flags, parse
from gptperf.errors import DeviceError, run_main
from gptperf.formats import byte_text, counted, rough_duration
from gptperf.hardware.compiler import compiler_problem
from gptperf.hardware.cpu import set_up_threads, usable_cpus
from gptperf.ops import ALL_TRITON, resolve_ops, unmeasured_versions, why_not_packed

__all__ = ["examine", "main", "problems", "report_lines", "try_triton"]

_OLDEST_TORCH = (2, 11)
_LEAST_DISK_GB = 1.0
_TRITON_TIMEOUT_S = 180
_PACKAGES = ("torch", "triton", "numpy", "tiktoken", "rich", "tyro", "safetensors")
_EXTRAS = ("flash-attn", "transformers", "datasets", "wandb", "tensorboard", "pytest", "pytest-benchmark")
_PEAK_DTYPES = ("bfloat16", "float16", "float32", "fp8")


@dataclass(frozen=True, kw_only=True)
class _DoctorFlags(Flags):
    """How to print the report."""

    json: bool = False
    """Print the report as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    about = "Print what this machine has, what a default run would use of it and why, and what is broken."
    flags = parse(_DoctorFlags, argv, "gptperf.doctor", about)
    set_up_threads()
    report = examine()
    report["problems"] = problems(report)
    report["exit_code"] = DeviceError.exit_code if report["problems"] else 0
    print(json.dumps(report, indent=2) if flags.json else "\n".join(report_lines(report)), flush=True)
    return int(report["exit_code"])


def examine() -> dict[str, Any]:
    """Examines the machine.

    Returns:
        A dictionary with `versions` and `extras` (both name -> version or None), `torch_error` (why torch cannot be
        imported, or None), `unmeasured` (a note on torch and triton, or None), `driver`, `gpus` (a list),
        `usable_cpus`, `disk_free_gb`, `compiler` (for torch.compile on a CPU), `compiler_problem` (why torch.compile
        cannot work, or None), `triton` (whether it works, and the reason), `choices` (what a default run would use,
        each with its reason, and the kernels by op), and `training` (see `_training`).
    """
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "gptperf": gptperf.__version__}
        | {name: _version(name) for name in _PACKAGES},
        "extras": {name: _version(name) for name in _EXTRAS},
        "driver": hardware.gpu_state().driver,
        "gpus": [],
        "usable_cpus": usable_cpus(),
        "disk_free_gb": shutil.disk_usage(".").free / 1e9,
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
        "compiler_problem": None,
        "choices": {},
        "training": {},
    }
    report["torch_error"] = _examine_torch(report)
    device_type = "cuda" if report["gpus"] else "cpu"
    report["unmeasured"] = unmeasured_versions(device_type)
    report["triton"] = _triton(device_type)
    report["compiler_problem"] = compiler_problem(device_type)
    if report["torch_error"] is None:
        report["choices"] = _choices(report, device_type)
        if report["choices"]["kernels_error"] is None:
            report["training"] = _training(report["gpus"])
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_torch(report: dict[str, Any]) -> str | None:
    """Adds what torch knows to the report; returns why torch cannot be imported, or None."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries cannot be loaded
        return str(error)
    report["versions"] |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return None
    cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()
    report["versions"] |= {"cudnn": cudnn and str(cudnn), "nccl": ".".join(map(str, nccl))}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        report["gpus"].append(_gpu_facts(properties.name, properties.total_memory / 1e9, capability))
    return None


def _gpu_facts(name: str, memory_gb: float, capability: tuple[int, int]) -> dict[str, Any]:
    """Returns what torch and the GPU table know about a GPU; `row` is None where the table does not have it."""
    gpu = hardware.match_gpu(name, memory_gb)
    bfloat16 = hardware.has_bfloat16(capability)
    peaks = {
        dtype: peak.flop_s / 1e12
        for dtype in _PEAK_DTYPES
        if (bfloat16 or dtype != "bfloat16") and (peak := hardware.peak_flop_s(gpu, dtype)) is not None
    }
    return {
        "name": name,
        "memory_gb": memory_gb,
        "capability": list(capability),
        "bfloat16": bfloat16,
        "row": gpu and gpu.name,
        "source": gpu and gpu.source,
        "dense_peak_tflops": peaks,
        "hint": None if gpu else hardware.no_peak_hint(name, SystemConfig().peak_dtype),
    }


def _triton(device_type: str) -> dict[str, Any]:
    """Finds out whether Triton works by running a kernel in another process, because the kernel may crash it."""
    if device_type != "cuda":
        return {"works": False, "reason": "not usable: Triton's kernels run on a CUDA GPU, and there is none"}
    if importlib.util.find_spec("triton") is None:
        return {"works": False, "reason": "the package triton is not installed"}
    command = [sys.executable, "-c", "from gptperf.doctor import try_triton; try_triton()"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TRITON_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"works": False, "reason": f"a kernel gave no result within {_TRITON_TIMEOUT_S} s"}
    if run.returncode == 0:
        return {"works": True, "reason": "a kernel was compiled and gave the right numbers"}
    lines = run.stderr.strip().splitlines() or ["no message"]
    return {"works": False, "reason": f"a kernel failed (exit code {run.returncode}): {lines[-1]}"}


def try_triton() -> None:
    """Compiles and runs a kernel on the GPU.

    Raises:
        DeviceError: The result is wrong. The errors of Triton are raised unchanged.
    """
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def double(X, Y, n, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
        columns = tl.arange(0, BLOCK_N)
        x = tl.load(X + columns, mask=columns < n)
        tl.store(Y + columns, 2 * x, mask=columns < n)

    x = torch.arange(100, device="cuda", dtype=torch.float32)
    y = torch.zeros_like(x)
    double[(1,)](x, y, x.numel(), BLOCK_N=128)
    if not torch.equal(y, 2 * x):
        raise DeviceError("a Triton kernel gave wrong numbers")


def _choices(report: dict[str, Any], device_type: str) -> dict[str, Any]:
    """Returns what a run with the default configuration would use, and why."""
    system, model = SystemConfig(), ModelConfig()
    if device_type == "cuda":
        device = f"cuda: {report['gpus'][0]['name']}"
        from gptperf.model import prefers_cudnn

        capability = report["gpus"][0]["capability"]
        backends = "PyTorch's order of flash, cuDNN and others"
        if prefers_cudnn(tuple(capability)):
            reason = why_not_packed(tuple(capability))
            backends = "cuDNN first, " + ("packed" if reason is None else f"not packed: {reason}")
        compiles = _choice(
            report["triton"]["works"] and report["compiler_problem"] is None,
            f"{system.compile_scope}: torch.compile through Triton",
            f"off: {report['compiler_problem'] or 'Triton does not work'}",
        )
    else:
        seen = " (a driver is installed, but this torch sees no GPU)" if report["driver"] else ""
        device = f"cpu: torch sees no CUDA GPU{seen}"
        backends = "PyTorch's attention for CPUs"
        compiles = _choice(
            report["compiler_problem"] is None,
            f"{system.compile_scope}: torch.compile through C++",
            f"off: {report['compiler_problem']}",
        )
    choices: dict[str, Any] = {
        "device": device,
        "dtype": f"{system.dtype}: the default",
        "attention": f"{model.attention_backend}: {backends}",
        "compile": compiles,
        "kernels": {},
        "kernels_error": None,
    }
    try:
        ops = resolve_ops("auto", device_type)
    except ImportError as error:
        return choices | {"kernels_error": str(error)}
    if "eager" not in ops.chosen.values():
        choices["compile"] = ALL_TRITON
    for op, implementation in ops.chosen.items():
        choices["kernels"][op] = ": ".join(filter(None, (implementation, ops.reasons.get(op))))
    return choices


def _training(gpus: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Estimates how long two configurations train here.

    Args:
        gpus: the GPUs of this machine, of which one is used.

    Returns:
        `iteration_s` and `total_s` (both configuration -> seconds, for those that can be estimated), `available_gb` (of
        memory without a GPU), and `too_much`: why GPT-2 124M is too much for this machine, or None.
    """
    import torch

    from gptperf.plan import plan, refusal, unplannable
    from gptperf.training.estimate import available_gb, estimate, slow_warning

    device = torch.device("cuda" if gpus else "cpu")
    found: dict[str, Any] = {"iteration_s": {}, "total_s": {}, "available_gb": None, "too_much": None}
    if not gpus:
        found["available_gb"] = available_gb()
    for name in ("tiny", "gpt2_124m"):
        config = command_line.resolve([name]).config
        planned = gpu = None
        if gpus:
            gpu = hardware.match_gpu(gpus[0]["name"], gpus[0]["memory_gb"])
            if gpu is None or unplannable(config, gpu) is not None:
                continue
            planned = plan(config, gpu, reported_gb=gpus[0]["memory_gb"])
        expected = estimate(config, 1, device, planned, val_tokens=[2**62])
        assert expected is not None  # every component of a shipped configuration has a card
        found["iteration_s"][name] = expected.iteration_s
        found["total_s"][name] = expected.total_s(config)
        if name == "gpt2_124m":
            found["too_much"] = slow_warning(expected, config, device)
            if planned is not None and gpu is not None and not planned.fits:
                found["too_much"] = refusal(config, gpu, planned, gpus[0]["memory_gb"])
    return found


def _choice(condition: object, yes: str, no: str) -> str:
    return yes if condition else no


def _release(version: str) -> tuple[int, ...]:
    """Returns the release of a version, such as (2, 13) for "2.13.0+cpu"."""
    return tuple(int(part) for part in version.split(".")[:2])


def problems(report: dict[str, Any]) -> list[str]:
    """Returns what prevents a run with the default configuration, each problem with its remedy."""
    found = []
    if report["torch_error"] is not None:
        found.append(f"torch cannot be imported ({report['torch_error']}); install torch >= 2.11")
    elif _release(report["versions"]["torch"]) < _OLDEST_TORCH:
        found.append(f"torch: found {report['versions']['torch']}, wanted 2.11 or newer; pip install -U torch")
    if report["gpus"] and not report["triton"]["works"]:
        remedy = "--kernels=eager --compile=False runs without it"
        found.append(f"Triton does not work: {report['triton']['reason']}; {remedy}")
    for gpu in report["gpus"]:
        if not gpu["bfloat16"]:
            found.append(f"{gpu['name']} has no bfloat16 units, and dtype = 'bfloat16' is the default; --dtype=float16")
    if report["disk_free_gb"] < _LEAST_DISK_GB:
        free = f"found {byte_text(1e9 * report['disk_free_gb'])} free in {os.getcwd()}, wanted {_LEAST_DISK_GB:.0f} GB"
        found.append(f"disk: {free}; free some, or put --out_dir and --data_dir elsewhere")
    if report["choices"].get("kernels_error"):
        found.append(f"the ops cannot be loaded: {report['choices']['kernels_error']}")
    return found


def report_lines(report: dict[str, Any]) -> list[str]:
    """Returns the lines of the report."""
    lines = ["VERSIONS"]
    lines += [_line(name, version or "not found") for name, version in report["versions"].items()]
    lines.append(_line("driver", report["driver"] or "not found"))
    lines += [] if report["unmeasured"] is None else [_line("note", report["unmeasured"])]
    extras = [f"{name} {version or '(not installed)'}" for name, version in report["extras"].items()]
    lines += [_line("extras", ", ".join(extras)), "", "HARDWARE"]
    for index, gpu in enumerate(report["gpus"]):
        lines += _gpu_lines(index, gpu)
    if not report["gpus"]:
        lines.append(_line("GPU", "none"))
    lines.append(_line("CPUs", f"{report['usable_cpus']} usable of {os.cpu_count()}"))
    lines.append(_line("disk free", f"{byte_text(1e9 * report['disk_free_gb'])} in {os.getcwd()}"))
    lines.append(_line("C++ compiler", report["compiler"] or "not found (torch.compile on a CPU needs one)"))
    lines.append(_line("Triton", report["triton"]["reason"]))
    lines += ["", "A DEFAULT RUN USES"]
    for name, choice in report["choices"].items():
        if isinstance(choice, str) and name != "kernels_error":
            lines.append(_line(name, choice))
    lines += [_line(op, choice) for op, choice in report["choices"].get("kernels", {}).items()]
    if not report["choices"]:
        lines.append(_line("nothing", "torch cannot be imported"))
    lines += _training_lines(report["training"])
    lines += ["", *(f"PROBLEM: {problem}" for problem in report["problems"])]
    return [*lines, _verdict(report)]


def _training_lines(training: dict[str, Any]) -> list[str]:
    """Returns the lines about the time that training takes here."""
    lines = ["", "EXPECTED TIME (ESTIMATED, WITHIN A FACTOR OF 2)"] if training.get("iteration_s") else []
    for name, iteration_s in training.get("iteration_s", {}).items():
        total = rough_duration(training["total_s"][name])
        lines.append(_line(name, f"{rough_duration(iteration_s)} an iteration, {total} in all"))
    if training.get("available_gb") is not None:
        lines.append(_line("memory available", f"{training['available_gb']:.1f} GB"))
    return lines


def _verdict(report: dict[str, Any]) -> str:
    count, training = len(report["problems"]), report["training"]
    if count:
        return f"VERDICT: {counted(count, 'problem')}"
    if training.get("too_much") is not None:
        return f"VERDICT: ready to train tiny models (make train), but not GPT-2 124M: {training['too_much']}"
    if "gpt2_124m" in training.get("iteration_s", {}):
        return "VERDICT: ready to train GPT-2 124M"
    return "VERDICT: ready to train"


def _gpu_lines(index: int, gpu: dict[str, Any]) -> list[str]:
    major, minor = gpu["capability"]
    lines = [
        _line(f"GPU {index}", f"{gpu['name']}, {byte_text(1e9 * gpu['memory_gb'])}, compute capability {major}.{minor}")
    ]
    if gpu["row"] is None:
        return [*lines, _line("", gpu["hint"])]
    peaks = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu["dense_peak_tflops"].items())
    return [*lines, _line("", f"dense peak in TFLOPS: {peaks} ({gpu['row']}: {gpu['source']})")]


def _line(name: str, value: object) -> str:
    return f"  {name:<22} {value}"


if __name__ == "__main__":
    run_main(main)
