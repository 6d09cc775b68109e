"""Scores of tasks from log-likelihoods, each with its standard error. Loads no torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gptperf.tasks.items import Task
from gptperf.tasks.requests import TaskRequests

__all__ = ["Likelihood", "Scores", "core", "right_items", "share_right", "task_scores"]

Scores = dict[str, float]
"""Name -> value. What is not finite is left out, and so is the standard error of a single item."""


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log: float
    """Its log-likelihood after its context, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""


def right_items(task: Task, found: Sequence[Likelihood]) -> tuple[list[bool], list[bool]]:
    """Returns, for each item, whether it is answered right by `acc` and by `acc_norm`.

    Args:
        task: The task.
        found: One for each choice of each item, in their order.
    """
    plain, normed = [], []
    place = 0
    for item in task.items:
        mine = found[place : place + len(item.pairs)]
        place += len(item.pairs)
        if task.kind == "target":
            plain.append(mine[0].greedy)
            continue
        logs = [one.log for one in mine]
        per_byte = [log / size for log, size in zip(logs, item.sizes, strict=True)]
        plain.append(_best(logs) == item.answer)
        normed.append(_best(per_byte) == item.answer)
    return plain, normed


def _best(values: Sequence[float]) -> int | None:
    """Returns the place of the largest number, the first of equal ones; None if none is a number."""
    numbers = [(value, -place) for place, value in enumerate(values) if not math.isnan(value)]
    return -max(numbers)[1] if numbers else None


def task_scores(encoded: TaskRequests, found: Sequence[Likelihood]) -> Scores:
    """Returns the scores of a task.

    `acc` is the share of right items: the choice of the highest log-likelihood is the right one or, of the last-word
    kind, each token of the target is the likeliest one. `acc_norm` divides a log-likelihood by the bytes of the choice.
    `perplexity` is that of the targets. `centred` is (acc - chance) / (1 - chance): 0 for a guess and 1 for all right.

    Args:
        encoded: The task.
        found: One for each request.
    """
    task = encoded.task
    plain, normed = right_items(task, found)
    scores: Scores = {"items": len(task.items), "truncated": encoded.truncated}
    _add(scores, "acc", *_mean(plain))
    if task.kind == "choice":
        _add(scores, "acc_norm", *_mean(normed))
    chance = 0.0
    if task.kind == "target":
        mean, error = _mean([one.log for one in found])
        perplexity = math.exp(-mean) if mean > -700 else math.inf  # NaN too
        _add(scores, "perplexity", perplexity, None if error is None else perplexity * error)  # first order
    else:
        chance = statistics.fmean(1 / len(item.pairs) for item in task.items)
    error = scores.get("acc_stderr")
    centred = (scores["acc"] - chance) / (1 - chance)
    _add(scores, "centred", centred, None if error is None else error / (1 - chance))
    return scores


def core(scores: Mapping[str, Scores]) -> Scores:
    """Returns the mean of the centred scores of several tasks, as DCLM's CORE is, under `core`.

    Its standard error takes the tasks as fixed and their items as drawn.
    """
    errors = [one["centred_stderr"] for one in scores.values() if "centred_stderr" in one]
    found: Scores = {}
    known = len(errors) == len(scores)
    _add(
        found,
        "core",
        statistics.fmean(one["centred"] for one in scores.values()),
        math.hypot(*errors) / len(scores) if known else None,
    )
    return found


def share_right(right: Sequence[bool], name: str) -> Scores:
    """Returns the share of right items under a name, with its standard error; nothing of no items."""
    found: Scores = {}
    if right:
        _add(found, name, *_mean(right))
    return found


def _add(scores: Scores, name: str, value: float, error: float | None) -> None:
    """Adds a score and its standard error, as far as they are finite."""
    if math.isfinite(value):
        scores[name] = value
        if error is not None and math.isfinite(error):
            scores[f"{name}_stderr"] = error


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error: the sample's standard deviation over the root of the number."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
