"""Predicts the memory and speed of a run on any known GPU before the run starts. Loads no torch.

`gptperf.plan.memory` predicts the memory and `gptperf.plan.step_time` the time; `plan` combines them.
"""

from dataclasses import dataclass
from typing import Any

from gptperf import flops, hardware
from gptperf.config import Config
from gptperf.hardware import Gpu, has_bfloat16
from gptperf.plan.memory import (
    Footprint,
    Recompute,
    Strategy,
    allocatable_gb,
    footprint,
    unknown_memory,
    usable_gb,
)
from gptperf.plan.step_time import band_of, parts_ms

__all__ = ["Plan", "plan", "unplannable"]


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs and the speed that it will reach."""

    gpu: str
    num_gpus: int
    strategy: Strategy
    recompute: Recompute
    memory: Footprint
    limit_gb: float
    """Memory that PyTorch can allocate on the GPU."""
    parts_ms: dict[str, float]
    """gemm, attention, memory_bound, optimizer, communication, other and host; they add up to an iteration."""
    band: float
    """Relative error that the predicted step time may have."""
    tokens_per_iter: int
    mfu: float | None
    """MFU, 0..1; None where the peak is not known."""
    peak: dict[str, Any]
    """What the MFU is relative to: `convention` and, where the peak is known, the fields of `hardware.Peak.record`."""

    @property
    def fits(self) -> bool:
        """Whether the run fits into the memory of the GPU."""
        return self.memory.total_gb <= self.limit_gb

    @property
    def step_ms(self) -> float:
        """Milliseconds of an iteration."""
        return sum(self.parts_ms.values())

    @property
    def tokens_per_sec(self) -> float:
        """Tokens per second of the whole job."""
        return self.tokens_per_iter / self.step_ms * 1e3

    def days(self, tokens: float) -> float:
        """Returns the days that training on this number of tokens takes."""
        return tokens / self.tokens_per_sec / 86400


def unplannable(config: Config, gpu: Gpu | None) -> str | None:
    """Returns why `plan` cannot predict this run on this GPU, or None if it can."""
    reason = unknown_memory(config.model)
    if reason is not None:
        return reason
    if gpu is None:
        return "this GPU is not in the table"
    if config.system.peak_dtype not in gpu.dense_tflops:
        has = "has no bfloat16 units" if not has_bfloat16(gpu.capability) else "has none in the table"
        return f"dtype = {config.system.peak_dtype!r}: {gpu.name} {has}; nearest: --dtype=float16"
    if config.system.matmul_dtype == "fp8" and "fp8" not in gpu.dense_tflops:
        return f"matmul_dtype = 'fp8': the table has no fp8 peak of {gpu.name}; nearest: --matmul_dtype=dtype"
    return None


def plan(
    config: Config,
    gpu: Gpu,
    *,
    num_gpus: int = 1,
    strategy: Strategy = "ddp",
    recompute: Recompute = "none",
    reported_gb: float | None = None,
) -> Plan:
    """Predicts the memory and speed of a run.

    Args:
        config: the run.
        gpu: a row of the table (`find_gpu`, `hardware.match_gpu`) that has a peak for the compute dtype.
        num_gpus: GPUs that share the iteration.
        strategy: what the GPUs shard.
        recompute: what backward recomputes.
        reported_gb: memory that CUDA reports for this device; default: from the table.

    Raises:
        ValueError: the run cannot be predicted (see `unplannable`).
    """
    reason = unplannable(config, gpu)
    if reason is not None:
        raise ValueError(f"no plan: {reason}")
    parts = parts_ms(config, gpu, num_gpus, strategy, recompute)
    per_token = float(flops.flops_per_token(config.model).training_per_token)
    system = config.system
    peak = hardware.peak_flop_s(gpu, system.peak_dtype, basis=system.peak_basis, peak_tflops=system.peak_tflops)
    achieved = per_token * config.tokens_per_iter / num_gpus / (sum(parts.values()) / 1e3)
    return Plan(
        gpu=gpu.name,
        num_gpus=num_gpus,
        strategy=strategy,
        recompute=recompute,
        memory=footprint(config, num_gpus, strategy, recompute),
        limit_gb=usable_gb(gpu.memory_gb) if reported_gb is None else allocatable_gb(reported_gb),
        parts_ms=parts,
        band=band_of(config, gpu),
        tokens_per_iter=config.tokens_per_iter,
        mfu=None if peak is None else achieved / peak.flop_s,
        peak={"convention": "strict"} | ({} if peak is None else peak.record()),
    )
