"""Which GPU this is, what it can do at most, and in what state it is: power cap, clocks, temperature.

`python -m gptperf.hardware` prints the table of `gptperf.gpus` and marks the GPUs of this machine; with `--measure
[CONFIG.toml ...] [--key=value ...]` it measures what this card reaches (`gptperf.ceilings`). An unknown GPU has no peak
and no MFU, never those of another one. No torch here.
"""

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gptperf.errors import ConfigError, DeviceError, main_guard
from gptperf.gpus import DOCUMENTS, GPUS, Gpu

__all__ = ["BASES", "GPUS", "Gpu", "Peak", "has_bfloat16", "match_gpu", "no_peak_hint", "peak_flop_s"]
__all__ += ["GpuState", "gpu_state", "gpu_states", "main"]

Basis = Literal["dense", "sparse"]
BASES: tuple[Basis, ...] = ("dense", "sparse")

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32", "fp8": "fp8"}
_BRANDS = {"NVIDIA", "TESLA", "GEFORCE"}
# CUDA reports up to 7% more than the name says (its GB are GiB less the driver's share); ECC takes up to 6%.
_MEMORY_TOLERANCE = 0.15
_BFLOAT16_CAPABILITY = (8, 0)
_SMI_TIMEOUT_S = 30


class Peak(NamedTuple):
    """What MFU is taken against."""

    flop_s: float
    basis: str
    """dense, sparse, or given (by the user)."""
    source: str


def _words(name: str) -> tuple[str, ...]:
    words = re.split(r"[^0-9A-Z]+", name.upper())
    return tuple(word for word in words if word and word not in _BRANDS)


_ROWS = {_words(cuda_name): gpu for gpu in GPUS for cuda_name in gpu.cuda_names}


def match_gpu(device_name: str, memory_gb: float | None = None) -> Gpu | None:
    """The row of a device, or None: a card that is only named alike (RTX A1000, H20, a MIG slice) has no row.

    Args:
        device_name: as `torch.cuda.get_device_name()` or nvidia-smi gives it, "NVIDIA H100 80GB HBM3".
        memory_gb: memory that CUDA reports (1e9 bytes); where it is not the row's, the device is a slice
            of that card or another one.
    """
    gpu = _ROWS.get(_words(device_name))
    if gpu is not None and memory_gb is not None and abs(memory_gb / gpu.memory_gb - 1) > _MEMORY_TOLERANCE:
        return None
    return gpu


def has_bfloat16(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability have bfloat16 units (Ampere and later)."""
    return capability >= _BFLOAT16_CAPABILITY


def peak_flop_s(
    gpu: Gpu | None, dtype: str, *, basis: Basis = "dense", peak_tflops: float | None = None
) -> Peak | None:
    """Peak of one GPU in a compute dtype, or None when it is not known (`no_peak_hint` says what to do then).

    Args:
        gpu: from `match_gpu`.
        dtype: bfloat16, float16, float32, tf32 or fp8.
        basis: column of the table.
        peak_tflops: the user's own figure, which goes before the table's.

    Raises:
        DeviceError: bfloat16 on a GPU without it.
        ValueError: unknown dtype or basis.
    """
    if dtype not in _SHORT:
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(_SHORT)}")
    if basis not in BASES:
        raise ValueError(f"peak_basis: found {basis!r}, wanted one of {', '.join(BASES)}")
    if gpu is not None and dtype == "bfloat16" and not has_bfloat16(gpu.capability):
        raise DeviceError(f"dtype = 'bfloat16': {gpu.name} has no bfloat16 units; nearest: --dtype=float16")
    if peak_tflops is not None:
        return Peak(peak_tflops * 1e12, "given", f"{peak_tflops:,.1f} TFLOPS (given by --peak_tflops)")
    rates = {} if gpu is None else gpu.dense_tflops if basis == "dense" else gpu.sparse_tflops
    if gpu is None or dtype not in rates:
        return None
    return Peak(rates[dtype] * 1e12, basis, f"{rates[dtype]:,.1f} TFLOPS ({gpu.name} {_SHORT[dtype]}, {basis})")


def no_peak_hint(device_name: str, dtype: str, basis: Basis = "dense") -> str:
    """One line for a device whose peak is not known."""
    known = f"no {basis} {_SHORT[dtype]} peak is known for {device_name}, so no MFU"
    return f"{known}; give it in TFLOP/s with --peak_tflops=X"


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """A GPU as its driver sees it now; None is what the driver does not tell."""

    name: str | None = None
    memory_gb: float | None = None
    power_cap_w: float | None = None
    power_default_w: float | None = None
    power_draw_w: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    driver: str | None = None
    via: str | None = None
    """pynvml or nvidia-smi; None where neither answered."""
    reason: str | None = None
    """Why there is no state."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def note(self) -> str | None:
        """One line where the card is kept below its default power, or None."""
        if self.power_cap_w is None or self.power_default_w is None or self.power_cap_w >= self.power_default_w:
            return None
        watts = f"the power cap of {self.power_cap_w:.0f} W is below the card's default of {self.power_default_w:.0f} W"
        return f"{watts}: the peak of its data sheet cannot be reached"

    def __str__(self) -> str:
        if self.reason is not None:
            return self.reason
        power = f"power {_of(self.power_draw_w)} W, cap {_of(self.power_cap_w)} of {_of(self.power_default_w)} W"
        clocks = (
            f"SM {_of(self.sm_clock_mhz)} of {_of(self.max_sm_clock_mhz)} MHz, memory {_of(self.mem_clock_mhz)} MHz"
        )
        return f"{power}; {clocks}; {_of(self.temperature_c)} C; driver {self.driver or '?'}"


def _of(figure: float | None) -> str:
    return "?" if figure is None else f"{figure:.0f}"


def gpu_state(device: int | str = 0) -> GpuState:
    """Power, clocks and temperature of one GPU, through NVML (package nvidia-ml-py) or else nvidia-smi.

    Args:
        device: the driver's index, or better the UUID ("GPU-...", from torch f"GPU-{properties.uuid}"):
            CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not the driver's.

    Returns:
        The state, or one whose `reason` says why nothing is known.
    """
    states, reason = _ask(device)
    return states[0] if states else GpuState(reason=reason)


def gpu_states() -> tuple[list[GpuState], str | None]:
    """All GPUs of this machine in the driver's order, and why there are none."""
    states, reason = _ask(None)
    return states, None if states else reason


def _ask(device: int | str | None) -> tuple[list[GpuState], str]:
    """The states of one device or of all, from the first way that answers, and why the others did not."""
    reasons = []
    for ask in (_ask_nvml, _ask_nvidia_smi):
        try:
            return ask(device), ""
        except DeviceError as error:
            reasons.append(str(error))
    return [], "; ".join(reasons)


def _ask_nvml(device: int | str | None) -> list[GpuState]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        raise DeviceError("the package nvidia-ml-py is not installed") from error
    try:
        nvml.nvmlInit()
        try:
            if device is None:
                handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            elif isinstance(device, int):
                handles = [nvml.nvmlDeviceGetHandleByIndex(device)]
            else:
                handles = [nvml.nvmlDeviceGetHandleByUUID(device)]
            if not handles:
                raise DeviceError("NVML sees no GPU")
            return [_nvml_state(nvml, handle) for handle in handles]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML: {error}") from error


def _nvml_state(nvml: Any, handle: Any) -> GpuState:
    def figure(read: Callable[..., Any], *arguments: Any, scale: float = 1) -> float | None:
        try:
            return float(read(*arguments)) / scale
        except nvml.NVMLError:  # this card does not tell this figure
            return None

    def text(read: Callable[..., Any], *arguments: Any) -> str:
        value = read(*arguments)
        return value.decode() if isinstance(value, bytes) else str(value)

    return GpuState(
        name=text(nvml.nvmlDeviceGetName, handle),
        memory_gb=figure(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total, scale=1e9),
        power_cap_w=figure(nvml.nvmlDeviceGetPowerManagementLimit, handle, scale=1e3),
        power_default_w=figure(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle, scale=1e3),
        power_draw_w=figure(nvml.nvmlDeviceGetPowerUsage, handle, scale=1e3),
        sm_clock_mhz=figure(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        mem_clock_mhz=figure(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        max_sm_clock_mhz=figure(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        temperature_c=figure(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        driver=text(nvml.nvmlSystemGetDriverVersion),
        via="pynvml",
    )


_SMI_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_gb": "memory.total",
    "power_cap_w": "power.limit",
    "power_default_w": "power.default_limit",
    "power_draw_w": "power.draw",
    "sm_clock_mhz": "clocks.sm",
    "mem_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "temperature_c": "temperature.gpu",
}


def _ask_nvidia_smi(device: int | str | None) -> list[GpuState]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    command += [] if device is None else [f"--id={device}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except OSError as error:
        raise DeviceError("nvidia-smi is not there") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"nvidia-smi gave no answer within {_SMI_TIMEOUT_S} s") from error
    lines = (run.stdout if run.returncode == 0 else run.stdout + run.stderr).strip().splitlines()
    if run.returncode != 0:
        said = lines[0] if lines else "no message"
        raise DeviceError(f"nvidia-smi failed (exit code {run.returncode}): {said}")
    if not lines:
        raise DeviceError("nvidia-smi sees no GPU")
    return [_smi_state(line) for line in lines]


def _smi_state(line: str) -> GpuState:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_SMI_FIELDS):
        raise DeviceError(f"nvidia-smi: found {line!r}, wanted {len(_SMI_FIELDS)} figures")
    told = {key: value for key, value in zip(_SMI_FIELDS, values, strict=True) if not value.startswith("[")}
    figures: dict[str, Any] = {}
    for key, value in told.items():
        try:
            figures[key] = value if key in ("name", "driver") else float(value)
        except ValueError:
            continue  # "N/A": this card does not tell this figure
    if "memory_gb" in figures:
        figures["memory_gb"] *= 2**20 / 1e9  # of MiB
    return GpuState(**figures, via="nvidia-smi")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or measure this card's ceilings."""
    parser = argparse.ArgumentParser(
        prog="python -m gptperf.hardware",
        description="Print the GPU table and the state of this machine's GPUs, or measure what this GPU reaches.",
        epilog="With --measure: [CONFIG.toml ...] [--key=value ...] name the model, batch_size and dtype.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", action="store_true", help="copy, GEMM and attention ceilings, kept in a cache")
    parser.add_argument("--again", action="store_true", help="with --measure: measure even where the cache has them")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.measure:
        from gptperf import ceilings

        return ceilings.command(rest, as_json=arguments.json, again=arguments.again)
    if rest or arguments.again:
        found = " ".join(rest) or "--again"
        raise ConfigError(f"command line: found {found!r} without --measure; nearest: --measure {found}")
    states, reason = gpu_states()
    report = _report(states, reason)
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(_lines(report, states)), flush=True)
    return 0


def _report(states: Sequence[GpuState], reason: str | None) -> dict[str, Any]:
    rows = [match_gpu(state.name or "", state.memory_gb) for state in states]
    here = [state.as_dict() | {"row": row and row.name} for state, row in zip(states, rows, strict=True)]
    table = [dataclasses.asdict(gpu) | {"here": gpu in rows} for gpu in GPUS]
    return {"table": table, "documents": DOCUMENTS, "this_machine": here, "reason": reason}


def _lines(report: dict[str, Any], states: Sequence[GpuState]) -> Iterator[str]:
    yield f"{'':<19}{'dense TFLOP/s':^40}{'sparse':>8}{'memory':>8}{'bandwidth':>11}"
    dtypes = "".join(f"{dtype:>8}" for dtype in ("bf16", "fp16", "tf32", "fp32", "fp8", "bf16"))
    yield f"  {'GPU':<17}{dtypes}{'GB':>8}{'TB/s':>11}  source"
    for gpu, row in zip(GPUS, report["table"], strict=True):
        rates = [gpu.dense_tflops.get(dtype) for dtype in ("bfloat16", "float16", "tf32", "float32", "fp8")]
        rates.append(gpu.sparse_tflops.get("bfloat16"))
        figures = "".join(f"{'-' if rate is None else f'{rate:g}':>8}" for rate in rates)
        mark = "*" if row["here"] else " "
        yield f"{mark} {gpu.name:<17}{figures}{gpu.memory_gb:>8g}{gpu.hbm_byte_s / 1e12:>11.3f}  {gpu.source}"
    yield ""
    for index, (state, here) in enumerate(zip(states, report["this_machine"], strict=True)):
        yield f"{'*' if here['row'] else ' '} GPU {index}: {state.name}; {state}"
        if here["row"] is None:
            yield f"    {no_peak_hint(state.name or 'this GPU', 'bfloat16')}"
        note = state.note()
        if note is not None:
            yield f"    {note}"
    if not states:
        yield f"No GPU is seen here: {report['reason']}."


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
