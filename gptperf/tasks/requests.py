"""Turns the items of a task into token sequences whose continuations a model scores. Loads no torch.

Context and continuation are encoded together, because the tokens of a text depend on what stands around it, and cut
where the tokens of the context alone end, as in lm-evaluation-harness. White space at the end of a context belongs to
the continuation, because a vocabulary has it at the start of the next token. A continuation without a context follows
the token that ends a document.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptperf.data.vocabulary import Tokenizer, Tokens
from gptperf.errors import DataError
from gptperf.formats import counted
from gptperf.tasks.items import Item, Task

__all__ = ["Request", "TaskRequests", "encode_pair", "encode_task"]


class Request(NamedTuple):
    """A sequence whose last tokens are scored."""

    ids: Tokens
    """Context and continuation, (n,) integers, n >= 2."""
    targets: int
    """Number of tokens of the continuation, 1 to n - 1."""


@dataclass(frozen=True)
class TaskRequests:
    """A task, encoded."""

    task: Task
    requests: tuple[Request, ...]
    """One for each choice of each item, in their order."""
    truncated: int
    """Number of items that did not fit: they lost the start of their context."""

    @property
    def tokens(self) -> int:
        """Number of tokens that a model reads."""
        return sum(len(request.ids) - 1 for request in self.requests)


def encode_task(task: Task, tokenizer: Tokenizer, block_size: int, *, shots: int = 0, seed: int = 0) -> TaskRequests:
    """Encodes a task for a model.

    Args:
        task: The task.
        tokenizer: Tokenizer of the model.
        block_size: Most tokens that the model reads. A longer context loses its start.
        shots: Number of other items of the task that stand before each item, with their answers.
        seed: Seed by which the other items are drawn, for each item anew.

    Raises:
        DataError: A continuation alone is longer than `block_size`, or the task has too few items for the shots.
    """
    if shots >= len(task.items):
        raise DataError(
            f"task {task.name}: found {counted(len(task.items), 'item')}, wanted more than shots = {shots}; nearest: "
            f"--shots={len(task.items) - 1}"
        )
    # The choices of an item mostly have one context, which is encoded once.
    count = functools.lru_cache(1)(lambda text: len(tokenizer.encode(text)))
    requests: list[Request] = []
    truncated = 0
    for number, item in enumerate(task.items):
        before = _examples(task.items, number, shots, seed)
        cut = False
        for context, continuation in item.pairs:
            ids, targets = encode_pair(tokenizer, before + context, continuation, count)
            if targets > block_size:
                raise DataError(
                    f"{item.where}: found a continuation of {counted(targets, 'token')} of the tokenizer "
                    f"{tokenizer.name}, wanted at most block_size = {block_size:,}"
                )
            cut |= len(ids) > block_size + 1
            requests.append(Request(ids[-(block_size + 1) :], targets))
        truncated += cut
    return TaskRequests(task, tuple(requests), truncated)


def _examples(items: Sequence[Item], number: int, shots: int, seed: int) -> str:
    """Returns the text of other items with their answers, which depends on seed and number of the item alone."""
    if not shots:
        return ""
    others = random.Random(f"{seed} {number}").sample(range(len(items) - 1), shots)
    chosen = [items[other + (other >= number)] for other in others]
    return "".join("".join(item.pairs[item.answer]) + "\n\n" for item in chosen)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, count: Callable[[str], int] | None = None
) -> tuple[Tokens, int]:
    """Encodes a context with its continuation; the module says how.

    Args:
        tokenizer: The tokenizer.
        context: Text before the continuation; may be empty.
        continuation: Text that is not blank.
        count: Returns the number of tokens of a text; default: encodes it.

    Returns:
        The tokens of both, and how many of them are the continuation's, at least one. There is always a token before.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    both = tokenizer.encode(stripped + continuation)
    # A vocabulary may join the end of the context and the whole continuation in one token, which then is scored.
    begin = min(len(tokenizer.encode(stripped)) if count is None else count(stripped), len(both) - 1)
    if begin:
        return both, len(both) - begin
    end = both[:1].copy()
    end[:] = tokenizer.eot
    return np.concatenate([end, both]), len(both)
