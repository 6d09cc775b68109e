"""Which items of tasks the training data contains: n-grams of tokens that occur in it, and in which documents."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.documents import DocumentIndex
from gptperf.data.mixture import Part
from gptperf.data.vocabulary import Tokenizer
from gptperf.data.window_search import NOWHERE, WindowSearch, chunks_of, search
from gptperf.distributed.process import Process
from gptperf.tasks import Item, Task

__all__ = ["WORDS", "find_contained", "ngram_tokens"]

WORDS = 13
"""Words of an n-gram, as in the analysis of GPT-3 (Brown et al., 2020, appendix C)."""


def ngram_tokens(tasks: Sequence[Task], tokenizer: Tokenizer) -> int:
    """Returns the number of tokens that `WORDS` words of the items have in the mean."""
    passages = [item.passage for task in tasks for item in task.items]
    words = sum(len(passage.split()) for passage in passages)
    return max(1, round(WORDS * sum(len(tokenizer.encode(passage)) for passage in passages) / words))


def find_contained(
    tasks: Sequence[Task], tokenizer: Tokenizer, parts: Sequence[Part], ngram: int, process: Process
) -> dict[str, Any]:
    """Looks for the text of every item, with its right answer, in the training data. Collective.

    An item is contained if one of its n-grams of tokens occurs in the data; an item of fewer tokens is looked for as a
    whole. Every position of the data is compared, in chunks that the ranks and their cores share.

    Args:
        tasks: The tasks.
        tokenizer: Tokenizer of the data.
        parts: The training split of the data set, or of each one of a mixture.
        ngram: Tokens of an n-gram.
        process: This rank.

    Returns:
        `ngram`, and `tasks`: name -> items, contained, share, and `hits`: for each contained item its place and number,
        how many of its n-grams were found, and the documents in which they occur first.

    Raises:
        DataError: A data set is corrupt, or has no document index.
    """
    indexes = [DocumentIndex(part.source.manifest, part.source.path, part.source.split) for part in parts]
    owner, found = _first_places([item for task in tasks for item in task.items], tokenizer, parts, ngram, process)
    tasks_found, begin = {}, 0
    for task in tasks:
        edges = np.searchsorted(owner, begin + np.arange(len(task.items) + 1))
        of_items = [found[:, start:end] for start, end in itertools.pairwise(edges)]
        hits = list(_hits(task, of_items, parts, indexes))
        count = len(task.items)
        tasks_found[task.name] = {"items": count, "contained": len(hits), "share": len(hits) / count, "hits": hits}
        begin += count
    return {"ngram": ngram, "tasks": tasks_found}


def _first_places(
    items: Sequence[Item], tokenizer: Tokenizer, parts: Sequence[Part], ngram: int, process: Process
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the item of each n-gram, ascending, (n,), and where it occurs first, (data sets, n), or `NOWHERE`."""
    texts: dict[int, list[npt.NDArray[Any]]] = {}
    owners: dict[int, list[int]] = {}
    for number, item in enumerate(items):
        # Inside a document a space stands before the first word, which many vocabularies join with it.
        for text in (tokenizer.encode(item.passage), tokenizer.encode(f" {item.passage}")[:ngram]):
            width = min(len(text), ngram)
            texts.setdefault(width, []).append(text)
            owners.setdefault(width, []).append(number)
    every = [WindowSearch(texts[width], width) for width in texts]
    owner = np.concatenate([np.array(owners[one.width])[one.text_of] for one in every])
    first = []
    for part in parts:
        for one in every:
            one.first[:] = NOWHERE
        begins = chunks_of(part.source, min(texts))
        search(part.source, every, begins[process.rank :: process.world_size])
        mine = np.concatenate([one.first for one in every])
        first.append(np.minimum.reduce(process.gather(mine)))
    order = np.argsort(owner, kind="stable")
    return owner[order], np.stack(first)[:, order]


def _hits(
    task: Task, of_items: Sequence[npt.NDArray[np.int64]], parts: Sequence[Part], indexes: Sequence[DocumentIndex]
) -> Iterator[dict[str, Any]]:
    """Yields the contained items of a task; `of_items` has the first places of the n-grams of each item."""
    for number, (item, places) in enumerate(zip(task.items, of_items, strict=True)):
        if not (places != NOWHERE).any():
            continue
        documents = []
        for part, index, row in zip(parts, indexes, places, strict=True):
            read = np.unique(index.at(row[row != NOWHERE]))
            documents += [{"dataset": part.name, **index.origin(int(document))._asdict()} for document in read]
        yield {
            "item": item.where,
            "number": number,
            "ngrams": places.shape[1],
            "found": int((places != NOWHERE).any(0).sum()),
            "documents": documents,
        }
