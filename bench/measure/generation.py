"""Times generation: `python -m bench.measure.generation [--models ...] [--batch_sizes 1 32] [--kernels]`.

A model with random weights continues prompts of 16 random tokens by 512 tokens, in bfloat16 with top_k 50. The first
call loads kernels and records the CUDA graph. Then the median of 5 calls counts: the time to the first token of all
prompts (with prefill), and the tokens per second after it. With --kernels, the decode step is replayed under the
profiler, and the longest kernels are printed.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.cells import BATCH_SIZES, GENERATING
from bench.measure.models import MODELS, resolve
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.errors import run_main
from gptperf.model import GPT
from gptperf.model.generate import Sampling, generate
from gptperf.monitor import trace
from gptperf.ops import resolve_ops

__all__ = ["PROTOCOL", "line", "main", "measure"]

PROMPT, NEW = 16, 512
PROTOCOL = __doc__
_CALLS, _PROFILED = 5, 20


def _model(name: str, kernels: str) -> GPT:
    """Returns a model with random weights on the GPU, in the dtypes of a loaded model."""
    with torch.device("cuda"):
        model = GPT(resolve(name, "eager").model, resolve_ops(kernels, "cuda")).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    return model


def _steps(model: GPT, batch_size: int, seed: int, tokens: int = NEW) -> Iterator[list[int]]:
    vocab_size = model.config.vocab_size
    source = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocab_size, (batch_size, PROMPT), generator=source).tolist()
    sources = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
    sampling = Sampling(vocab_size, temperature=0.8, top_k=50)
    return generate(model, prompts, tokens, sampling, sources, dtype=torch.bfloat16)


def _timed(model: GPT, batch_size: int, seed: int) -> tuple[float, float]:
    """Returns the milliseconds to the first token, and the milliseconds of each further step."""
    torch.cuda.synchronize()
    steps, begun = _steps(model, batch_size, seed), time.perf_counter()
    next(steps)
    first = time.perf_counter()
    count = sum(1 for _ in steps)
    return 1e3 * (first - begun), 1e3 * (time.perf_counter() - first) / count


def measure(name: str, batch_size: int, *, kernels: str = "auto", profile: bool = False) -> dict[str, Any]:
    """Measures one model with one batch size.

    Args:
        name: One of `MODELS`.
        batch_size: Number of prompts.
        kernels: Value of the configuration's key.
        profile: Whether to list the longest kernels of a decode step.

    Returns:
        tokens_per_sec, step_ms, first_token_ms, cold_first_token_ms and others.
    """
    model = _model(name, kernels)
    torch.cuda.reset_peak_memory_stats()
    cold_ms, _ = _timed(model, batch_size, 0)
    times = [_timed(model, batch_size, seed) for seed in range(1, _CALLS + 1)]
    first_ms, step_ms = (statistics.median(column) for column in zip(*times, strict=True))
    found: dict[str, Any] = {
        "model": name,
        "batch_size": batch_size,
        "tokens_per_sec": 1e3 * batch_size / step_ms,
        "step_ms": step_ms,
        "steps_ms": [ms for _, ms in times],
        "first_token_ms": first_ms,
        "cold_first_token_ms": cold_ms,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    if profile:
        found["kernels"] = _profiled(model, batch_size)
    return found


def _profiled(model: GPT, batch_size: int) -> list[dict[str, Any]]:
    """Returns the kernels of a decode step, the longest first, and the number of their calls in a step."""
    steps = _steps(model, batch_size, 99)
    for _ in range(8):
        next(steps)
    kernels = trace.kernels_of(trace.trace_steps(lambda _: next(steps), 0, _PROFILED, warm_up=8))
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.duration_us)
    rows = [
        {"name": name, "us": sum(us) / _PROFILED, "calls": len(us) / _PROFILED, "us_a_call": sum(us) / len(us)}
        for name, us in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def line(cell: Mapping[str, Any]) -> str:
    """Returns the row of the table for a result of `measure`."""
    return (
        f"{cell['model']:<14}{cell['batch_size']:>6}{cell['tokens_per_sec']:>12,.0f}{cell['step_ms']:>10.3f}"
        f"{cell['first_token_ms']:>14.1f}{cell['cold_first_token_ms']:>12.0f}{cell['peak_memory_gb']:>9.1f}"
    )


@dataclass(frozen=True, kw_only=True)
class _GenerationFlags(Flags):
    """What to time."""

    models: tuple[Annotated[str, Choice(tuple(MODELS))], ...] = GENERATING
    """Models."""
    batch_sizes: tuple[Annotated[int, Range(1)], ...] = BATCH_SIZES
    """Numbers of prompts that are continued together."""
    implementation: Annotated[str, Choice(("auto", "triton", "eager"))] = "auto"
    """Kernels of the ops, as the key `kernels` of a configuration."""
    kernels: bool = False
    """Print the longest kernels of a decode step."""
    json: Path | None = None
    """Write the results to this file, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each model and batch size."""
    args = parse(_GenerationFlags, argv, "bench.measure.generation", __doc__)
    if not torch.cuda.is_available():
        print("bench.measure.generation: no GPU here; generation is timed on a GPU only")
        return 0
    columns = f"{'model':<14}{'batch':>6}{'tokens/s':>12}{'ms/step':>10}{'first token':>14}{'cold':>12}{'GB':>9}"
    print(columns, flush=True)
    cells = []
    for name in args.models:
        for batch_size in args.batch_sizes:
            cell = measure(name, batch_size, kernels=args.implementation, profile=args.kernels)
            print(line(cell), flush=True)
            for row in cell.get("kernels", [])[:25]:
                print(f"    {row['us']:>9.1f} us {row['calls']:>7.1f} x {row['us_a_call']:>7.2f}  {row['name'][:90]}")
            cells.append(cell)
    if args.json is not None:
        args.json.write_text(json.dumps(cells, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
