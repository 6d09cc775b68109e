"""Extracts the figures of a result that can get better or worse. This module does not import torch."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.results import Record

__all__ = ["Metric", "metrics"]

OURS = "triton"


@dataclass(frozen=True)
class Metric:
    """One figure with its percentiles."""

    name: str
    value: float
    low: float
    """10th percentile, or the value itself for a figure without percentiles."""
    high: float
    unit: str
    lower_is_better: bool = True
    ours: bool = True
    """False for figures of rivals and of the card."""


def metrics(record: Record) -> dict[str, Metric]:
    """Returns name -> figure of one cell, or an empty dictionary for a cell that failed."""
    readers = {
        "ops": _ops,
        "host": _host,
        "errors": _errors,
        "step": _step,
        "waterfall": _step,
        "rivals": _rivals,
        "generation": _generation,
        "start": _start,
        "monitor": _monitor,
        "ceilings": _ceilings,
        "loader": _loader,
        "micro": _micro,
    }
    kind = record["cell"].partition("/")[0]
    if record["status"] != "done" or kind not in readers:
        return {}
    return {metric.name: metric for metric in readers[kind](record["results"])}


def _span(row: Mapping[str, Any], name: str, *, ours: bool = True) -> Metric:
    return Metric(name, row["ms"], row["p10_ms"], row["p90_ms"], "ms", ours=ours)


def _ops(found: Mapping[str, Any]) -> Iterator[Metric]:
    for row in found["rows"]:
        for direction in ("forward", "backward", "both"):
            if direction in row:
                yield _span(row[direction], f"{row['impl']} {direction}", ours=row["impl"] == OURS)


def _host(found: Mapping[str, Any]) -> Iterator[Metric]:
    for row in found["rows"]:
        for key in ("forward", "forward_backward"):
            if key in row:
                name, time = f"{row['impl']} {row['rows']} rows {key}", row[key]
                yield Metric(name, time["us"], time["low_us"], time["high_us"], "us", ours=row["impl"] == OURS)


def _errors(found: Mapping[str, Any]) -> Iterator[Metric]:
    for row in found["rows"]:
        if "error" not in row:
            shape = "x".join(map(str, row["shape"]))
            value = row[f"{OURS}_rms"]
            yield Metric(f"{shape} {row['dtype']} {row['tensor']}", value, value, value, "of the rms")


def _step(found: Mapping[str, Any]) -> Iterator[Metric]:
    yield Metric("step", found["step_ms"], found["p10_ms"], found["p90_ms"], "ms")
    memory = found["peak_memory_gb"]
    yield Metric("peak memory", memory, memory, memory, "GB")
    joules = found.get("joules_per_token")
    if joules is not None:
        yield Metric("energy", joules, joules, joules, "J/token", ours=False)


def _rivals(found: Mapping[str, Any]) -> Iterator[Metric]:
    for name, row in found["contenders"].items():
        if "reason" not in row:
            yield Metric(name, row["step_ms"], row["p10_ms"], row["p90_ms"], "ms", ours=name == "gptperf")


def _generation(found: Mapping[str, Any]) -> Iterator[Metric]:
    times = found["steps_ms"]
    yield Metric("step", found["step_ms"], min(times), max(times), "ms")
    first = found["first_token_ms"]
    yield Metric("first token", first, first, first, "ms")


def _start(found: Mapping[str, Any]) -> Iterator[Metric]:
    for what in ("iteration", "token"):
        for caches, seconds in found[f"{what}_s"].items():
            yield Metric(f"first {what}, {caches}", seconds, seconds, seconds, "s")
    _, *later = found["stalls_ms"]
    if later:
        yield Metric("stall of a save", statistics.median(later), min(later), max(later), "ms")


def _monitor(found: Mapping[str, Any]) -> Iterator[Metric]:
    for kind in ("unwatched", "watched"):
        yield _span(found[kind], f"{kind} step")


def _ceilings(found: Mapping[str, Any]) -> Iterator[Metric]:
    for name, spread in found["spreads"].items():
        scale, unit = (1e9, "GB/s") if name.startswith("copy") else (1e12, "TFLOP/s")
        low, high = spread["p10"] / scale, spread["p90"] / scale
        yield Metric(name, spread["median"] / scale, low, high, unit, lower_is_better=False, ours=False)


def _loader(found: Mapping[str, Any]) -> Iterator[Metric]:
    for row in found["rows"]:
        rates = [rate / 1e6 for rate in row["windows_tokens_s"]]
        name = f"{row['dataset']} T={row['block_size']}"
        yield Metric(name, row["tokens_s"] / 1e6, min(rates), max(rates), "Mtok/s", lower_is_better=False)


def _micro(found: Mapping[str, Any]) -> Iterator[Metric]:
    for row in found["rows"]:
        yield _span(row, row["name"])
