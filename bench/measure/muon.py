"""Times Muon: `python -m bench.measure.muon [--model CONFIG] [--rounds 11] [--json PATH]`.

First the symmetric products, batched over 24 matrices of 2048 x 2048 and of 2048 x 5632 in float16: x x^T, and
b A + c A A of the result. Our kernel and torch.baddbmm take turns, in windows of 300 ms, in which the power cap shows.
Then one update of the model by AdamW, Muon and NorMuon, with the ops and torch.compile of
a run, by the protocol of `bench.measure.timing`; gradients are random numbers. Needs a GPU.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.measure import timing
from bench.measure.timing import Spread, Work
from gptperf.config import Config, command_line
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Range
from gptperf.distributed.process import start_process
from gptperf.errors import run_main
from gptperf.kernels import reference
from gptperf.ops import resolve_ops
from gptperf.plan.step_time import optimizer_flops
from gptperf.training.engine import build_engine, compile_engine

__all__ = ["main", "measure_products", "measure_updates"]

Row = dict[str, Any]
SHAPES = ((24, 2048, 2048), (24, 2048, 5632))
OPTIMIZERS = {"adamw": [], "muon": ["--optimizer=muon"], "normuon": ["--optimizer=muon", "--normuon=True"]}
_WINDOW_MS = 300.0


@dataclass(frozen=True, kw_only=True)
class MuonFlags(Flags):
    """What to time."""

    model: str = "llama_1.36b"
    """Configuration of the model whose update is timed."""
    rounds: Annotated[int, Range(1)] = 11
    """Rounds over the implementations."""
    json: Path | None = None
    """Write the rows to this file, too."""


def measure_products(shape: tuple[int, int, int], rounds: int, device: str = "cuda") -> list[Row]:
    """Returns the time of both products of one shape by torch.bmm and by our kernel, and how much faster ours is."""
    ours = resolve_ops("triton", device).symmetric_matmul
    x = torch.randn(shape, device=device, dtype=torch.float16) / shape[2] ** 0.5
    gram = reference.symmetric_matmul(x)
    rows = []
    for name, arguments in (("x x^T", (x,)), ("b A + c A A", (gram, None, gram, -2.8, 4.0))):
        functions = {"torch": reference.symmetric_matmul, "triton": ours}
        works = {impl: Work(partial(function, *arguments)) for impl, function in functions.items()}
        times = {impl: Spread.of(found) for impl, found in timing.alternate(works, rounds, _WINDOW_MS).items()}
        B, M, K = arguments[0].shape
        full = 2 * B * M * M * K
        rows += [
            {
                "product": name,
                "shape": [B, M, K],
                "impl": impl,
                **asdict(spread),
                "full_tflop_s": full / spread.ms / 1e9,
                "times_torch": times["torch"].ms / spread.ms,
            }
            for impl, spread in times.items()
        ]
    return rows


def _work(config: Config) -> Work:
    """Returns the update of a model with random gradients, as a run makes it."""
    engine = build_engine(config, start_process("cuda"))
    compile_engine(engine)
    for bucket in engine.weights.buckets:
        bucket.master.grad = bucket.grad.normal_(std=1e-6)
    return Work(engine.optimizer.step, keep=engine)


def measure_updates(model: str, rounds: int) -> list[Row]:
    """Returns the time of one update of a model by each optimizer, and the TFLOP of its products."""
    configs = {name: command_line.resolve([model, *flags]).config for name, flags in OPTIMIZERS.items()}
    times = timing.alternate({name: _work(config) for name, config in configs.items()}, rounds, _WINDOW_MS)
    return [
        {
            "model": model,
            "optimizer": name,
            **asdict(Spread.of(times[name])),
            "products_tflop": optimizer_flops(config, halved=True) / 1e12,
        }
        for name, config in configs.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    args = parse(MuonFlags, argv, "bench.measure.muon", __doc__)
    if not torch.cuda.is_available():
        print("bench.measure.muon: no GPU here")
        return 0
    record: Row = {"environment": timing.environment(), "products": [], "updates": []}
    with timing.side_stream():
        for shape in SHAPES:
            for row in measure_products(shape, args.rounds):
                record["products"].append(row)
                size = "x".join(map(str, row["shape"]))
                speed = f"{row['ms']:9.3f} ms {row['full_tflop_s']:7.0f} TFLOP/s of the full product"
                print(
                    f"{row['product']:<12} {size:<14} {row['impl']:<7} {speed} {row['times_torch']:6.2f}x", flush=True
                )
        for row in measure_updates(args.model, args.rounds):
            record["updates"].append(row)
            print(f"{row['model']} {row['optimizer']:<8} {row['ms']:9.2f} ms {row['products_tflop']:6.1f} TFLOP")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
