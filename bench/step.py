"""Time of a training step: `python -m bench.step [--models ...] [--variants ...] [--steps 31] [--kernels]`.

Protocol: one process, one cell (model and variant) after another; fresh random tokens each step, one
optimizer step a micro-batch; warm-up of 6 steps with the compilation in the first; then steps timed one by one
by CUDA events, with no synchronisation between them; median, 10th and 90th percentile. Peak memory is that
of the whole step. Strict MFU: causal matmul FLOPs over the dense peak of the GPU table. With --kernels, three more
steps under the profiler say where the time goes, by kind of kernel and for the longest kernels.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf import cli
from gptperf.hardware import match_gpu, peak_flop_s
from gptperf.monitor.throughput import Throughput
from gptperf.parallel import start_process
from gptperf.step import Engine, build_engine, compile_engine, train_step

MODELS = {
    "llama_1.36b": ["configs/llama_1.36b.toml", "--batch_size=16"],
    "gpt2_124m": ["configs/gpt2_124m.toml", "--norm_position=pre", "--batch_size=64"],
}
VARIANTS = {
    "eager": ["--compile=False", "--kernels=eager"],
    "compiled": ["--compile=True", "--kernels=eager"],
    "compiled_block": ["--compile=True", "--kernels=eager", "--compile_scope=block"],
    "triton": ["--compile=False", "--kernels=triton"],
    "triton+compiled": ["--compile=True", "--kernels=triton"],
    "auto+compiled": ["--compile=True", "--kernels=auto"],
}
WARM_UP = 6
PROFILED = 3
KINDS = {"GEMM": ("nvjet", "gemm", "cutlass"), "attention": ("cudnn", "flash", "fmha"), "Inductor": ("triton_",)}


def random_batches(engine: Engine) -> Iterator[Tensor]:
    """Fresh tokens for ever, made on the device."""
    config, device = engine.config, engine.process.device
    shape = (config.train.batch_size, config.model.block_size + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, device=device)
        yield torch.stack([tokens[:, :-1], tokens[:, 1:]])


def kernel_times(engine: Engine, batches: Iterator[Tensor], step: int) -> dict[str, Any]:
    """Milliseconds a step on the GPU: by kind of kernel, and of the 25 longest kernels with their calls a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(PROFILED):
            train_step(engine, batches, step + i)
        torch.cuda.synchronize()
    times = [(e.key, e.self_device_time_total / 1e3 / PROFILED, e.count / PROFILED) for e in profile.key_averages()]
    kinds: dict[str, float] = {}
    for name, ms, _ in times:
        known = (kind for kind, marks in KINDS.items() if any(mark in name for mark in marks))
        kind = next(known, "gptperf" if name.startswith("_") else "other")
        kinds[kind] = kinds.get(kind, 0.0) + ms
    longest = sorted(times, key=lambda row: -row[1])[:25]
    return {"kinds_ms": kinds, "longest": [{"name": n, "ms": ms, "calls": calls} for n, ms, calls in longest]}


def measure(model: str, variant: str, steps: int, kernels: bool) -> dict[str, Any]:
    """One cell: build, compile, warm up, time `steps` steps."""
    argv = [*MODELS[model], "--gradient_accumulation_steps=1", *VARIANTS[variant]]
    config = cli.resolve(argv).config
    process = start_process("cuda")
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    engine = build_engine(config, process)
    scope = compile_engine(engine)
    batches = random_batches(engine)
    first = train_step(engine, batches, 0).loss.item()
    first_s = time.perf_counter() - begun
    for step in range(1, WARM_UP):
        train_step(engine, batches, step)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for step, mark in enumerate(marks[1:], WARM_UP):
        train_step(engine, batches, step)
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    median = statistics.median(times)
    peak_memory_gb = torch.cuda.max_memory_allocated() / 1e9
    peak = peak_flop_s(match_gpu(torch.cuda.get_device_name()), config.system.dtype)
    record = Throughput(config.model, config.tokens_per_iter, 1, peak).record(median)
    return {
        "model": model,
        "variant": variant,
        "compile": scope,
        "step_ms": median,
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[-1 - len(times) // 10],
        "steps": steps,
        "first_step_s": first_s,
        "first_loss": first,
        "peak_memory_gb": peak_memory_gb,
        "ops": engine.ops.chosen,
        **record,
        **(kernel_times(engine, batches, WARM_UP + steps) if kernels else {}),
    }


def main() -> int:
    """Print the table of all cells."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["compiled", "triton+compiled"])
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--kernels", action="store_true", help="profile three more steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.step: no GPU here; a step is timed on a GPU only")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    times = f"{'ms/step':>9}{'p10':>8}{'p90':>8}"
    print(f"{'model':<14}{'variant':<16}{times}{'tokens/s':>11}{'MFU':>8}{'peak GB':>9}{'first s':>9}")
    cells = []
    for model in args.models:
        for variant in args.variants:
            cell = measure(model, variant, args.steps, args.kernels)
            cells.append(cell)
            mfu = f"{cell['mfu_percent']:.2f}%" if "mfu_percent" in cell else "-"
            print(
                f"{model:<14}{variant:<16}{cell['step_ms']:>9.2f}{cell['p10_ms']:>8.1f}{cell['p90_ms']:>8.1f}"
                f"{cell['tokens_per_sec']:>11,.0f}{mfu:>8}{cell['peak_memory_gb']:>9.1f}{cell['first_step_s']:>9.1f}",
                flush=True,
            )
            if args.kernels:
                print("  ms:", ", ".join(f"{kind} {ms:.1f}" for kind, ms in cell["kinds_ms"].items()))
                for row in cell["longest"]:
                    print(f"  {row['ms']:>9.3f} ms {row['calls']:>6.1f} x {row['name'][:100]}")
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cells": cells}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
