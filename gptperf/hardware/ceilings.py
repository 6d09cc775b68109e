"""Measured ceilings: the rates that a card reaches in the shapes of one model, and what they mean for a training step.

A data sheet's peak is out of reach of any program: under its power cap an H200 sustains about 0.7 of it. The ceiling of
a training step is what the same card reaches when it runs nothing but the model's own matmuls, at the measured rates:
`ceiling_flop_s`. Achieved FLOP/s over the ceiling show what the program loses, MFU also what the card does.

`gptperf.hardware.measure` measures them, `gptperf.hardware.ceiling_cache` keeps them.
"""

from dataclasses import dataclass

from gptperf.flops import FlopCount

__all__ = ["Ceilings", "Machine", "Spread", "ceiling_flop_s"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The card, driver and libraries that measured rates belong to."""

    device: str
    driver: str | None
    versions: dict[str, str | None]
    """Versions of torch, cuda and cudnn."""
    power_cap_w: float | None = None
    power_default_w: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a rate over the windows, in FLOP/s or byte/s."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured rates of one card in one dtype, in the shapes of one model; medians."""

    gemm_flop_s: float
    """Mean over the model's own GEMMs."""
    gemm_square_flop_s: float
    """8192 x 8192 x 8192."""
    attention_forward_flop_s: float
    attention_backward_flop_s: float
    copy_byte_s: float
    """Read and written, 2 GB."""
    copy_small_byte_s: float
    """Read and written, 256 MB."""
    spreads: dict[str, Spread]
    """Name of a work -> the spread of its rate."""
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
    """FLOP/s of a training step that runs nothing but the model's matmuls at the measured rates.

    Its time is the GEMM FLOPs (3 x forward) over their rate and the attention FLOPs, forward and backward (2 x
    forward), each over their own. Achieved FLOP/s over this is the share of the measured ceiling, as MFU is the share
    of the peak.

    Raises:
        ValueError: `count` is not of the strict convention, in which the attention rates are.
    """
    if count.convention != "strict":
        raise ValueError(f"FLOP convention: found {count.convention!r}, wanted 'strict', as the measured rates have it")
    gemm = 3 * (count.qkv + count.output + count.ffn + count.lm_head)
    forward_s = count.scores / ceilings.attention_forward_flop_s
    backward_s = 2 * count.scores / ceilings.attention_backward_flop_s
    return count.training / (gemm / ceilings.gemm_flop_s + forward_s + backward_s)
