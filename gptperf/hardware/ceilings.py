"""Measured ceilings: the rates that a GPU reaches in the shapes of one model, and what they mean for a training step.

No program reaches a data sheet's peak: under its power cap an H200 sustains about 0.7 of it. The ceiling of a training
step (`ceiling_flop_s`) is the rate of the same GPU when it runs only the model's matmuls, at the measured rates.
Achieved FLOP/s divided by the ceiling show what the program loses; MFU also includes what the GPU itself loses. The
attention of the ceilings has neither windows nor documents, so a run with them has no share of the ceiling.

`gptperf.hardware.measure` measures the ceilings, and `gptperf.hardware.ceiling_cache` keeps them.
"""

from dataclasses import dataclass

from gptperf.flops import FlopCount

__all__ = ["Ceilings", "Machine", "Spread", "ceiling_flop_s"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPU, driver and libraries with which rates were measured."""

    device: str
    driver: str | None
    versions: dict[str, str | None]
    """Versions of torch, cuda and cudnn."""
    power_cap_w: float | None = None
    power_default_w: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a rate over the timed windows, in FLOP/s or byte/s."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured median rates of one GPU in one dtype, in the shapes of one model."""

    gemm_flop_s: float
    """Mean over the model's own GEMMs."""
    gemm_square_flop_s: float
    """A GEMM of 8192 x 8192 x 8192."""
    attention_forward_flop_s: float
    attention_backward_flop_s: float
    copy_byte_s: float
    """A copy of 2 GB; bytes read and bytes written both count."""
    copy_small_byte_s: float
    """A copy of 256 MB; bytes read and bytes written both count."""
    spreads: dict[str, Spread]
    """Name of a workload -> the spread of its rate."""
    device: str
    dtype: str
    key: str
    """`workload_key` of the model and micro-batch."""
    driver: str | None
    versions: dict[str, str | None]
    power_cap_w: float | None
    power_default_w: float | None
    protocol: str
    date: str


def ceiling_flop_s(ceilings: Ceilings, count: FlopCount) -> float:
    """Returns the FLOP/s of a training step that runs only the model's matmuls, at the measured rates.

    Its time is the sum of the GEMM FLOPs (3 x forward), the attention FLOPs of forward and those of backward (2 x
    forward), each divided by the measured rate. Achieved FLOP/s divided by the ceiling are the share of the ceiling, as
    MFU is the share of the peak.

    Raises:
        ValueError: `count` does not have the strict convention, in which the attention rates are measured.
    """
    if count.convention != "strict":
        raise ValueError(f"FLOP convention: found {count.convention!r}, wanted 'strict', as the measured rates have it")
    gemm = 3 * (count.qkv + count.output + count.ffn + count.lm_head)
    forward_s = count.scores / ceilings.attention_forward_flop_s
    backward_s = 2 * count.scores / ceilings.attention_backward_flop_s
    return count.training / (gemm / ceilings.gemm_flop_s + forward_s + backward_s)
