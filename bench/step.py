"""Time of a training step: `python -m bench.step [--models ...] [--variants ...] [--steps 31] [--json PATH]`.

Protocol: one process, one cell (model and variant) after another; fresh random tokens each step, one
optimizer step a micro-batch; warm-up of 6 steps with the compilation in the first; then steps timed one by one
by CUDA events, with no synchronisation between them; median, 10th and 90th percentile. Peak memory is that
of the whole step. Strict MFU: causal matmul FLOPs over the dense peak of the GPU table.
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
    "eager": ["--compile=False"],
    "compiled": ["--compile=True"],
    "compiled_block": ["--compile=True", "--compile_scope=block"],
}
WARM_UP = 6


def random_batches(engine: Engine) -> Iterator[Tensor]:
    """Fresh tokens for ever, made on the device."""
    config, device = engine.config, engine.process.device
    shape = (config.train.batch_size, config.model.block_size + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, device=device)
        yield torch.stack([tokens[:, :-1], tokens[:, 1:]])


def measure(model: str, variant: str, steps: int) -> dict[str, Any]:
    """One cell: build, compile, warm up, time `steps` steps."""
    argv = [*MODELS[model], "--gradient_accumulation_steps=1", *VARIANTS[variant]]
    config = cli.resolve(argv).config
    process = start_process("cuda")
    torch.cuda.reset_peak_memory_stats()
    engine = build_engine(config, process)
    scope = compile_engine(engine)
    batches = random_batches(engine)
    begun = time.perf_counter()
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
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        **record,
    }


def main() -> int:
    """Print the table of all cells."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["eager", "compiled"])
    parser.add_argument("--steps", type=int, default=31)
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
            cell = measure(model, variant, args.steps)
            cells.append(cell)
            mfu = f"{cell['mfu_percent']:.2f}%" if "mfu_percent" in cell else "-"
            print(
                f"{model:<14}{variant:<16}{cell['step_ms']:>9.2f}{cell['p10_ms']:>8.1f}{cell['p90_ms']:>8.1f}"
                f"{cell['tokens_per_sec']:>11,.0f}{mfu:>8}{cell['peak_memory_gb']:>9.1f}{cell['first_step_s']:>9.1f}",
                flush=True,
            )
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
