"""Evaluates a model, on one rank or on several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptperf.data.mixture import open_tokens, parts_of
from gptperf.distributed.process import Process, start_process
from gptperf.errors import ConfigError, DataError
from gptperf.evaluate.contained import find_contained, ngram_tokens
from gptperf.evaluate.dataset import check_tokenizer, dataset_loss
from gptperf.evaluate.models import EvaluatedModel, is_hugging_face, load
from gptperf.tasks import Scores, Task, TaskRequests, core, encode_task, task_scores
from gptperf.tasks.likelihood import likelihoods
from gptperf.tasks.scores import right_items, share_right

__all__ = ["Asked", "evaluate"]

_ROWS, _TOKENS, _ALL = 8, 2048, 10**9
"""Sequences of a batch, tokens of a sequence at most, and batches, for a model of Hugging Face."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is evaluated, and how. A value of None is that of the run."""

    model: Path
    checkpoint: Literal["latest", "best"]
    device: str
    tasks: Sequence[Task]
    shots: int
    seed: int
    dataset: str | None
    split: str
    block_size: int | None
    data_dir: str | None
    batch_size: int | None
    eval_iters: int | None
    contains: bool
    ngram: int | None


def evaluate(asked: Asked, debug: bool = False) -> dict[str, Any] | None:
    """Evaluates a model, and returns the result on the main rank; see `_result` for its fields.

    Raises:
        GptperfError: The model, the data or a task cannot be evaluated.
    """
    if is_hugging_face(asked.model):
        _need_dataset(asked, None)
    process = start_process(asked.device)
    try:
        with process.watchdog(".", debug=debug):
            loaded = load(asked.model, asked.checkpoint, process.device)
            loaded.model.eval()
            found = _result(asked, loaded, process)
            process.barrier()
            return found if process.is_main else None
    finally:
        process.close()


def _result(asked: Asked, loaded: EvaluatedModel, process: Process) -> dict[str, Any]:
    """Returns model, step and tokenizer, and what was asked for: `data`, `tasks` with `core`, `contained`."""
    tokenizer = loaded.tokenizer
    found: dict[str, Any] = {"model": str(loaded.path), "step": loaded.step}
    found["tokenizer"] = None if tokenizer is None else tokenizer.name
    dataset = _need_dataset(asked, loaded.asked("data", "dataset", None))
    data_dir = asked.data_dir or loaded.asked("data", "data_dir", "data")
    if tokenizer is None and asked.tasks:
        raise DataError(f"{loaded.path}: tasks need a tokenizer: {loaded.no_tokenizer}")
    encoded, block_size = list[TaskRequests](), _block_size(asked, loaded)
    if tokenizer is not None:
        options = {"shots": asked.shots, "seed": asked.seed}
        encoded = [encode_task(task, tokenizer, block_size, **options) for task in asked.tasks]
    batch_size = asked.batch_size or loaded.asked("train", "batch_size", _ROWS)
    if asked.dataset is not None or not asked.tasks:
        batches = asked.eval_iters or loaded.asked("train", "eval_iters", _ALL)
        sizes = {"block_size": block_size, "batch_size": batch_size, "max_batches": batches}
        with process.progress.during("evaluation"):
            found["data"] = dataset_loss(
                loaded, process, dataset=dataset, data_dir=data_dir, split=asked.split, **sizes
            )
    if tokenizer is not None and asked.contains:
        parts = parts_of(open_tokens(dataset, data_dir, "train", vocab_size=tokenizer.vocab_size))
        for part in parts:
            check_tokenizer(loaded, part.source)
        ngram = asked.ngram or ngram_tokens(asked.tasks, tokenizer)
        with process.progress.during("search"):
            found["contained"] = find_contained(asked.tasks, tokenizer, parts, ngram, process)
    if encoded:
        found |= {"shots": asked.shots, "seed": asked.seed}
        with process.progress.during("evaluation"):
            _score(encoded, loaded, process, batch_size * block_size, found)
    return found


def _need_dataset(asked: Asked, own: str | None) -> str:
    """Returns the data set that is asked for or that of the run; "" if there is none, and none is needed.

    Raises:
        ConfigError: There is none, and one is needed.
    """
    dataset = asked.dataset or own or ""
    if not dataset and (asked.contains or not asked.tasks):
        raise ConfigError(
            f"{asked.model}: found no data set, because a model of Hugging Face does not know its own; wanted "
            "--dataset=NAME, or --tasks=FILE without --contains"
        )
    return dataset


def _block_size(asked: Asked, loaded: EvaluatedModel) -> int:
    """Returns the most tokens that the model reads at once.

    Raises:
        ConfigError: More are asked for than the model can read.
    """
    most = loaded.model.config.block_size
    if asked.block_size is not None and asked.block_size > most:
        raise ConfigError(f"block_size: found {asked.block_size:,}, wanted at most {most:,}; nearest: {most}")
    return asked.block_size or (most if loaded.config else min(most, _TOKENS))


def _score(
    encoded: Sequence[TaskRequests], loaded: EvaluatedModel, process: Process, batch_tokens: int, found: dict[str, Any]
) -> None:
    """Adds the scores of the tasks and, where the training data was searched, those of the items that it lacks."""
    scores = dict[str, Scores]()
    for task in encoded:
        logs = likelihoods(loaded.model, task.requests, process, loaded.autocast, batch_tokens)
        assert logs is not None, "nothing drops it"
        scores[task.task.name] = task_scores(task, logs)
        if "contained" in found:
            of_task = found["contained"]["tasks"][task.task.name]
            hit = {one["number"] for one in of_task["hits"]}
            clean = [right for number, right in enumerate(right_items(task.task, logs)[0]) if number not in hit]
            of_task |= share_right(clean, "clean_acc")
    found |= {"tasks": scores, **core(scores)}
