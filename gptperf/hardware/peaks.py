"""Finds the row of a GPU in the table, and its peak. A GPU that is not in the table has no peak and no MFU."""

import re
from typing import Any, Literal, NamedTuple

from gptperf.errors import DeviceError
from gptperf.formats import SHORT_DTYPES
from gptperf.hardware.gpu_table import GPUS, Gpu

__all__ = ["BASES", "GPUS", "Gpu", "Peak", "has_bfloat16", "match_gpu", "no_peak_hint", "peak_flop_s"]

Basis = Literal["dense", "sparse"]
BASES: tuple[Basis, ...] = ("dense", "sparse")

_BRANDS = {"NVIDIA", "TESLA", "GEFORCE"}
# CUDA reports up to 7% more than the table has (whose GB are GiB less the driver's share); ECC takes up to 6%.
_MEMORY_TOLERANCE = 0.15
_BFLOAT16_CAPABILITY = (8, 0)


class Peak(NamedTuple):
    """The peak that the MFU is relative to."""

    flop_s: float
    basis: str
    """dense, sparse, or given (by the user)."""
    source: str
    """The peak and its origin, as text for people."""
    dtype: str = ""
    """Dtype whose peak this is."""
    float8_flop_s: float | None = None
    """Peak of the same GPU in fp8; None if it has none or the user gave the peak."""

    def record(self) -> dict[str, Any]:
        """Returns the fields of a log record that name this peak."""
        named = {"peak_dtype": self.dtype} if self.dtype else {}
        return {"hardware_peak_tflops": self.flop_s / 1e12, **named, "peak_basis": self.basis}


def _words(name: str) -> tuple[str, ...]:
    words = re.split(r"[^0-9A-Z]+", name.upper())
    return tuple(word for word in words if word and word not in _BRANDS)


_ROWS = {_words(cuda_name): gpu for gpu in GPUS for cuda_name in gpu.cuda_names}


def match_gpu(device_name: str, memory_gb: float | None = None) -> Gpu | None:
    """Returns the row of a device, or None. A similar name is not enough: RTX A1000, H20-3e and MIG slices have no row.

    Args:
        device_name: name from `torch.cuda.get_device_name()` or nvidia-smi, such as "NVIDIA H100 80GB HBM3".
        memory_gb: memory that CUDA reports, in 1e9 bytes. If it differs from the row's memory, the device is a slice of
            that GPU, or another GPU.
    """
    gpu = _ROWS.get(_words(device_name))
    if gpu is not None and memory_gb is not None and abs(memory_gb / gpu.memory_gb - 1) > _MEMORY_TOLERANCE:
        return None
    return gpu


def has_bfloat16(capability: tuple[int, int] | None) -> bool:
    """Returns whether GPUs of this compute capability have bfloat16 units (Ampere and later; one that is not known)."""
    return capability is None or capability >= _BFLOAT16_CAPABILITY


def peak_flop_s(
    gpu: Gpu | None, dtype: str, *, basis: Basis = "dense", peak_tflops: float | None = None
) -> Peak | None:
    """Returns the peak of one GPU in a compute dtype, or None if it is not known; `no_peak_hint` then has the remedy.

    Args:
        gpu: row of the table, from `match_gpu`.
        dtype: bfloat16, float16, float32, tf32 or fp8.
        basis: column of the table.
        peak_tflops: the user's own figure, which takes precedence over the table.

    Raises:
        DeviceError: the dtype is bfloat16, and the GPU does not have it.
        ValueError: the dtype or the basis is unknown.
    """
    if dtype not in SHORT_DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(SHORT_DTYPES)}")
    if basis not in BASES:
        raise ValueError(f"peak_basis: found {basis!r}, wanted one of {', '.join(BASES)}")
    if gpu is not None and dtype == "bfloat16" and not has_bfloat16(gpu.capability):
        raise DeviceError(f"dtype = 'bfloat16': {gpu.name} has no bfloat16 units; nearest: --dtype=float16")
    short = SHORT_DTYPES[dtype]
    if peak_tflops is not None:
        return Peak(peak_tflops * 1e12, "given", f"{peak_tflops:,.1f} TFLOPS ({short}, given by --peak_tflops)", dtype)
    if gpu is not None and gpu.capability is None:
        rate = gpu.dense_tflops[dtype]
        return Peak(rate * 1e12, "given", f"{rate:,.1f} TFLOPS ({gpu.name} {short}, given by --gpu_tflops)", dtype)
    rates = {} if gpu is None else gpu.dense_tflops if basis == "dense" else gpu.sparse_tflops
    if gpu is None or dtype not in rates:
        return None
    float8 = 1e12 * rates["fp8"] if "fp8" in rates else None
    return Peak(rates[dtype] * 1e12, basis, f"{rates[dtype]:,.1f} TFLOPS ({gpu.name} {short}, {basis})", dtype, float8)


def no_peak_hint(device_name: str, dtype: str, basis: Basis = "dense") -> str:
    """Returns one line for a device whose peak is not known, which says how to set it."""
    known = f"no {basis} {SHORT_DTYPES[dtype]} peak is known for {device_name}, so no MFU"
    return f"{known}; give it to a run, in TFLOP/s: --peak_tflops=X"
