"""Evaluates a model in training: the loss on the fixed validation batches, and a sample of generated text."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptperf.config import Config
from gptperf.data.loader import validation_batches, validation_count
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import Tokenizer
from gptperf.distributed.process import Process
from gptperf.model.generate import generate
from gptperf.training.engine import Engine
from gptperf.training.stopping import Dropped

__all__ = ["evaluate", "sample_text", "validation_keys"]


def validation_keys(config: Config, process: Process) -> dict[str, int]:
    """Returns the arguments of `validation_batches`, without the tokens."""
    return {
        "block_size": config.model.block_size,
        "batch_size": config.train.batch_size,
        "max_batches": config.train.eval_iters,
        "rank": process.rank,
        "world_size": process.world_size,
    }


@torch.no_grad()
def evaluate(engine: Engine, val_tokens: TokenSource, drops: Callable[[], bool] | None = None) -> float:
    """Returns the mean loss over the fixed validation batches of all ranks. Collective: every rank must call it.

    Args:
        engine: model and process.
        val_tokens: the validation tokens.
        drops: called between two batches, on every rank equally often; if it returns True, the evaluation is dropped.

    Raises:
        Dropped: the evaluation was dropped.
    """
    process, keys = engine.process, validation_keys(engine.config, engine.process)
    batches = validation_batches(val_tokens, **keys)
    rank, world_size = keys.pop("rank"), keys.pop("world_size")
    count = validation_count(val_tokens, **keys)
    process.progress.parts = process.progress.part + len(range(rank, count, world_size))
    common = count // world_size  # batches that every rank has
    counted: Iterator[tuple[Tensor, int]] = ((batch, batch.shape[1]) for batch in batches)
    if engine.config.system.use_fsdp and process.world_size > 1:
        counted = _as_many_as_any_rank(batches, process, engine.config.model.block_size)
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)  # loss times rows, rows
    engine.model.eval()
    for i, (batch, rows) in enumerate(counted):
        if 0 < i < common and drops is not None and drops():
            engine.model.train()
            raise Dropped
        sums[0] += _loss(engine, batch).double() * rows
        sums[1] += rows
        process.progress.end_part()
    engine.model.train()
    total, all_rows = process.mean(sums).tolist()
    return total / all_rows


def _loss(engine: Engine, batch: Tensor) -> Tensor:
    """Returns the loss of a batch `(2, B, T)`, a float32 scalar."""

    def forward(on_device: Tensor) -> Tensor:
        with engine.autocast():
            return engine.model(on_device[0], on_device[1])

    graphs = engine.graphs
    whole = batch.shape[1] == engine.config.train.batch_size  # the last batch may have fewer rows
    if graphs is None or not whole or engine.weights.is_sharded:
        return forward(batch.to(engine.process.device, non_blocking=True))
    static = graphs.static(batch)
    return graphs.run("evaluation", lambda: forward(static))


def _as_many_as_any_rank(batches: Iterator[Tensor], process: Process, block_size: int) -> Iterator[tuple[Tensor, int]]:
    """Yields a rank's batches with their numbers of rows, then batches of zeros until no rank has another batch.

    Every forward pass of FSDP gathers the weights from all ranks, so every rank must run the same number of them. A
    batch of zeros counts as 0 rows, so it does not change the mean.
    """
    filler = torch.zeros(2, 1, block_size, dtype=torch.int64)
    while process.any((batch := next(batches, None)) is not None):
        yield (filler, 0) if batch is None else (batch, batch.shape[1])


def sample_text(engine: Engine, tokenizer: Tokenizer, tokens: int, drops: Callable[[], bool] | None = None) -> str:
    """Returns text that a model in training generates after the end of a document.

    Under FSDP the caller must hold all weights (`weights.gathered()`), because a rank may sample alone.

    Args:
        engine: the model.
        tokenizer: decodes the tokens.
        tokens: number of tokens.
        drops: called before each token; if it returns True, the sample is dropped.

    Raises:
        Dropped: the sample was dropped.
    """

    def before_token() -> None:
        if drops is not None and drops():
            raise Dropped

    device = engine.process.device
    engine.model.eval()
    # Where nothing was compiled, the compiler is not loaded: its import takes seconds and needs a cache folder.
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.no_grad(), stance, engine.autocast():
        ids = generate(
            engine.model,
            torch.tensor([tokenizer.eot], device=device),
            tokens,
            vocab_size=tokenizer.vocab_size,
            temperature=0.8,
            top_k=50,
            generator=torch.Generator(device).manual_seed(engine.config.train.seed),
            before_token=before_token,
        )
    return tokenizer.decode(ids.tolist())
