"""What a model in training is worth: the loss of the fixed validation batches, and a sample of its text."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptperf.config import Config
from gptperf.data.loader import validation_batches
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import Tokenizer
from gptperf.distributed.process import Process
from gptperf.model.generate import generate
from gptperf.training.engine import Engine

__all__ = ["evaluate", "sample_text", "validation_keys"]


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
    counted: Iterator[tuple[Tensor, int]] = ((batch, batch.shape[1]) for batch in batches)
    if engine.config.system.use_fsdp and process.world_size > 1:
        counted = _in_step(batches, process, engine.config.model.block_size)
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)  # loss times rows, rows
    engine.model.eval()
    for batch, rows in counted:
        tokens, targets = batch.to(process.device, non_blocking=True)
        with engine.autocast():
            loss = engine.model(tokens, targets)
        sums[0] += loss.double() * rows
        sums[1] += rows
    engine.model.train()
    total, all_rows = process.mean(sums).tolist()
    return total / all_rows


def _in_step(batches: Iterator[Tensor], process: Process, block_size: int) -> Iterator[tuple[Tensor, int]]:
    """A rank's batches with their rows; one of zeros, which do not count, for each that another rank has more.

    So every rank gathers the weights as often.
    """
    filler = torch.zeros(2, 1, block_size, dtype=torch.int64)
    while process.any((batch := next(batches, None)) is not None):
        yield (filler, 0) if batch is None else (batch, batch.shape[1])


def sample_text(engine: Engine, tokenizer: Tokenizer, tokens: int) -> str:
    """Text that a model in training writes after the end of a document."""
    device = engine.process.device
    engine.model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), engine.autocast():
        ids = generate(
            engine.model,
            torch.tensor([tokenizer.eot], device=device),
            tokens,
            vocab_size=tokenizer.vocab_size,
            temperature=0.8,
            top_k=50,
            generator=torch.Generator(device).manual_seed(engine.config.train.seed),
        )
    return tokenizer.decode(ids.tolist())
