"""Measures the cost of monitoring: windows in which some steps are watched, against windows without watched steps.

In a watched step, as at the log line of a run, the figures of `gptperf.monitor.gradients` are computed on the device,
and the host reads them before it enqueues the next step. The time to write the line to console and journal is not
measured.
"""

import statistics
from dataclasses import asdict
from functools import partial
from typing import Any

from bench.measure.models import DEFAULT_VARIANT, resolve
from bench.measure.step import random_batches
from gptperf.distributed.process import start_process
from gptperf.monitor import step_timing
from gptperf.monitor.step_timing import Spread
from gptperf.training.engine import Engine, build_engine, compile_engine
from gptperf.training.step import train_step

__all__ = ["INTERVAL", "PROTOCOL", "measure"]

INTERVAL, STEPS, WINDOWS = 10, 20, 6
PROTOCOL = f"""One engine, new random tokens in every step, one micro-batch per optimizer step. Warm-up: one watched
window. Then {WINDOWS} windows of {STEPS} steps between CUDA events, unwatched (a) and watched (b) in the order a b b a
a b, with one synchronisation at the end of each. In a watched window every {INTERVAL}th step is watched. Figures are
the median, the 10th and the 90th percentile of the windows. The additional time of a watched step is the median of a
difference: the watched step and the next one, which waits for the host, minus two other steps of the same window."""


def measure(model: str, windows: int = WINDOWS) -> dict[str, Any]:
    """Times steps with and without monitoring.

    Args:
        model: One of `bench.measure.models.MODELS`.
        windows: Number of windows of both kinds together.

    Returns:
        config, ops and the figures as results.
    """
    config = resolve(model, DEFAULT_VARIANT)
    engine = build_engine(config, start_process("cuda"))
    scope = compile_engine(engine)
    batches = random_batches(engine.config, engine.process.device)

    def run(watching: bool, step: int) -> None:
        result = train_step(engine, batches, step, watched=watching and _is_watched(step))
        if result.gradients is not None:
            _read(engine, result.gradient_norm.item(), result.gradients.tolist())

    timed = {kind: step_timing.cuda_window(partial(run, kind)) for kind in (False, True)}
    timed[True](0, STEPS)
    means: dict[bool, list[float]] = {False: [], True: []}
    more: list[float] = []
    for number in range(windows):
        kind, first = number % 4 in (1, 2), (number + 1) * STEPS
        times = timed[kind](first, STEPS)
        means[kind].append(statistics.mean(times))
        if kind:
            looked = [place for place in range(STEPS) if _is_watched(first + place)]
            touched = {place + after for place in looked for after in (0, 1)}
            usual = statistics.median(ms for place, ms in enumerate(times) if place not in touched)
            more += [times[place] + times[place + 1] - 2 * usual for place in looked]
    spreads = {kind: Spread.of(found) for kind, found in means.items()}
    figures = {
        "model": model,
        "compile": scope,
        "interval": INTERVAL,
        "steps": STEPS,
        "windows": windows,
        "unwatched": asdict(spreads[False]),
        "watched": asdict(spreads[True]),
        "cost_percent": 100 * (spreads[True].ms / spreads[False].ms - 1),
        "watched_step_ms": asdict(Spread.of(more)),
    }
    return {"config": config.sections(), "ops": dict(engine.ops.chosen), "results": figures}


def _is_watched(step: int) -> bool:
    """Returns whether a step is watched: the middle one of an interval, so that the next step is in the same window."""
    return step % INTERVAL == INTERVAL // 2


def _read(engine: Engine, norm: float, figures: list[float]) -> None:
    """Does what the host does with the figures of a watched step."""
    ratios = len(engine.monitor.components)
    engine.monitor.record(norm, figures[:-ratios], figures[-ratios:])
