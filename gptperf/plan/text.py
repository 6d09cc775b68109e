"""Converts a plan to text for the console and to a record for logs and JSON."""

import dataclasses
from typing import Any

from gptperf.formats import mfu_scale, number
from gptperf.plan.memory import Footprint
from gptperf.plan.predict import Plan

__all__ = ["STRATEGY_NAMES", "memory_text", "plan_lines", "plan_record"]

STRATEGY_NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "fsdp": "FSDP"}
"""Strategy -> the name that is printed."""


def memory_text(memory: Footprint) -> str:
    """Returns the parts of the memory in one line, largest first."""
    parts = sorted(dataclasses.asdict(memory).items(), key=lambda part: -part[1])
    return ", ".join(f"{name.removesuffix('_gb')} {gb:.1f}" for name, gb in parts)


def plan_record(given: Plan) -> dict[str, Any]:
    """Returns a plan as a flat record for logs and JSON."""
    return {
        "gpu": given.gpu,
        "num_gpus": given.num_gpus,
        "strategy": given.strategy,
        "recompute": given.recompute,
        "memory_gb": given.memory.total_gb,
        "memory_parts_gb": {k.removesuffix("_gb"): v for k, v in dataclasses.asdict(given.memory).items()},
        "limit_gb": given.limit_gb,
        "fits": given.fits,
        "step_ms": given.step_ms,
        "parts_ms": given.parts_ms,
        "band": given.band,
        "tokens_per_sec": given.tokens_per_sec,
        "mfu_percent": None if given.mfu is None else 100 * given.mfu,
        **given.peak,
    }


def plan_lines(given: Plan) -> list[str]:
    """Returns a plan in two lines: memory, then time and speed."""
    fit = "fits" if given.fits else "does NOT fit"
    low, high = given.tokens_per_sec / (1 + given.band), given.tokens_per_sec / (1 - given.band)
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in given.parts_ms.items())
    return [
        f"{given.memory.total_gb:.1f} GB of {given.limit_gb:.1f} a GPU, {fit}: {memory_text(given.memory)}",
        f"{given.step_ms:.1f} ms per iteration +-{given.band:.0%}, {low:,.0f} to {high:,.0f} tokens/s, "
        f"MFU {number(given.mfu, '.1%')} ({mfu_scale(given.peak)}): {parts} ms",
    ]
