"""Log-likelihoods of continuations under a model, in batches, on all ranks of a job."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from gptperf.distributed.process import Process
from gptperf.model import GPT
from gptperf.tasks.requests import Request
from gptperf.tasks.scores import Likelihood

__all__ = ["batches_of", "likelihoods"]

_LOGITS = 1 << 25
"""Most float32 logits in memory at once: 134 MB."""


def batches_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Returns the numbers of the sequences of each batch: the longest first, so that little is padded.

    Args:
        lengths: Tokens of each sequence.
        tokens: Most tokens of a batch with its padding; a longer sequence is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches: list[list[int]] = []
    for number in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


@torch.no_grad()
def likelihoods(
    model: GPT,
    requests: Sequence[Request],
    process: Process,
    autocast: Callable[[], AbstractContextManager[object]],
    batch_tokens: int,
    drops: Callable[[], bool] | None = None,
) -> list[Likelihood] | None:
    """Returns the log-likelihood of every request on every rank. Collective: every rank must call it.

    The batches do not depend on the number of ranks, and batch i is computed by rank i % world_size. Every rank runs
    the model equally often, because under FSDP a forward pass gathers weights from all ranks. Only the logits of the
    continuations are computed. The model is left in the mode that it was in, and no random state changes.

    Args:
        model: The model.
        requests: The same on every rank.
        process: This rank.
        autocast: Returns the context in which the model computes.
        batch_tokens: Most tokens of a batch.
        drops: Called between two batches, on every rank equally often; if it returns True, the rest is dropped.

    Returns:
        One for each request, in their order; None if the rest was dropped.
    """
    batches = batches_of([len(request.ids) - 1 for request in requests], batch_tokens)
    rounds = -(-len(batches) // process.world_size)
    process.progress.parts = process.progress.part + rounds
    # Shapes change from batch to batch, so that compiled code would be compiled again and again. Where nothing was
    # compiled, the compiler is not loaded.
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    training, found = model.training, list[tuple[list[int], Tensor]]()
    model.eval()
    try:
        with stance, autocast():
            for i in range(rounds):
                if i and drops is not None and drops():
                    return None
                place = i * process.world_size + process.rank
                mine = batches[place] if place < len(batches) else []
                values = _batch(model, [requests[number] for number in mine], process.device)
                found.append((mine, values))
                process.progress.end_part()
    finally:
        model.train(training)
    own = [one for numbers, values in found for one in _summed(numbers, requests, values)]
    whole: dict[int, Likelihood] = {number: one for part in process.gather(own) for number, one in part}
    return [whole[number] for number in range(len(requests))]


def _batch(model: GPT, rows: Sequence[Request], device: torch.device) -> Tensor:
    """Returns log-probability, and whether it is the largest, of every token of the continuations, (2, N) float32.

    Without rows the model runs on one token, and nothing is returned.
    """
    width = max((len(row.ids) - 1 for row in rows), default=1)
    tokens = torch.zeros(max(len(rows), 1), width, dtype=torch.int64)  # padded on the right, which causality hides
    places, targets = list[Tensor](), list[Tensor]()
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        last = len(ids) - 1
        tokens[i, :last] = ids[:-1]
        places.append(torch.arange(last - row.targets, last) + i * width)
        targets.append(ids[-row.targets :])
    hidden = model.hidden(tokens.to(device))
    if not rows:
        return torch.zeros(2, 0)
    chosen = hidden.flatten(0, 1)[torch.cat(places).to(device)]  # (N, C)
    wanted = torch.cat(targets).to(device)
    size = max(1, _LOGITS // model.config.padded_vocab_size)
    parts: Iterable[tuple[Tensor, Tensor]] = zip(chosen.split(size), wanted.split(size), strict=True)
    return torch.cat([_log_probabilities(model.logits(x), target) for x, target in parts], dim=1)


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    of_target = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return torch.stack([of_target, (logits.argmax(1) == targets).float()])


def _summed(numbers: Sequence[int], requests: Sequence[Request], values: Tensor) -> Iterable[tuple[int, Likelihood]]:
    """Yields the number of each request of a batch with the sum over its tokens, in float64."""
    logs, greedy = values.cpu().double().numpy()
    place = 0
    for number in numbers:
        mine = slice(place, place + requests[number].targets)
        place = mine.stop
        yield number, Likelihood(float(logs[mine].sum()), bool(greedy[mine].all()))
