"""Reads the state of this machine's GPUs: power cap, clocks, temperature. Loads no torch."""

import dataclasses
import importlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptperf.errors import DeviceError

__all__ = ["GpuState", "gpu_state", "gpu_states"]

_SMI_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """The current state of a GPU as its driver reports it. Figures that the driver does not report are None."""

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
    """The source of the state, pynvml or nvidia-smi, or None if neither reported it."""
    reason: str | None = None
    """Why no source reported the state."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, for JSON."""
        return dataclasses.asdict(self)

    def note(self) -> str | None:
        """Returns a warning if the power cap is below the GPU's default, else None."""
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
    """Returns power, clocks and temperature of one GPU, from NVML (package nvidia-ml-py) or else nvidia-smi.

    Args:
        device: the driver's index, or better the UUID ("GPU-...", in torch f"GPU-{properties.uuid}"), because
            CUDA_VISIBLE_DEVICES renumbers CUDA's devices but not the driver's.

    Returns:
        The state. If neither source reports it, all fields except `reason` are None.
    """
    states, reason = _ask(device)
    return states[0] if states else GpuState(reason=reason)


def gpu_states() -> tuple[list[GpuState], str | None]:
    """Returns the states of all GPUs of this machine in the driver's order, and why there are none."""
    states, reason = _ask(None)
    return states, None if states else reason


def _ask(device: int | str | None) -> tuple[list[GpuState], str]:
    """Returns the states of one device, or of all for None, from the first source that answers, and why none did."""
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
        except nvml.NVMLError:  # the card does not report this figure
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
        raise DeviceError("nvidia-smi is not installed") from error
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
    reported = {key: value for key, value in zip(_SMI_FIELDS, values, strict=True) if not value.startswith("[")}
    figures: dict[str, Any] = {}
    for key, value in reported.items():
        try:
            figures[key] = value if key in ("name", "driver") else float(value)
        except ValueError:
            continue  # "N/A": the card does not report this figure
    if "memory_gb" in figures:
        figures["memory_gb"] *= 2**20 / 1e9  # nvidia-smi reports MiB
    return GpuState(**figures, via="nvidia-smi")
