"""Trains small models in one of several processes: `python tests/parallel_worker.py CASES.json OUT`, as torchrun starts it.

A case is a list of flags; its figures go to OUT/CASE-RANK.json. Every case sees the same tokens in the same order,
whatever the number of processes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf import cli
from gptperf.config import Config
from gptperf.parallel import Process, start_process
from gptperf.step import Engine, build_engine, compile_engine, train_step

STEPS = 4


def batches(config: Config, process: Process) -> Iterator[Tensor]:
    """This process's micro-batches of the job's."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, config.train.batch_size, config.model.block_size)
    while True:
        for micro in range(config.train.gradient_accumulation_steps):
            tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
            if micro % process.world_size == process.rank:
                yield tokens


def masters(engine: Engine) -> dict[str, Any]:
    """Sums of the pieces of the master weights that this process saves."""
    found: dict[str, float] = {}
    for piece in engine.weights.pieces(lambda bucket: bucket.master.data, to_save=True):
        found[piece.name] = found.get(piece.name, 0.0) + piece.values.double().square().sum().item()
    return found


def run(flags: list[str], process: Process) -> dict[str, Any]:
    """Losses, gradient norms and weights of a few steps."""
    torch._dynamo.reset()
    config = cli.resolve(flags, world_size=process.world_size).config
    engine = build_engine(config, process)
    engine.weights.share()
    compile_engine(engine)
    data, losses, norms, moments = batches(config, process), [], [], []
    for step in range(STEPS):
        result = train_step(engine, data, step, with_moments=True)
        losses.append(process.mean(result.loss.clone()).item())
        norms.append(result.gradient_norm.item())
        assert result.moments is not None
        moments.append(result.moments.tolist())
        if step == 1:  # an evaluation between two steps reads the weights as they are, and leaves no trace
            with torch.no_grad(), engine.autocast():
                tokens = torch.arange(2 * config.model.block_size, device=process.device) % config.model.vocab_size
                evaluated = engine.model(tokens.view(2, -1), tokens.view(2, -1)).item()
    with engine.weights.gathered():
        state = sum(p.detach().double().square().sum().item() for p in engine.model.parameters())
    return {
        "losses": losses,
        "norms": norms,
        "moments": moments,
        "evaluated": evaluated,
        "masters": masters(engine),
        "weights": state,
        "decayed": sorted(name for b in engine.weights.buckets if b.decayed for name in b.names),
        "held": sum(b.master.numel() for b in engine.weights.buckets),
    }


def main() -> None:
    """Run all cases."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    process = start_process(sys.argv[3] if len(sys.argv) > 3 else "cpu")
    for name, flags in cases.items():
        (out / f"{name}-{process.rank}.json").write_text(json.dumps(run(flags, process)))
    process.close()


if __name__ == "__main__":
    main()
