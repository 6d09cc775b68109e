"""Predicts from a run's configuration its memory and time, and whether it fits. No module here loads torch."""

from gptperf.plan.fit import Remedy, largest_batch, refusal, remedies
from gptperf.plan.gpu_lookup import find_gpu, own_gpu
from gptperf.plan.memory import Footprint, footprint, strategy_of
from gptperf.plan.predict import Plan, plan, unplannable
from gptperf.plan.text import STRATEGY_NAMES, plan_lines, plan_record

__all__ = [
    "STRATEGY_NAMES",
    "Footprint",
    "Plan",
    "Remedy",
    "find_gpu",
    "footprint",
    "largest_batch",
    "own_gpu",
    "plan",
    "plan_lines",
    "plan_record",
    "refusal",
    "remedies",
    "strategy_of",
    "unplannable",
]
