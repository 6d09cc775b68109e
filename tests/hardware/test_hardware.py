"""The GPU table: the cards that it knows, names that it must not confuse, and the figures behind an MFU."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from gptperf import flops, hardware
from gptperf.config import ModelConfig
from gptperf.errors import ConfigError, DeviceError
from gptperf.hardware import peaks
from gptperf.hardware.gpu_table import DOCUMENTS
from gptperf.monitor.memory import memory_record
from gptperf.monitor.throughput import Throughput, theoretical
from gptperf.plan import find_gpu

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
    "Tesla V100S-PCIE-32GB": ("V100S PCIe 32 GB", 34.1),
    "Tesla T4": ("T4", 15.8),
    "NVIDIA A800-SXM4-80GB": ("A800 SXM 80 GB", 85.1),
    "NVIDIA A800 80GB PCIe": ("A800 PCIe 80 GB", 85.1),
    "NVIDIA A10": ("A10", 23.8),
    "NVIDIA A10G": ("A10G", 23.8),
    "NVIDIA A30": ("A30", 25.2),
    "NVIDIA A40": ("A40", 47.7),
    "NVIDIA RTX A6000": ("RTX A6000", 51.0),
    "NVIDIA H800": ("H800", 85.0),
    "NVIDIA H800 PCIe": ("H800 PCIe", 85.0),
    "NVIDIA H20": ("H20", 102.1),
    "NVIDIA L20": ("L20", 47.7),
    "NVIDIA L40": ("L40", 47.7),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": ("RTX PRO 6000 Blackwell", 102.0),
    "NVIDIA GeForce RTX 3090": ("RTX 3090", 25.4),
    "NVIDIA T4": ("T4", 15.8),
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
    "GRID V100-4C",
    "NVIDIA A100",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "GRID A100D-20C",
    "NVIDIA A2",
    "NVIDIA A10M",
    "NVIDIA A16",
    "NVIDIA RTX A1000",
    "NVIDIA RTX A1000 6GB Laptop GPU",
    "NVIDIA DGX Display",
    "NVIDIA H100",
    "NVIDIA H100 96GB HBM3",
    "NVIDIA H100 64GB HBM2",
    "NVIDIA H100 80GB HBM2e",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100 PCIe MIG 2g.20gb",
    "NVIDIA H200 MIG 1g.18gb",
    "NVIDIA H20-3e",
    "NVIDIA H20 NVL16",
    "NVIDIA H800 NVL",
    "NVIDIA B200 MIG 1g.23gb",
    "NVIDIA GB10",
    "NVIDIA L2",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 D v2",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA RTX 6000",
    "NVIDIA RTX 6000D",
    "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX 5000 Ada Generation",
    "NVIDIA RTX 5880 Ada Generation",
    "AMD Instinct MI300X",
    "NVIDIA A800 40GB Active",
    "NVIDIA A10-24Q",
    "GRID A10-24Q",
    "NVIDIA A10 Laptop GPU",
    "NVIDIA A30X",
    "NVIDIA A30 MIG 1g.6gb",
    "NVIDIA A40-8Q",
    "NVIDIA A40-48C",
    "GRID T4-16Q",
    "NVIDIA T4G",
    "NVIDIA T400 4GB",
    "NVIDIA T40",
    "NVIDIA RTX A6000-48Q",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 3080",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA GeForce RTX 4070 Ti SUPER",
    "NVIDIA H20 MIG 1g.12gb",
    "NVIDIA H800 MIG 1g.10gb",
    "NVIDIA L40G",
    "NVIDIA L40-48Q",
    "NVIDIA L40S-48Q",
    "NVIDIA RTX PRO 6000 Blackwell",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition MIG 1g.24gb",
    "NVIDIA RTX PRO 6000D Blackwell",
    "NVIDIA RTX PRO 5000 Blackwell",
    "NVIDIA GeForce RTX 2080 with Max-Q Design",
    "AMD Radeon RX 7900 XTX",
    "AMD Instinct MI250X",
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
    ("NVIDIA H800", "dense", 989.4),
    ("NVIDIA A800-SXM4-80GB", "dense", 312),
    ("NVIDIA H20", "dense", 148),
    ("NVIDIA L20", "dense", 119.5),
    ("NVIDIA L40", "dense", 181.05),
    ("NVIDIA A10", "dense", 125),
    ("NVIDIA A10G", "dense", 70),
    ("NVIDIA A30", "dense", 165),
    ("NVIDIA A40", "dense", 149.7),
    ("NVIDIA RTX A6000", "dense", 154.8),
    ("NVIDIA GeForce RTX 3090", "dense", 71),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "dense", 503.8),
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
    with pytest.raises(ConfigError, match="wanted one of"):
        find_gpu(device_name)


def test_a_slice_of_a_card_is_not_the_card() -> None:
    assert hardware.match_gpu("NVIDIA H200", memory_gb=18) is None
    assert hardware.match_gpu("Tesla V100-SXM2-32GB", memory_gb=16.9) is None
    assert hardware.match_gpu("NVIDIA H20", memory_gb=150.0) is None


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


def test_cards_without_bfloat16() -> None:
    rates = {"V100-SXM2-16GB": 125, "V100-PCIE-32GB": 112, "V100S-PCIE-32GB": 130, "T4": 65}
    for name, tflops in rates.items():
        gpu = hardware.match_gpu(f"Tesla {name}")
        peak = hardware.peak_flop_s(gpu, "float16")
        assert peak is not None
        assert peak.flop_s == tflops * 1e12
        with pytest.raises(DeviceError, match="has no bfloat16 units; nearest: --dtype=float16"):
            hardware.peak_flop_s(gpu, "bfloat16", peak_tflops=125)


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
