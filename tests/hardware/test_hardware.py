"""The GPU table: whom it knows, whom it must not take for another, and what MFU is made of."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gptperf import flops, hardware
from gptperf.config import ModelConfig
from gptperf.errors import ConfigError, DeviceError
from gptperf.hardware import peaks
from gptperf.hardware import state as state_of_gpus
from gptperf.hardware.__main__ import main
from gptperf.hardware.gpu_table import DOCUMENTS
from gptperf.monitor.memory import memory_record
from gptperf.monitor.throughput import Throughput, theoretical

# Device names as CUDA and nvidia-smi give them, the row each belongs to, and the memory that CUDA reports (1e9 bytes).
KNOWN = {
    "Tesla V100-SXM2-16GB": ("V100 SXM2 16 GB", 16.9),
    "Tesla V100-SXM2-32GB": ("V100 SXM2 32 GB", 34.1),
    "Tesla V100-PCIE-16GB": ("V100 PCIe 16 GB", 16.9),
    "Tesla V100-PCIE-32GB": ("V100 PCIe 32 GB", 34.1),
    "NVIDIA A100-SXM4-40GB": ("A100 SXM 40 GB", 42.4),
    "NVIDIA A100-SXM4-80GB": ("A100 SXM 80 GB", 85.1),
    "A100-SXM4-40GB": ("A100 SXM 40 GB", 42.4),
    "A100-SXM-80GB": ("A100 SXM 80 GB", 85.2),
    "NVIDIA A100-PCIE-40GB": ("A100 PCIe 40 GB", 42.4),
    "A100-PCIE-40GB": ("A100 PCIe 40 GB", 42.4),
    "NVIDIA A100 80GB PCIe": ("A100 PCIe 80 GB", 85.1),
    "NVIDIA H100 80GB HBM3": ("H100", 85.0),
    "NVIDIA H100 PCIe": ("H100 PCIe", 85.0),
    "NVIDIA H100 NVL": ("H100 NVL", 100.0),
    "NVIDIA H200": ("H200", 150.1),
    "NVIDIA H200 NVL": ("H200 NVL", 150.1),
    "NVIDIA GH200 480GB": ("GH200 96 GB", 101.5),
    "NVIDIA GH200 120GB": ("GH200 96 GB", 101.5),
    "NVIDIA GH200 144G HBM3e": ("GH200 144 GB", 153.0),
    "NVIDIA B200": ("B200", 191.5),
    "NVIDIA GB200": ("GB200", 198.0),
    "NVIDIA B300 SXM6 AC": ("B300", 288.0),
    "NVIDIA GB300": ("GB300", 298.0),
    "NVIDIA L40S": ("L40S", 47.7),
    "NVIDIA L4": ("L4", 23.6),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 25.4),
    "GeForce RTX 4090": ("RTX 4090", 25.4),
    "NVIDIA GeForce RTX 5090": ("RTX 5090", 33.7),
    "NVIDIA RTX 6000 Ada Generation": ("RTX 6000 Ada", 51.0),
}
# Real names, all but the empty ones, that a search for a known name inside them, or the first word of them, takes for
# another card.
ALIKE = [
    "Tesla V100-SXM3-32GB",
    "Tesla V100-SXM3-32GB-H",
    "Tesla V100-SXM2-32GB-LS",
    "Tesla V100-DGXS-16GB",
    "Tesla V100-DGXS-32GB",
    "Tesla V100-FHHL-16GB",
    "Tesla V100S-PCIE-32GB",
    "GRID V100-4C",
    "NVIDIA A100",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "GRID A100D-20C",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA A800 80GB PCIe",
    "NVIDIA A2",
    "NVIDIA A10",
    "NVIDIA A10G",
    "NVIDIA A10M",
    "NVIDIA A16",
    "NVIDIA A30",
    "NVIDIA A40",
    "NVIDIA RTX A1000",
    "NVIDIA RTX A1000 6GB Laptop GPU",
    "NVIDIA RTX A6000",
    "NVIDIA DGX Display",
    "NVIDIA H100",
    "NVIDIA H100 96GB HBM3",
    "NVIDIA H100 64GB HBM2",
    "NVIDIA H100 80GB HBM2e",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100 PCIe MIG 2g.20gb",
    "NVIDIA H200 MIG 1g.18gb",
    "NVIDIA H20",
    "NVIDIA H20-3e",
    "NVIDIA H20 NVL16",
    "NVIDIA H800",
    "NVIDIA H800 PCIe",
    "NVIDIA H800 NVL",
    "NVIDIA B200 MIG 1g.23gb",
    "NVIDIA GB10",
    "NVIDIA L2",
    "NVIDIA L20",
    "NVIDIA L40",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 D v2",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA RTX 6000",
    "NVIDIA RTX 6000D",
    "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "NVIDIA RTX 5000 Ada Generation",
    "NVIDIA RTX 5880 Ada Generation",
    "Tesla T4",
    "AMD Instinct MI300X",
    "NVIDIA",
    "",
]
BF16 = [
    ("NVIDIA H200", "dense", 989.4),
    ("NVIDIA H200", "sparse", 1979),
    ("NVIDIA B200", "dense", 2250),
    ("NVIDIA B200", "sparse", 4500),
    ("NVIDIA GB200", "dense", 2500),
    ("NVIDIA B300 SXM6 AC", "dense", 2250),
    ("NVIDIA GeForce RTX 4090", "dense", 165.2),
    ("NVIDIA GeForce RTX 5090", "dense", 209.5),
    ("NVIDIA RTX 6000 Ada Generation", "dense", 364.2),
    ("NVIDIA L4", "sparse", 242),
    ("NVIDIA A100-SXM4-40GB", "dense", 312),
    ("NVIDIA H100 80GB HBM3", "dense", 989.4),
    ("NVIDIA H100 PCIe", "dense", 756),
    ("NVIDIA H100 NVL", "dense", 835),
]


@pytest.mark.parametrize("device_name", KNOWN)
def test_known_cards_with_and_without_memory(device_name: str) -> None:
    name, memory_gb = KNOWN[device_name]
    for gpu in (hardware.match_gpu(device_name), hardware.match_gpu(device_name, memory_gb)):
        assert gpu is not None
        assert gpu.name == name


@pytest.mark.parametrize("device_name", ALIKE)
def test_cards_named_alike_have_no_row(device_name: str) -> None:
    assert hardware.match_gpu(device_name) is None


def test_a_slice_of_a_card_is_not_the_card() -> None:
    assert hardware.match_gpu("NVIDIA H200", memory_gb=18) is None
    assert hardware.match_gpu("Tesla V100-SXM2-32GB", memory_gb=16.9) is None


@pytest.mark.parametrize(("device_name", "basis", "tflops"), BF16)
def test_bf16_peaks(device_name: str, basis: Any, tflops: float) -> None:
    peak = hardware.peak_flop_s(hardware.match_gpu(device_name), "bfloat16", basis=basis)
    assert peak is not None
    assert peak.flop_s == pytest.approx(tflops * 1e12)
    assert peak.basis == basis


def test_every_row_is_whole_and_sparse_is_twice_dense() -> None:
    for gpu in hardware.GPUS:
        assert {"float16", "float32"} <= gpu.dense_tflops.keys(), gpu.name
        assert ("bfloat16" in gpu.dense_tflops) == hardware.has_bfloat16(gpu.capability), gpu.name
        assert gpu.source.startswith("NVIDIA "), gpu.name
        assert gpu.sources.keys() == {"dense", "memory", "bandwidth"} | ({"sparse"} if gpu.sparse_tflops else set())
        assert set(gpu.sources.values()) <= {*DOCUMENTS, "half of sparse"}, gpu.name
        assert gpu.sources["memory"] in DOCUMENTS
        assert 2e11 < gpu.hbm_byte_s < 1e13, gpu.name
        assert "float32" not in gpu.sparse_tflops
        for dtype, sparse in gpu.sparse_tflops.items():
            # L40S's data sheet prints 362.05 beside 733.
            assert sparse / gpu.dense_tflops[dtype] == pytest.approx(2, rel=0.015), (gpu.name, dtype)
    names = [name for gpu in hardware.GPUS for name in gpu.cuda_names]
    assert len({peaks._words(name) for name in names}) == len(names)
    assert {document for gpu in hardware.GPUS for document in gpu.sources.values()} >= DOCUMENTS.keys()


def test_rows_keep_the_ratios_of_their_tensor_cores() -> None:
    """TF32 runs at half of the rate of bfloat16, FP8 at twice; float32 needs no tensor core and is slower than both."""
    for gpu in hardware.GPUS:
        for rates in (gpu.dense_tflops, gpu.sparse_tflops):
            if "tf32" in rates:
                assert rates["bfloat16"] / rates["tf32"] == pytest.approx(2, rel=0.02), gpu.name
            if "fp8" in rates:
                assert rates["fp8"] / rates["bfloat16"] == pytest.approx(2, rel=0.015 if gpu.name == "L40S" else 0.005)
        assert gpu.dense_tflops["float32"] < gpu.dense_tflops["float16"]
        assert ("fp8" in gpu.dense_tflops) == (gpu.capability >= (8, 9)), gpu.name


def test_a_longer_name_is_another_card() -> None:
    for device_name in KNOWN:
        assert hardware.match_gpu(device_name + " X") is None
        assert hardware.match_gpu(device_name + "X") is None
    assert len(KNOWN) + len(ALIKE) >= 40


def test_source_line() -> None:
    peak = hardware.peak_flop_s(hardware.match_gpu("NVIDIA H200"), "bfloat16")
    assert peak is not None
    assert peak.source == "989.4 TFLOPS (H200 bf16, dense)"


def test_float32_is_not_tf32() -> None:
    peak = hardware.peak_flop_s(hardware.match_gpu("NVIDIA A100-SXM4-80GB"), "float32")
    assert peak is not None
    assert peak.flop_s == pytest.approx(19.5e12)


def test_v100() -> None:
    sxm2, pcie = hardware.match_gpu("Tesla V100-SXM2-16GB"), hardware.match_gpu("Tesla V100-PCIE-32GB")
    for gpu, tflops in ((sxm2, 125), (pcie, 112)):
        peak = hardware.peak_flop_s(gpu, "float16")
        assert peak is not None
        assert peak.flop_s == tflops * 1e12
    with pytest.raises(DeviceError, match="V100 SXM2 16 GB has no bfloat16 units; nearest: --dtype=float16"):
        hardware.peak_flop_s(sxm2, "bfloat16", peak_tflops=125)


def test_no_peak_is_said_and_never_guessed() -> None:
    assert hardware.peak_flop_s(None, "bfloat16") is None
    assert hardware.peak_flop_s(hardware.match_gpu("NVIDIA H200"), "float32", basis="sparse") is None
    assert "--peak_tflops=X" in hardware.no_peak_hint("NVIDIA H20", "bfloat16")
    given = hardware.peak_flop_s(None, "bfloat16", peak_tflops=148)
    assert given is not None
    assert (given.flop_s, given.basis) == (148e12, "given")


def test_the_users_peak_goes_before_the_tables() -> None:
    given = hardware.peak_flop_s(hardware.match_gpu("NVIDIA H200"), "bfloat16", peak_tflops=800)
    assert given is not None
    assert given.flop_s == 800e12


def test_wrong_names_are_errors() -> None:
    with pytest.raises(ValueError, match="found 'bf16', wanted one of bfloat16"):
        hardware.peak_flop_s(None, "bf16")
    with pytest.raises(ValueError, match="found 'spares', wanted one of dense, sparse"):
        hardware.peak_flop_s(None, "bfloat16", basis="spares")  # type: ignore[arg-type]


def test_throughput_record() -> None:
    peak = hardware.Peak(1000e12, "dense", "")
    # 0.798087168 GFLOP/token x 491,520 tokens in 1 s over 2 GPUs of 1000 TFLOP/s.
    throughput = Throughput(ModelConfig(), 491_520, 2, peak)
    record = throughput.record(1000.0)
    assert record["tokens_per_sec"] == pytest.approx(491_520)
    assert record["flops_per_token"] == 798_087_168
    assert record["achieved_tflops"] == pytest.approx(196.137902)
    assert record["mfu_percent"] == pytest.approx(19.6137902)
    assert record["hardware_peak_tflops"] == 1000
    assert (record["convention"], record["peak_basis"]) == ("strict", "dense")
    assert throughput.mfu(500.0) == pytest.approx(0.392275805)


def test_what_is_computed_again_counts_in_hfu_alone() -> None:
    peak = hardware.Peak(1000e12, "dense", "")
    throughput = Throughput(ModelConfig(), 491_520, 2, peak)
    again = Throughput(ModelConfig(), 491_520, 2, peak, recompute="full").record(4298.4)
    assert again["mfu_percent"] == pytest.approx(throughput.record(4298.4)["mfu_percent"])
    ratio = flops.flops_per_token(ModelConfig(), "hfu", recompute="full").training_per_token
    ratio /= flops.flops_per_token(ModelConfig()).training_per_token
    assert again["hfu_percent"] == pytest.approx(again["mfu_percent"] * float(ratio))
    half = Throughput(ModelConfig(), 491_520, 2, peak, ceiling_flop_s=peak.flop_s / 2).record(4298.4)
    assert half["of_ceiling_percent"] == pytest.approx(2 * half["mfu_percent"])


def test_throughput_without_peak_has_no_mfu() -> None:
    record = Throughput(ModelConfig(), 491_520, 1, None).record(1000.0)
    assert not {"mfu_percent", "hardware_peak_tflops", "peak_basis"} & record.keys()
    assert record["achieved_tflops"] == pytest.approx(392.275805)


def test_throughput_of_a_plugins_ffn_has_no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptperf.registry._components", {("ffn_type", "moe"): object})
    model, peak = ModelConfig(ffn_type="moe"), hardware.Peak(1000e12, "dense", "")
    record = Throughput(model, 1000, 1, peak).record(500.0)
    assert record["tokens_per_sec"] == pytest.approx(2000)
    assert not {"mfu_percent", "achieved_tflops", "flops_per_token"} & record.keys()
    assert "expected_tokens_per_sec" not in theoretical(model, peak, 1)


def test_theoretical() -> None:
    facts = theoretical(ModelConfig(), hardware.Peak(312e12, "dense", "x"), 4)
    assert facts["expected_tokens_per_sec"] == pytest.approx(0.5 * 4 * 312e12 / 798_087_168)
    assert facts["attention_ffn_ratio"] == pytest.approx(0.667, abs=5e-4)
    assert facts["hardware_peak_tflops"] == 312
    without = theoretical(ModelConfig(), None, 4)
    assert without.keys() == {"flops_per_token", "convention", "attention_ffn_ratio"}


def test_memory_record_on_cpu_sees_an_allocation() -> None:
    before = memory_record(torch.device("cpu"))
    block = torch.ones(50_000_000)
    after = memory_record(torch.device("cpu"))
    assert 0.15 < after["rss_gb"] - before["rss_gb"] < 0.35, block.shape
    assert after["peak_rss_gb"] >= after["rss_gb"] * 0.98  # counted by the kernel in batches


def test_no_torch_at_import() -> None:
    modules = "gptperf.flops, gptperf.hardware, gptperf.hardware.ceiling_cache, gptperf.monitor.throughput"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
    unknown = SMI_LINE.replace("NVIDIA H200", "NVIDIA H20")
    fake_smi(tmp_path, monkeypatch, f"echo '{SMI_LINE}'\necho '{unknown}'")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*") and "TFLOP" not in line] == ["H200", "GPU"]
    row = next(line for line in lines if line.startswith("* H200")).split()
    assert row[2:10] == ["989.4", "989.4", "494.7", "66.9", "1978.9", "1979", "141", "4.800"]
    assert any("power cap of 500 W" in line for line in lines)
    assert any("no dense bf16 peak is known for NVIDIA H20" in line and "--peak_tflops" in line for line in lines)
    assert all(any(f" {gpu.name} " in line for line in lines) for gpu in hardware.GPUS)
    main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["table"] if row["here"]] == ["H200"]
    assert [gpu["row"] for gpu in report["this_machine"]] == ["H200", None]


def test_the_table_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main([]) == 0
    assert "No GPU is seen here: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"found 'configs/tiny.toml' without --measure"):
        main(["configs/tiny.toml"])
