"""Examines this machine: `python -m gptperf.doctor` prints what it has, what a default run would use, and problems.

The exit code is 0, or 6 when something that a default run needs is missing or broken.
"""

import argparse
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
from typing import Any

import gptperf
from gptperf import hardware
from gptperf.config import ModelConfig, SystemConfig
from gptperf.errors import DeviceError, main_guard
from gptperf.hardware.compiler import compiler_problem
from gptperf.hardware.cpu import set_up_threads, usable_cpus
from gptperf.ops import resolve_ops, unmeasured_versions

__all__ = ["examine", "main", "problems", "report_lines", "try_triton"]

_OLDEST_TORCH = (2, 11)
_LEAST_DISK_GB = 1.0
_TRITON_TIMEOUT_S = 180
_PACKAGES = ("torch", "triton", "numpy", "tiktoken", "rich", "tyro", "safetensors")
_EXTRAS = ("flash-attn", "transformers", "datasets", "wandb", "tensorboard", "pytest", "pytest-benchmark")
_PEAK_DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    description = "Print what this machine has, what a default run would use of it and why, and what is broken."
    parser = argparse.ArgumentParser(prog="python -m gptperf.doctor", description=description)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    set_up_threads()
    report = examine()
    report["problems"] = problems(report)
    report["exit_code"] = DeviceError.exit_code if report["problems"] else 0
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(report_lines(report)), flush=True)
    return int(report["exit_code"])


def examine() -> dict[str, Any]:
    """Examines the machine.

    Returns:
        A dictionary with `versions` and `extras` (both name -> version or None), `torch_error` (why torch cannot be
        imported, or None), `unmeasured` (a note on torch and triton, or None), `driver`, `gpus` (a list),
        `usable_cpus`, `disk_free_gb`, `compiler` (for torch.compile on a CPU), `compiler_problem` (why torch.compile
        cannot work, or None), `triton` (whether it works, and the reason), and `choices` (what a default run would
        use, each with its reason, and the kernels by op).
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
    }
    report["torch_error"] = _examine_torch(report)
    device_type = "cuda" if report["gpus"] else "cpu"
    report["unmeasured"] = unmeasured_versions(device_type)
    report["triton"] = _triton(device_type)
    report["compiler_problem"] = compiler_problem(device_type)
    if report["torch_error"] is None:
        report["choices"] = _choices(report, device_type)
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
        backends = "cuDNN first" if prefers_cudnn(tuple(capability)) else "PyTorch's order of flash, cuDNN and others"
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
    for op, implementation in ops.chosen.items():
        choices["kernels"][op] = ": ".join(filter(None, (implementation, ops.reasons.get(op))))
    return choices


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
        free = f"found {report['disk_free_gb']:.2f} GB free in {os.getcwd()}, wanted {_LEAST_DISK_GB:.0f} GB"
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
    lines.append(_line("disk free", f"{report['disk_free_gb']:.1f} GB in {os.getcwd()}"))
    lines.append(_line("C++ compiler", report["compiler"] or "not found (torch.compile on a CPU needs one)"))
    lines.append(_line("Triton", report["triton"]["reason"]))
    lines += ["", "A DEFAULT RUN USES"]
    for name, choice in report["choices"].items():
        if isinstance(choice, str) and name != "kernels_error":
            lines.append(_line(name, choice))
    lines += [_line(op, choice) for op, choice in report["choices"].get("kernels", {}).items()]
    if not report["choices"]:
        lines.append(_line("nothing", "torch cannot be imported"))
    lines += ["", *(f"PROBLEM: {problem}" for problem in report["problems"])]
    count = len(report["problems"])
    return [
        *lines,
        f"VERDICT: {count} problem{'s' if count > 1 else ''}" if count else "VERDICT: ready to train",
    ]


def _gpu_lines(index: int, gpu: dict[str, Any]) -> list[str]:
    major, minor = gpu["capability"]
    lines = [_line(f"GPU {index}", f"{gpu['name']}, {gpu['memory_gb']:.1f} GB, compute capability {major}.{minor}")]
    if gpu["row"] is None:
        return [*lines, _line("", gpu["hint"])]
    peaks = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu["dense_peak_tflops"].items())
    return [*lines, _line("", f"dense peak in TFLOPS: {peaks} ({gpu['row']}: {gpu['source']})")]


def _line(name: str, value: object) -> str:
    return f"  {name:<22} {value}"


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
