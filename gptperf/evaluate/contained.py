"""Which items of tasks the training data contains: n-grams of tokens that occur in it, and in which documents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.documents import DocumentIndex
from gptperf.data.mixture import Part
from gptperf.data.vocabulary import Tokenizer
from gptperf.data.window_search import NOWHERE, WindowSearch, chunks_of, search
from gptperf.distributed.process import Process
from gptperf.tasks import Task

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

    An item is contained if one of its n-grams of tokens occurs in the data. Every position of the data is compared, in
    chunks that the ranks and their cores share.

    Args:
        tasks: The tasks.
        tokenizer: Tokenizer of the data.
        parts: The training split of the data set, or of each one of a mixture.
        ngram: Tokens of an n-gram.
        process: This rank.

    Returns:
        `ngram`, and `tasks`: name -> items, too_short (items with fewer tokens, which are not looked for), contained,
        share (of those that were looked for), and `hits`: for each contained item its place and number, how many of
        its n-grams were found, and the documents in which they occur first.

    Raises:
        DataError: A data set is corrupt, or has no document index.
    """
    indexes = [DocumentIndex(part.source.manifest, part.source.path, part.source.split) for part in parts]
    items = [item for task in tasks for item in task.items]
    texts, owners = list[npt.NDArray[Any]](), list[int]()
    for number, item in enumerate(items):
        # Inside a document a space stands before the first word, which many vocabularies join with it.
        for text in (tokenizer.encode(item.passage), tokenizer.encode(f" {item.passage}")[:ngram]):
            texts.append(text)
            owners.append(number)
    windows = WindowSearch(texts, ngram)
    owner = np.array(owners, np.int64)[windows.text_of]
    first = []
    for part in parts:
        windows.first[:] = NOWHERE
        search(part.source, windows, chunks_of(part.source, ngram)[process.rank :: process.world_size])
        first.append(np.minimum.reduce(process.gather(windows.first)))
    found = np.stack(first)  # (data sets, windows)
    tasks_found, begin = {}, 0
    for task in tasks:
        end = begin + len(task.items)
        tasks_found[task.name] = _of_task(task, begin, owner, found, parts, indexes, ngram, tokenizer)
        begin = end
    return {"ngram": ngram, "tasks": tasks_found}


def _of_task(
    task: Task,
    begin: int,
    owner: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
    parts: Sequence[Part],
    indexes: Sequence[DocumentIndex],
    ngram: int,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Returns what was found of a task whose first item has the number `begin` among the items of all tasks."""
    hits, short = [], 0
    edges = np.searchsorted(owner, np.arange(begin, begin + len(task.items) + 1))
    for number, item in enumerate(task.items):
        mine = found[:, edges[number] : edges[number + 1]]
        short += mine.shape[1] == 0
        if not (mine != NOWHERE).any():
            continue
        documents = []
        for part, index, row in zip(parts, indexes, mine, strict=True):
            places = np.unique(index.at(row[row != NOWHERE]))
            documents += [{"dataset": part.name, **index.origin(int(place))._asdict()} for place in places]
        count = int((mine != NOWHERE).any(0).sum())
        hits.append(
            {"item": item.where, "number": number, "ngrams": mine.shape[1], "found": count, "documents": documents}
        )
    looked = len(task.items) - short
    return {
        "items": len(task.items),
        "too_short": short,
        "contained": len(hits),
        "share": len(hits) / looked if looked else 0.0,
        "hits": hits,
    }
