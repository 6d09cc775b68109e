"""The MFU waterfall: how many points of MFU each kind of work in a training step costs.

It is computed from the kernels of a trace (`gptperf.monitor.trace`), without torch. Every moment of a step belongs to
exactly one part, so the parts add up to the step.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gptperf import flops
from gptperf.config import Config
from gptperf.flops.float8 import float8_flops
from gptperf.hardware import Peak
from gptperf.monitor.trace import Interval, Kernel

__all__ = ["PARTS", "Breakdown", "Waterfall", "breakdown", "classify", "step_flops", "waterfall"]

PARTS = ("gemm", "attention", "memory_bound", "optimizer", "other", "loader", "communication", "host_gaps")
"""The parts of a step's time. A moment in which kernels of several parts run belongs to the first of these parts, so
transfers count only while nothing computes. host_gaps are the moments in which nothing runs at all."""
_MARKS = (
    ("communication", r"nccl|^_sum_shares|Memcpy PtoP"),
    ("optimizer", r"^_adamw|^_accumulate|^_symmetric_matmul|^triton_.*lerp|multi_tensor_apply|NormTwoOps"),
    ("gemm", r"^triton_tem_.*mm"),
    ("memory_bound", r"^triton_"),
    ("attention", r"sdpa|flash|fmha|cudnn::fusion|attention"),
    ("gemm", r"nvjet|gemm|gemv|cutlass|cublas|xmma|splitKreduce"),
    ("loader", r"Memcpy HtoD|random_from_to"),
    (
        "memory_bound",
        r"^_(norm|rope|activation|cross_entropy|column_sum|scale|quantize)\w*_kernel|at::native|^Memcpy|^Memset|cub::",
    ),
)
"""Pairs of a part and a pattern for the names of its kernels; the first match counts. An eager AdamW consists of
kernels that other code uses too, so it counts as memory_bound; the products of Muon that are not symmetric run in
cuBLAS and count as gemm."""


def classify(name: str) -> str:
    """Returns the part that a kernel belongs to, by its name, or "other" if no pattern matches."""
    return next((part for part, pattern in _MARKS if re.search(pattern, name)), "other")


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """Returns disjoint intervals, in order, that cover the same moments."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > begin:
            found.append((begin, end))
    return found


def _without(intervals: Sequence[Interval], covered: Sequence[Interval]) -> list[Interval]:
    """Returns the moments of `intervals` that are not in `covered`; both must be disjoint and in order."""
    found, index = [], 0
    for begin, end in intervals:
        while index < len(covered) and covered[index][1] <= begin:
            index += 1
        i = index
        while i < len(covered) and covered[i][0] < end:
            if covered[i][0] > begin:
                found.append((begin, covered[i][0]))
            begin = max(begin, covered[i][1])
            i += 1
        if begin < end:
            found.append((begin, end))
    return found


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


@dataclass(frozen=True)
class Breakdown:
    """Where the time of the profiled steps went, in milliseconds per step."""

    step_ms: float
    """Time of a profiled step: from the start of the first kernel to the end of the last one, divided by the number of
    steps."""
    parts_ms: dict[str, float]
    """Time of each of `PARTS`; the times add up to the step."""
    hidden_communication_ms: float
    """Time of communication while something computes, which does not lengthen the step."""
    unknown_ms: dict[str, float]
    """Time of the kernels that no pattern matches, longest first, including time that overlaps with other kernels."""


def breakdown(kernels: Sequence[Kernel], steps: int, waits: Sequence[Interval] = ()) -> Breakdown:
    """Assigns every moment of the traced steps to one part.

    Args:
        kernels: kernels of all streams of one GPU, in any order.
        steps: number of steps that the kernels belong to.
        waits: intervals in which the host waited for a batch, on the same clock.

    Raises:
        ValueError: there is no kernel.
    """
    if not kernels:
        raise ValueError("the trace has no kernel of a GPU")
    by_part: dict[str, list[Interval]] = {part: [] for part in PARTS}
    unknown: dict[str, float] = {}
    for kernel in kernels:
        part = classify(kernel.name)
        by_part[part].append(kernel.interval)
        if part == "other":
            unknown[kernel.name] = unknown.get(kernel.name, 0.0) + kernel.duration_us / 1e3 / steps
    begin, end = min(k.start_us for k in kernels), max(k.interval[1] for k in kernels)
    # Parts claim moments in the order of `PARTS`; a later part gets what no earlier one covers.
    covered: list[Interval] = []
    spent: dict[str, float] = {}
    for part in PARTS[:-1]:
        moments = _union(by_part[part])
        spent[part] = _length(_without(moments, covered))
        covered = _union([*covered, *moments])
    idle = _without([(begin, end)], covered)
    not_waiting = _without(idle, _union(waits))
    spent["host_gaps"] = _length(not_waiting)
    spent["loader"] += _length(idle) - _length(not_waiting)
    hidden = _length(_union(by_part["communication"])) - spent["communication"]
    return Breakdown(
        step_ms=(end - begin) / 1e3 / steps,
        parts_ms={part: spent[part] / 1e3 / steps for part in PARTS},
        hidden_communication_ms=hidden / 1e3 / steps,
        unknown_ms=dict(sorted(unknown.items(), key=lambda item: -item[1])),
    )


def step_flops(
    config: Config, num_gpus: int = 1, pairs: float | None = None, peak: Peak | None = None
) -> tuple[float, float]:
    """Returns the strict FLOPs of a step on one GPU, as a pair: those of matrix products, and those of attention.

    Args:
        config: the run.
        num_gpus: GPUs that share the step.
        pairs: mean (query, key) pairs of the GPU in a step, of one head and over all layers, where attention stays
            inside a document; None: a sequence is one document.
        peak: peak that the FLOPs are divided by. With it, fp8 FLOPs count as fewer, by the ratio of the two peaks, so
            that the MFU is the blended one.
    """
    sequences = config.tokens_per_iter / num_gpus / config.model.block_size
    mean = None if pairs is None else Fraction(pairs / sequences)
    count = flops.flops_per_token(config.model, "strict", pairs=mean)
    attention = 3 * count.scores
    gemm = float(count.training - attention) * sequences
    if peak is not None and peak.float8_flop_s is not None:
        gemm -= float8_flops(config) * count.tokens * sequences * (1 - peak.flop_s / peak.float8_flop_s)
    return gemm, float(attention) * sequences


@dataclass(frozen=True)
class Waterfall:
    """The points of MFU that each part costs, from 100% of the peak down to the MFU."""

    lost_points: dict[str, float]
    """Cost of each of `PARTS`. For gemm and attention it is the time beyond what their FLOPs take at the peak."""
    mfu_percent: float
    """MFU of the profiled steps: 100 minus all points."""
    timed_mfu_percent: float
    """MFU of the steps that were timed without a profiler."""

    @property
    def off_points(self) -> float:
        """Difference between the MFU of the profiled steps and that of the timed ones."""
        return self.mfu_percent - self.timed_mfu_percent

    @property
    def closes(self) -> bool:
        """Whether the profiled steps took as long as the timed ones, within one point of MFU."""
        return abs(self.off_points) <= 1


def waterfall(found: Breakdown, flops_of_step: tuple[float, float], peak_flop_s: float, timed_ms: float) -> Waterfall:
    """Computes the points of MFU that each part costs.

    A part that is faster than the peak has a negative cost: then the peak is not that of this card.

    Args:
        found: breakdown of the profiled steps.
        flops_of_step: result of `step_flops`.
        peak_flop_s: peak that the MFU refers to.
        timed_ms: time of a step without a profiler.
    """
    ideal_ms = [1e3 * count / peak_flop_s for count in flops_of_step]
    costs = dict(found.parts_ms)
    costs["gemm"] -= ideal_ms[0]
    costs["attention"] -= ideal_ms[1]
    lost = {part: 100 * ms / found.step_ms for part, ms in costs.items()}
    return Waterfall(lost, 100 - sum(lost.values()), 100 * sum(ideal_ms) / timed_ms)
