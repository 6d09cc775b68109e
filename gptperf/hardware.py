"""What NVIDIA's GPUs can do at most, by dtype, as their data sheets say it.

Data sheets of Ampere and later print the 2:4-sparse figure in large type; dense, what training computes, is
half of it. float32 is the plain one without TF32, because gptperf computes float32 as float32. What no data
sheet says is left out: an unknown GPU has no peak and no MFU, never those of another one. No torch here.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gptperf.errors import DeviceError

__all__ = ["BASES", "GPUS", "Gpu", "Peak", "has_bfloat16", "match_gpu", "no_peak_hint", "peak_flop_s"]

Basis = Literal["dense", "sparse"]
BASES: tuple[Basis, ...] = ("dense", "sparse")

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32", "fp8": "fp8"}
_BRANDS = {"NVIDIA", "TESLA", "GEFORCE"}
# CUDA reports up to 7% more than the name says (its GB are GiB less the driver's share); ECC takes up to 6%.
_MEMORY_TOLERANCE = 0.15
_BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row of the table; rates in TFLOP/s (1e12) as printed in `source`."""

    name: str
    cuda_names: tuple[str, ...]
    """Names that CUDA gives the card, without the brand; all words have to agree."""
    capability: tuple[int, int]
    dense_tflops: dict[str, float]
    """By dtype: bfloat16, float16 (both with float32 accumulation), float32, tf32, fp8."""
    sparse_tflops: dict[str, float]
    memory_gb: float
    hbm_byte_s: float
    source: str


class Peak(NamedTuple):
    """What MFU is taken against."""

    flop_s: float
    basis: str
    """dense, sparse, or given (by the user)."""
    source: str


def _tensor(bf16: float | None, fp16: float, tf32: float | None = None, fp8: float | None = None) -> dict[str, float]:
    rates = {"bfloat16": bf16, "float16": fp16, "tf32": tf32, "fp8": fp8}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


def _v100(form: str, cuda_names: tuple[str, ...], memory_gb: float, fp16: float, fp32: float) -> Gpu:
    return Gpu(
        name=f"V100 {form} {memory_gb:.0f} GB",
        cuda_names=cuda_names,
        capability=(7, 0),
        dense_tflops={"float16": fp16, "float32": fp32},
        sparse_tflops={},
        memory_gb=memory_gb,
        hbm_byte_s=900e9,
        source="NVIDIA Tesla V100 data sheet",
    )


def _a100(form: str, cuda_names: tuple[str, ...], memory_gb: float, hbm_byte_s: float) -> Gpu:
    return Gpu(
        name=f"A100 {form} {memory_gb:.0f} GB",
        cuda_names=cuda_names,
        capability=(8, 0),
        dense_tflops=_tensor(312, 312, 156) | {"float32": 19.5},
        sparse_tflops=_tensor(624, 624, 312),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        source="NVIDIA A100 data sheet",
    )


def _gh100(name: str, cuda_names: tuple[str, ...], memory_gb: float, hbm_byte_s: float, source: str) -> Gpu:
    """A full-clock Hopper module: 132 SMs. H100, H200 and GH200 differ in memory alone."""
    return Gpu(
        name=name,
        cuda_names=cuda_names,
        capability=(9, 0),
        dense_tflops=_tensor(989.4, 989.4, 494.7, 1978.9) | {"float32": 66.9},
        sparse_tflops=_tensor(1979, 1979, 989.4, 3958),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        source=f"{source}; dense: NVIDIA H100 architecture white paper",
    )


def _nvl(name: str, memory_gb: float, hbm_byte_s: float, source: str) -> Gpu:
    """A Hopper card of the NVL kind."""
    return Gpu(
        name=name,
        cuda_names=(name,),
        capability=(9, 0),
        dense_tflops=_tensor(835, 835, 417.5, 1670) | {"float32": 60},
        sparse_tflops=_tensor(1671, 1671, 835, 3341),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        source=source,
    )


_VOLTA_AMPERE = (
    _v100("SXM2", ("V100-SXM2-16GB",), 16, 125, 15.7),
    _v100("SXM2", ("V100-SXM2-32GB",), 32, 125, 15.7),
    _v100("PCIe", ("V100-PCIE-16GB",), 16, 112, 14),
    _v100("PCIe", ("V100-PCIE-32GB",), 32, 112, 14),
    _a100("SXM", ("A100-SXM4-40GB",), 40, 1555e9),
    _a100("SXM", ("A100-SXM4-80GB", "A100-SXM-80GB"), 80, 2039e9),
    _a100("PCIe", ("A100-PCIE-40GB",), 40, 1555e9),
    _a100("PCIe", ("A100 80GB PCIe", "A100-PCIE-80GB"), 80, 1935e9),
)
_HOPPER = (
    _gh100("H100", ("H100 80GB HBM3", "H100 SXM5 80GB"), 80, 3350e9, "NVIDIA H100 data sheet, SXM"),
    Gpu(
        name="H100 PCIe",
        cuda_names=("H100 PCIe",),
        capability=(9, 0),
        dense_tflops=_tensor(756, 756, 378, 1513) | {"float32": 51.2},
        sparse_tflops=_tensor(1513, 1513, 756, 3026),
        memory_gb=80,
        hbm_byte_s=2000e9,
        source="NVIDIA H100 data sheet, PCIe; NVIDIA H100 architecture white paper",
    ),
    _nvl("H100 NVL", 94, 3900e9, "NVIDIA H100 NVL data sheet"),
    _gh100("H200", ("H200",), 141, 4800e9, "NVIDIA H200 data sheet, SXM"),
    _nvl("H200 NVL", 141, 4800e9, "NVIDIA H200 data sheet, NVL"),
    # The size in the first two CUDA names is the Grace CPU's memory.
    _gh100("GH200 96 GB", ("GH200 480GB", "GH200 120GB"), 96, 4000e9, "NVIDIA GH200 data sheet"),
    _gh100("GH200 144 GB", ("GH200 144G HBM3e",), 144, 4900e9, "NVIDIA GH200 data sheet"),
)
_BLACKWELL = (
    Gpu(
        name="B200",
        cuda_names=("B200",),
        capability=(10, 0),
        dense_tflops=_tensor(2250, 2250, 1100, 4500) | {"float32": 75},
        sparse_tflops=_tensor(4500, 4500, 2200, 9000),
        memory_gb=192,
        hbm_byte_s=7.7e12,
        source="NVIDIA Blackwell data sheet, HGX B200",
    ),
    Gpu(
        name="GB200",
        cuda_names=("GB200",),
        capability=(10, 0),
        dense_tflops=_tensor(2500, 2500, 1250, 5000) | {"float32": 80},
        sparse_tflops=_tensor(5000, 5000, 2500, 10000),
        memory_gb=186,
        hbm_byte_s=8e12,
        source="NVIDIA Blackwell data sheet, GB200 NVL72",
    ),
    Gpu(
        name="B300",
        cuda_names=("B300 SXM6 AC", "B300"),
        capability=(10, 3),
        dense_tflops=_tensor(2250, 2250, fp8=4500) | {"float32": 75},
        sparse_tflops=_tensor(4500, 4500, fp8=9000),
        memory_gb=288,
        hbm_byte_s=7.7e12,
        source="NVIDIA Blackwell Ultra data sheet, HGX B300",
    ),
)
_ADA_AND_RTX = (
    Gpu(
        name="L40S",
        cuda_names=("L40S",),
        capability=(8, 9),
        dense_tflops=_tensor(362.05, 362.05, 183, 733) | {"float32": 91.6},
        sparse_tflops=_tensor(733, 733, 366, 1466),
        memory_gb=48,
        hbm_byte_s=864e9,
        source="NVIDIA L40S data sheet",
    ),
    Gpu(
        name="L4",
        cuda_names=("L4",),
        capability=(8, 9),
        dense_tflops=_tensor(121, 121, 60, 242.5) | {"float32": 30.3},
        sparse_tflops=_tensor(242, 242, 120, 485),
        memory_gb=24,
        hbm_byte_s=300e9,
        source="NVIDIA L4 data sheet",
    ),
    Gpu(
        name="RTX 4090",
        cuda_names=("RTX 4090",),
        capability=(8, 9),
        dense_tflops=_tensor(165.2, 165.2, 82.6, 330.3) | {"float32": 82.6},
        sparse_tflops=_tensor(330.4, 330.4, 165.2, 660.6),
        memory_gb=24,
        hbm_byte_s=1008e9,
        source="NVIDIA Ada GPU architecture white paper",
    ),
    Gpu(
        name="RTX 6000 Ada",
        cuda_names=("RTX 6000 Ada Generation",),
        capability=(8, 9),
        dense_tflops=_tensor(364.2, 364.2, 182.1, 728.5) | {"float32": 91.1},
        sparse_tflops=_tensor(728.5, 728.5, 364.2, 1457),
        memory_gb=48,
        hbm_byte_s=960e9,
        source="NVIDIA Ada GPU architecture white paper, professional edition",
    ),
    Gpu(
        name="RTX 5090",
        cuda_names=("RTX 5090",),
        capability=(12, 0),
        dense_tflops=_tensor(209.5, 209.5, 104.8, 419) | {"float32": 104.8},
        sparse_tflops=_tensor(419, 419, 209.5, 838),
        memory_gb=32,
        hbm_byte_s=1792e9,
        source="NVIDIA RTX Blackwell GPU architecture white paper",
    ),
)

GPUS: tuple[Gpu, ...] = _VOLTA_AMPERE + _HOPPER + _BLACKWELL + _ADA_AND_RTX
"""The table."""


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
