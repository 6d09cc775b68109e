"""The state of the GPUs as the driver reports it, and the command that prints it beside the GPU table."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gptperf import hardware
from gptperf.errors import ConfigError
from gptperf.hardware import state as state_of_gpus
from gptperf.hardware.__main__ import main

SMI_LINE = "NVIDIA H200, 575.57.08, 143771, 500.00, 700.00, 118.42, 345, 3201, 1980, 31"
H200_STATE = hardware.GpuState(
    name="NVIDIA H200",
    memory_gb=143771 * 2**20 / 1e9,
    power_cap_w=500.0,
    power_default_w=700.0,
    power_draw_w=118.42,
    sm_clock_mhz=345.0,
    mem_clock_mhz=3201.0,
    max_sm_clock_mhz=1980.0,
    temperature_c=31.0,
    driver="575.57.08",
    via="nvidia-smi",
)


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi alone on the PATH, and no pynvml."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_state_through_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, f"echo \"$@\" > {tmp_path}/asked\necho '{SMI_LINE}'")
    assert hardware.gpu_state("GPU-1234") == H200_STATE
    asked = (tmp_path / "asked").read_text().split()
    assert "--id=GPU-1234" in asked
    assert "--format=csv,noheader,nounits" in asked
    assert hardware.gpu_states() == ([H200_STATE], None)
    assert "--id" not in (tmp_path / "asked").read_text()


def test_a_figure_that_is_not_told_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA GB10, 580.95.05, [N/A], [Not Supported], N/A, 12.3, 2418, [N/A], 3003, 40"
    fake_smi(tmp_path, monkeypatch, f"echo '{line}'")
    state = hardware.gpu_state()
    assert (state.memory_gb, state.power_cap_w, state.power_default_w, state.mem_clock_mhz) == (None,) * 4
    assert (state.power_draw_w, state.sm_clock_mhz, state.driver) == (12.3, 2418.0, "580.95.05")
    assert state.note() is None
    assert "cap ? of ? W" in str(state)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'No devices were found'; exit 6", "exit code 6.: No devices were found"),
        ("echo 'H200, 1, 2'", "found 'H200, 1, 2', wanted 10 figures"),
        ("exit 0", "nvidia-smi sees no GPU"),
        ("exec /bin/sleep 20", "no answer within 0.2 s"),
    ],
)
def test_no_state_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    monkeypatch.setattr(state_of_gpus, "_SMI_TIMEOUT_S", 0.2)
    fake_smi(tmp_path, monkeypatch, script)
    state = hardware.gpu_state()
    assert state == hardware.GpuState(reason=state.reason)
    assert state.reason is not None
    assert re.search(reason, state.reason), state.reason
    assert "nvidia-ml-py is not installed" in state.reason
    assert hardware.gpu_states() == ([], state.reason)


def fake_nvml(**changed: Any) -> types.ModuleType:
    """A pynvml with one H200."""

    class NVMLError(Exception):
        pass

    def fails(*_: Any) -> None:
        raise NVMLError("Not Supported")

    module: Any = types.ModuleType("pynvml")
    module.NVMLError, module.calls = NVMLError, []
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlInit = lambda: module.calls.append("init")
    module.nvmlShutdown = lambda: module.calls.append("shutdown")
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: {0: "h200"}[index]
    module.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1234": "h200"}[uuid]
    module.nvmlDeviceGetName = lambda handle: b"NVIDIA H200"
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=143771 * 2**20)
    module.nvmlDeviceGetPowerManagementLimit = lambda handle: 500_000
    module.nvmlDeviceGetPowerManagementDefaultLimit = lambda handle: 700_000
    module.nvmlDeviceGetPowerUsage = lambda handle: 118_420
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 345, 2: 3201}[kind]
    module.nvmlDeviceGetMaxClockInfo = lambda handle, kind: {1: 1980}[kind]
    module.nvmlDeviceGetTemperature = lambda handle, kind: 31
    module.nvmlSystemGetDriverVersion = lambda: "575.57.08"
    for name, value in changed.items():
        setattr(module, name, fails if value is None else value)
    return module


@pytest.mark.parametrize("device", [0, "GPU-1234"])
def test_state_through_nvml_is_that_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, device: int | str) -> None:
    nvml: Any = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = hardware.gpu_state(device)
    assert state.as_dict() == H200_STATE.as_dict() | {"via": "pynvml"}
    assert nvml.calls == ["init", "shutdown"]


def test_nvml_without_a_figure_and_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetPowerManagementDefaultLimit=None))
    state = hardware.gpu_state()
    assert (state.power_default_w, state.power_cap_w, state.via) == (None, 500.0, "pynvml")
    fake_smi(tmp_path, monkeypatch, f"echo '{SMI_LINE}'")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=None))
    assert hardware.gpu_state().via == "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert hardware.gpu_state().reason == "NVML: Not Supported; nvidia-smi is not installed"


def test_a_lowered_power_cap_is_noted() -> None:
    assert H200_STATE.note() == (
        "the power cap of 500 W is below the card's default of 700 W: the peak of its data sheet cannot be reached"
    )
    assert hardware.GpuState(power_cap_w=700.0, power_default_w=700.0).note() is None


def test_the_table_marks_this_machines_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = SMI_LINE.replace("NVIDIA H200", "NVIDIA GB10")
    fake_smi(tmp_path, monkeypatch, f"echo '{SMI_LINE}'\necho '{unknown}'")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*") and "TFLOP" not in line] == ["H200", "GPU"]
    row = next(line for line in lines if line.startswith("* H200")).split()
    assert row[2:10] == ["989.4", "989.4", "494.7", "66.9", "1978.9", "1979", "141", "4.800"]
    assert any("power cap of 500 W" in line for line in lines)
    assert any("no dense bf16 peak is known for NVIDIA GB10" in line and "--peak_tflops" in line for line in lines)
    assert all(any(f" {gpu.name} " in line for line in lines) for gpu in hardware.GPUS)
    main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["table"] if row["here"]] == ["H200"]
    assert [gpu["row"] for gpu in report["this_machine"]] == ["H200", None]


def test_the_table_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main([]) == 0
    assert "No GPU was found: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"found 'configs/tiny.toml' without --measure"):
        main(["configs/tiny.toml"])
