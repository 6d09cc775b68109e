"""Evaluates a model in training: the loss on the fixed validation batches, scores of tasks, and a sample of text."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from gptperf.config import Config
from gptperf.data.loader import validation_batches, validation_count
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import Tokenizer
from gptperf.distributed.process import Process
from gptperf.model import GPT
from gptperf.model.generate import Sampling, generate
from gptperf.tasks import Scores, TaskRequests, task_scores
from gptperf.tasks.likelihood import likelihoods
from gptperf.training.engine import Engine
from gptperf.training.stopping import Dropped

__all__ = ["evaluate", "mean_loss", "sample_text", "score_tasks", "validation_keys"]


def validation_keys(config: Config, process: Process) -> dict[str, int]:
    """Returns the arguments of `validation_batches`, without the tokens."""
    return {
        "block_size": config.model.block_size,
        "batch_size": config.train.batch_size,
        "max_batches": config.train.eval_iters,
        "rank": process.rank,
        "world_size": process.world_size,
    }


def evaluate(engine: Engine, val_tokens: TokenSource, drops: Callable[[], bool] | None = None) -> float:
    """Returns the mean loss over the fixed validation batches of all ranks. Collective: every rank must call it.

    Args:
        engine: model and process.
        val_tokens: the validation tokens.
        drops: called between two batches, on every rank equally often; if it returns True, the evaluation is dropped.

    Raises:
        Dropped: the evaluation was dropped.
    """
    keys = validation_keys(engine.config, engine.process)
    sharded = engine.config.system.use_fsdp
    where = (engine.model, val_tokens, keys, engine.process, engine.autocast)
    return mean_loss(*where, drops, sharded=sharded, loss=partial(_replayed, engine))


@torch.no_grad()
def mean_loss(
    model: GPT,
    source: TokenSource,
    keys: dict[str, int],
    process: Process,
    autocast: Callable[[], AbstractContextManager[object]],
    drops: Callable[[], bool] | None = None,
    *,
    sharded: bool = False,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Returns the mean loss of a model over fixed batches, and leaves the model in its mode. See `evaluate`.

    Args:
        model: the model.
        source: a split of a data set.
        keys: the result of `validation_keys`.
        process: this rank.
        autocast: returns the context in which the model computes.
        drops: see `evaluate`.
        sharded: whether a forward pass gathers the weights from all ranks.
        loss: returns the loss of a batch `(2, B, T)` on the host; default: one forward pass.
    """
    keys, training = dict(keys), model.training
    batches = validation_batches(source, **keys)
    rank, world_size = keys.pop("rank"), keys.pop("world_size")
    count = validation_count(source, **keys)
    process.progress.parts = process.progress.part + len(range(rank, count, world_size))
    common = count // world_size  # batches that every rank has
    after = process.progress.part + -(-count // world_size)
    counted: Iterator[tuple[Tensor, int]] = ((batch, batch.shape[1]) for batch in batches)
    if sharded and process.world_size > 1:
        counted = _as_many_as_any_rank(batches, process, keys["block_size"])
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)  # loss times rows, rows
    model.eval()
    for i, (batch, rows) in enumerate(counted):
        if 0 < i < common and drops is not None and drops():
            model.train(training)
            raise Dropped
        sums[0] += (_loss(model, autocast, process, batch) if loss is None else loss(batch)).double() * rows
        sums[1] += rows
        process.progress.end_part()
    model.train(training)
    process.progress.part = after  # the same on every rank, as `drops` needs it
    total, all_rows = process.mean(sums).tolist()
    return total / all_rows


def _loss(
    model: GPT, autocast: Callable[[], AbstractContextManager[object]], process: Process, batch: Tensor
) -> Tensor:
    """Returns the loss of a batch `(2, B, T)`, a float32 scalar."""
    inputs, targets = batch.to(process.device, non_blocking=True)
    with autocast():
        return model(inputs, targets)


def _replayed(engine: Engine, batch: Tensor) -> Tensor:
    """Returns the loss of a batch `(2, B, T)`, by a CUDA graph where the run has them."""
    forward = partial(_loss, engine.model, engine.autocast, engine.process)
    graphs = engine.graphs
    whole = batch.shape[1] == engine.config.train.batch_size  # the last batch may have fewer rows
    if graphs is None or not whole or engine.weights.is_sharded:
        return forward(batch)
    return graphs.run("evaluation", partial(forward, graphs.static(batch)))


def _as_many_as_any_rank(batches: Iterator[Tensor], process: Process, block_size: int) -> Iterator[tuple[Tensor, int]]:
    """Yields a rank's batches with their numbers of rows, then batches of zeros until no rank has another batch.

    Every forward pass of FSDP gathers the weights from all ranks, so every rank must run the same number of them. A
    batch of zeros counts as 0 rows, so it does not change the mean.
    """
    filler = torch.zeros(2, 1, block_size, dtype=torch.int64)
    while process.any((batch := next(batches, None)) is not None):
        yield (filler, 0) if batch is None else (batch, batch.shape[1])


def score_tasks(
    engine: Engine, tasks: Sequence[TaskRequests], drops: Callable[[], bool] | None = None
) -> dict[str, Scores]:
    """Returns the scores of tasks by their names. Collective: every rank must call it.

    A batch has as many tokens as a micro-batch of training, so that it needs no more memory.

    Args:
        engine: model and process.
        tasks: the tasks.
        drops: see `evaluate`.

    Raises:
        Dropped: the evaluation was dropped.
    """
    config, scores = engine.config, dict[str, Scores]()
    batch_tokens = config.train.batch_size * config.model.block_size
    for task in tasks:
        if scores and drops is not None and drops():
            raise Dropped
        found = likelihoods(engine.model, task.requests, engine.process, engine.autocast, batch_tokens, drops)
        if found is None:
            raise Dropped
        scores[task.task.name] = task_scores(task, found)
    return scores


@contextlib.contextmanager
def _any_algorithm() -> Iterator[None]:
    """Permits ops without a deterministic algorithm: on a GPU, PyTorch refuses the prefix sum of a draw otherwise."""
    if not torch.are_deterministic_algorithms_enabled():
        yield  # the functions below load torch.compile
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def sample_text(engine: Engine, tokenizer: Tokenizer, tokens: int, drops: Callable[[], bool] | None = None) -> str:
    """Returns a document that a model in training writes, or its first tokens.

    Under FSDP the caller must hold all weights (`weights.gathered()`), because a rank may sample alone.

    Args:
        engine: the model.
        tokenizer: decodes the tokens.
        tokens: number of tokens.
        drops: called before each token; if it returns True, the sample is dropped.

    Raises:
        Dropped: the sample was dropped.
    """
    engine.model.eval()
    # Where nothing was compiled, the compiler is not loaded: its import takes seconds and needs a cache folder.
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    drawn = generate(
        engine.model,
        [[tokenizer.eot]],
        tokens,
        Sampling(tokenizer.vocab_size, temperature=0.8, top_k=50),
        [torch.Generator().manual_seed(engine.config.train.seed)],
        capture=False,  # one sample does not repay a recording, and the weights may move after it
    )
    ids: list[int] = []
    with stance, engine.autocast(), _any_algorithm():
        while len(ids) < tokens:
            if drops is not None and drops():
                raise Dropped
            (token,) = next(drawn)
            if token == tokenizer.eot:
                break
            ids.append(token)
    return tokenizer.decode(ids)
