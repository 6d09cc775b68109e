"""The loss of the fixed validation batches."""

import torch

from gptperf.config import Config
from gptperf.data.loader import validation_batches
from gptperf.data.shards import TokenSource
from gptperf.parallel import Process
from gptperf.step import Engine

__all__ = ["evaluate", "validation_keys"]


def validation_keys(config: Config, process: Process) -> dict[str, int]:
    """What `validation_batches` takes beside the tokens."""
    return {
        "block_size": config.model.block_size,
        "batch_size": config.train.batch_size,
        "max_batches": config.train.eval_iters,
        "rank": process.rank,
        "world_size": process.world_size,
    }


@torch.no_grad()
def evaluate(engine: Engine, val_tokens: TokenSource) -> float:
    """Mean loss over the fixed validation batches of all processes."""
    process = engine.process
    batches = validation_batches(val_tokens, **validation_keys(engine.config, process))
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)  # loss times rows, rows
    engine.model.eval()
    for batch in batches:
        tokens, targets = batch.to(process.device, non_blocking=True)
        with engine.autocast():
            loss = engine.model(tokens, targets)
        sums[0] += loss.double() * len(tokens)
        sums[1] += len(tokens)
    engine.model.train()
    total, rows = process.mean(sums).tolist()
    return total / rows
