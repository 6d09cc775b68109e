"""Times a training step: `python -m bench.measure.step [--models ...] [--variants ...] [--steps 31] [--kernels]`.

It measures one cell (a model and a variant of `bench.measure.models`) after another in one process, by the protocol of
`gptperf.monitor.step_timing`. MFU is strict: causal matmul FLOPs divided by the dense peak of the GPU table. With
--kernels, five more steps under the profiler show where the time goes. `python -m bench` runs the same cells, each in a
process of its own, and others.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from bench.measure import timing
from bench.measure.models import MODELS, VARIANTS, resolve
from bench.measure.serial import serial_ms
from gptperf import flops, plan
from gptperf.config import Config
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.distributed.process import Process, start_process
from gptperf.errors import run_main
from gptperf.flops.float8 import float8_flops
from gptperf.formats import mfu_scale
from gptperf.hardware import Peak, gpu_state, match_gpu, peak_flop_s
from gptperf.monitor import step_timing, trace, waterfall
from gptperf.monitor.throughput import Throughput
from gptperf.training.engine import build_engine, compile_engine, open_graphs
from gptperf.training.step import StepResult, train_step

__all__ = [
    "conventions",
    "main",
    "measure",
    "measure_config",
    "micro_batch_ms",
    "of_serial",
    "peak_here",
    "planned_here",
]
__all__ += ["profiled", "random_batches"]

PROFILED = 5
WARM_UP_MS = 2000.0  # time of warm-up before profiled steps, after which the card runs at its power cap again
_PROBE = 8192


def random_batches(config: Config, device: torch.device, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields batches of new random tokens without end, made on the device.

    Args:
        config: Configuration with the shape of a batch.
        device: Device of the batches.
        generator: Source of the tokens; default: the device's own generator.
    """
    shape = (config.train.batch_size, config.model.block_size + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, device=device, generator=generator)
        yield torch.stack([tokens[:, :-1], tokens[:, 1:]])


def peak_here(config: Config) -> Peak | None:
    """Returns the dense peak of the current device, or None (then there is no MFU) if the table does not have it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return peak_flop_s(match_gpu(properties.name, properties.total_memory / 1e9), config.system.peak_dtype)


def planned_here(config: Config) -> plan.Plan | None:
    """Returns the plan of a run on this GPU, or None if it is not known."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = match_gpu(properties.name, properties.total_memory / 1e9)
    if gpu is None or plan.unplannable(config, gpu) is not None:
        return None
    return plan.plan(config, gpu, recompute=config.system.recompute)


def micro_batch_ms(config: Config) -> float | None:
    """Returns the planned milliseconds of a micro-batch on this GPU, or None if they are not known."""
    planned = planned_here(config)
    return None if planned is None else planned.step_ms / config.train.gradient_accumulation_steps


def conventions(config: Config, tokens_per_sec: float, peak: Peak | None) -> dict[str, dict[str, float | None]]:
    """Returns TFLOP/s and MFU in percent for every convention that can count this model; without a peak MFU is None."""
    found: dict[str, dict[str, float | None]] = {}
    for name, convention in flops.CONVENTIONS.items():
        if convention.uncountable(config.model) is not None:
            continue
        again = config.system.recompute if name == "hfu" else "none"
        count = flops.flops_per_token(config.model, name, recompute=again)
        achieved = float(count.training_per_token) * tokens_per_sec
        percent = None if peak is None else 100 * achieved / peak.flop_s
        found[name] = {"tflops": achieved / 1e12, "mfu_percent": percent}
    return found


def of_serial(config: Config, step_ms: float, ceilings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the serial roofline of the step and its fraction of the step time, or the reason why there is none."""
    if ceilings is None:
        return {"reason": "no ceilings were measured in this run"}
    parts = serial_ms(config, ceilings)
    total = sum(parts.values())
    return {"parts_ms": parts, "roofline_ms": total, "fraction": total / step_ms, "ceilings_of": ceilings["date"]}


def _probe_tflops() -> float:
    """Measures the TFLOP/s of one large matrix product, which shows the current state of the card."""
    a, b, c = (torch.randn(_PROBE, _PROBE, device="cuda", dtype=torch.float16) for _ in range(3))
    work = timing.Work(lambda: torch.mm(a, b, out=c))
    work.window(3)
    return 2 * _PROBE**3 / work.window(150) / 1e9


def profiled(run: Callable[[int], object], first: int, config: Config, step_ms: float) -> dict[str, Any]:
    """Profiles steps, and returns milliseconds by part and, if the peak of the GPU is known, the waterfall."""
    warm_up = math.ceil(WARM_UP_MS / step_ms)
    kernels = trace.kernels_of(trace.trace_steps(run, first, PROFILED, warm_up=warm_up))
    found = waterfall.breakdown(kernels, PROFILED)
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.duration_us / 1e3)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:25]
    record: dict[str, Any] = {
        "profiled_step_ms": found.step_ms,
        "parts_ms": found.parts_ms,
        "hidden_communication_ms": found.hidden_communication_ms,
        "unknown_ms": dict(list(found.unknown_ms.items())[:25]),
        "longest": [
            {
                "name": name,
                "part": waterfall.classify(name),
                "ms": sum(ms) / PROFILED,
                "calls": len(ms) / PROFILED,
            }
            for name, ms in longest
        ],
    }
    peak = peak_here(config)
    if peak is None:
        return record | {"waterfall": None, "reason": "no peak is known for this GPU, so no MFU"}
    fall = waterfall.waterfall(found, waterfall.step_flops(config, peak=peak), peak.flop_s, step_ms)
    return record | {
        "waterfall": fall.lost_points,
        "mfu_percent": fall.mfu_percent,
        "timed_mfu_percent": fall.timed_mfu_percent,
        "off_points": fall.off_points,
        "closes": fall.closes,
        "convention": "strict",
        **peak.record(),
    }


def measure(
    model: str,
    variant: str,
    steps: int,
    *,
    profile: bool = False,
    ceilings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures one cell: builds, compiles, warms up and times `steps` steps.

    Args:
        model: One of `MODELS`.
        variant: One of `VARIANTS`.
        steps: Number of timed steps.
        profile: Whether to profile more steps afterwards.
        ceilings: Ceilings of this card, for the serial roofline.

    Returns:
        config, ops, and the figures as results; an unknown figure is None.
    """
    found = measure_config(resolve(model, variant), steps, profile=profile, ceilings=ceilings)
    return {**found, "results": {"model": model, "variant": variant, **found["results"]}}


def measure_config(
    config: Config, steps: int, *, profile: bool = False, ceilings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Measures a step of any configuration, in the way of `measure`."""
    process = start_process("cuda")
    before = _probe_tflops()
    torch.cuda.empty_cache()
    figures, ops = _timed(config, process, steps, profile, ceilings)
    gc.collect()
    torch.cuda.empty_cache()
    figures["probe_tflops"] = {"before": before, "after": _probe_tflops()}
    return {"config": config.sections(), "ops": ops, "results": figures}


def _timed(
    config: Config, process: Process, steps: int, profile: bool, ceilings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the figures and the ops of a step. When it returns, the memory of the engine is free."""
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    engine = build_engine(config, process)
    scope = compile_engine(engine)
    graphs = open_graphs(engine, micro_batch_ms(config), print)
    batches = random_batches(config, process.device)

    def run(step: int) -> StepResult:
        return train_step(engine, batches, step)

    first_loss = run(0).loss.item()
    first_s = time.perf_counter() - begun
    meter = step_timing.EnergyMeter(timing.device_uuid())
    states: list[dict[str, Any]] = []
    watch = partial(_watch, states)
    timed = step_timing.time_steps(step_timing.cuda_window(run, watch), steps, meter.joules, meter.reason)
    peak_memory_gb = torch.cuda.max_memory_allocated() / 1e9
    spread, peak = timed.spread, peak_here(config)
    throughput = Throughput(config.model, config.tokens_per_iter, 1, peak, float8_flops=float8_flops(config))
    record = throughput.record(spread.ms)
    figures: dict[str, Any] = {
        "compile": scope,
        "cuda_graph": graphs,
        "step_ms": spread.ms,
        "p10_ms": spread.p10_ms,
        "p90_ms": spread.p90_ms,
        "steps": steps,
        "tokens_per_step": config.tokens_per_iter,
        "warm_up_steps": timed.warm_up_steps,
        "stable": timed.stable,
        "first_step_s": first_s,
        "first_loss": first_loss,
        "peak_memory_gb": peak_memory_gb,
        **record,
        "conventions": conventions(config, record["tokens_per_sec"], peak),
        "serial": of_serial(config, spread.ms, ceilings),
        "joules_per_token": None if timed.joules is None else timed.joules / (config.tokens_per_iter * steps),
        "no_joules": timed.no_joules,
        "state_under_load": states[-1],
    }
    if profile:
        figures["profile"] = profiled(run, timed.warm_up_steps + steps, config, spread.ms)
    return figures, dict(engine.ops.chosen)


def _watch(states: list[dict[str, Any]]) -> None:
    states.append(gpu_state(timing.device_uuid()).as_dict())


def _line(cell: Mapping[str, Any]) -> str:
    mfu = f"{cell['mfu_percent']:.2f}%" if "mfu_percent" in cell else "-"
    return (
        f"{cell['model']:<14}{cell['variant']:<16}{cell['step_ms']:>9.2f}{cell['p10_ms']:>8.1f}{cell['p90_ms']:>8.1f}"
        f"{cell['tokens_per_sec']:>11,.0f}{mfu:>8}{cell['peak_memory_gb']:>9.1f}{cell['first_step_s']:>9.1f}"
    )


@dataclass(frozen=True, kw_only=True)
class _StepFlags(Flags):
    """What to time."""

    models: tuple[Annotated[str, Choice(tuple(MODELS))], ...] = tuple(MODELS)
    """Models."""
    variants: tuple[Annotated[str, Choice(tuple(VARIANTS))], ...] = ("compiled", "triton")
    """Variants of each model."""
    steps: Annotated[int, Range(1)] = 31
    """Steps that are timed."""
    kernels: bool = False
    """Profile five more steps, and print the longest kernels."""
    json: Path | None = None
    """Write the cells to this file, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the chosen cells."""
    args = parse(_StepFlags, argv, "bench.measure.step", __doc__)
    if not torch.cuda.is_available():
        print("bench.measure.step: no GPU here; a step is timed on a GPU only")
        return 0
    made_by = timing.environment()
    print(f"{made_by['device']}, torch {torch.__version__}")
    times = f"{'ms/step':>9}{'p10':>8}{'p90':>8}"
    print(f"{'model':<14}{'variant':<16}{times}{'tokens/s':>11}{'MFU':>8}{'peak GB':>9}{'first s':>9}")
    cells = []
    for model in args.models:
        for variant in args.variants:
            cell = measure(model, variant, args.steps, profile=args.kernels)
            cells.append(cell)
            print(_line(cell["results"]), flush=True)
            if args.kernels:
                profile = cell["results"]["profile"]
                print("  ms:", ", ".join(f"{part} {ms:.1f}" for part, ms in profile["parts_ms"].items()))
                for row in profile["longest"]:
                    print(f"  {row['ms']:>9.3f} ms {row['calls']:>6.1f} x {row['name'][:100]}")
            torch._dynamo.reset()
    print(f"MFU: {mfu_scale({'convention': 'strict'} | cells[0]['results'])}")
    if args.json:
        record = {"protocol": step_timing.STEP_PROTOCOL, "environment": made_by, "cells": cells}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
