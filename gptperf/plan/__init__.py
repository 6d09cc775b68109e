"""Memory, time and fit of a run, predicted from its configuration."""

from gptperf.plan.memory import Footprint, footprint, strategy_of
from gptperf.plan.predict import (
    STRATEGY_NAMES,
    Plan,
    Remedy,
    find_gpu,
    largest_batch,
    own_gpu,
    plan,
    plan_lines,
    plan_record,
    refusal,
    remedies,
    unplannable,
)

__all__ = [
    "Footprint",
    "footprint",
    "strategy_of",
    "Plan",
    "Remedy",
    "STRATEGY_NAMES",
    "find_gpu",
    "largest_batch",
    "own_gpu",
    "plan",
    "plan_lines",
    "plan_record",
    "refusal",
    "remedies",
    "unplannable",
]
