"""The loss of a model on a prepared data set, as perplexity and bits per byte too."""

import math
from typing import Any

import numpy as np

from gptperf.data.documents import bytes_per_token
from gptperf.data.mixture import open_tokens, parts_of
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import Tokenizer, read_vocabulary, restore_tokenizer
from gptperf.distributed.process import Process
from gptperf.errors import DataError, DeviceError, NonFiniteError
from gptperf.evaluate.models import EvaluatedModel
from gptperf.training.evaluation import mean_loss

__all__ = ["check_tokenizer", "dataset_loss"]

_COMPARED, _CUT = 1 << 16, 32
"""Tokens of a split by which two tokenizers are compared, without this many at their end."""


def dataset_loss(
    loaded: EvaluatedModel,
    process: Process,
    *,
    dataset: str,
    data_dir: str,
    split: str,
    block_size: int,
    batch_size: int,
    max_batches: int,
) -> dict[str, Any]:
    """Returns the loss on a split of a data set or a mixture. Collective: every rank must call it.

    The batches are the fixed ones of an evaluation in training, so that the same sizes give the same loss. The loss of
    a mixture is the mean of the losses of its data sets by their weights.

    Args:
        loaded: The model.
        process: This rank.
        dataset: Name, path, or mixture.
        data_dir: Folder of data sets.
        split: "train" or "val".
        block_size: Tokens of a sequence.
        batch_size: Sequences of a batch.
        max_batches: Most batches of each data set.

    Raises:
        DataError: A data set is missing or corrupt, is too short, or was made with another tokenizer.
        NonFiniteError: The loss is not finite.
    """
    found: dict[str, Any] = {}
    parts = parts_of(open_tokens(dataset, data_dir, split, vocab_size=loaded.model.config.vocab_size))
    for part in parts:
        check_tokenizer(loaded, part.source)
    for part in parts:
        keys = {"block_size": block_size, "batch_size": batch_size, "max_batches": max_batches}
        keys |= {"rank": process.rank, "world_size": process.world_size}
        loss = mean_loss(loaded.model, part.source, keys, process, loaded.autocast)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{loaded.path}: found a loss of {loss} on {part.name}, wanted a finite one: the weights are "
                "not finite, or the activations overflow"
            )
        size = bytes_per_token(part.source.manifest, part.source.path, split)
        bits = {} if size is None else {"bits_per_byte": loss / math.log(2) / size}
        found[part.name] = {"weight": part.weight} | _losses(loss) | bits
    whole: dict[str, Any] = {"dataset": dataset, "split": split}
    whole |= _losses(math.fsum(one["weight"] * one["loss"] for one in found.values()))
    if all("bits_per_byte" in one for one in found.values()):
        whole["bits_per_byte"] = math.fsum(one["weight"] * one["bits_per_byte"] for one in found.values())
    return whole | ({"sources": found} if len(found) > 1 else {})


def check_tokenizer(loaded: EvaluatedModel, source: TokenSource) -> None:
    """Checks that data was made with the tokenizer of the model, as far as that is known.

    Raises:
        DataError: It was made with another one.
    """
    ours, theirs = loaded.tokenizer, source.manifest.tokenizer
    if ours is not None and ours.fingerprint != theirs.fingerprint and not _same_ids(ours, source):
        raise DataError(
            f"{source.path}: found the tokenizer {theirs.name} ({theirs.fingerprint[:12]}), the model has {ours.name} "
            f"({ours.fingerprint[:12]}); wanted data of the same tokenizer"
        )


def _same_ids(ours: Tokenizer, source: TokenSource) -> bool:
    """Returns whether a tokenizer gives the documents at the start of a split the ids that the split has.

    The same vocabulary may come from tiktoken and from a tokenizer.json, and then has two fingerprints.
    """
    try:
        theirs = restore_tokenizer(
            source.manifest.tokenizer, read_vocabulary(source.path, source.manifest.tokenizer), source.path
        )
    except (DataError, DeviceError):
        return False
    tokens = np.empty(min(len(source), _COMPARED), source.dtype)
    source.read_into(0, tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == theirs.eot) + 1)
    for number, document in enumerate(documents):
        text = document[document != theirs.eot]
        known = len(text) - (_CUT if number == len(documents) - 1 else 0)  # the last one may be cut inside a word
        if ours.encode(theirs.decode(text))[: max(known, 0)].tolist() != text[: max(known, 0)].tolist():
            return False
    return ours.eot == theirs.eot


def _losses(loss: float) -> dict[str, float]:
    """Returns a loss and its perplexity, unless that is too large for a number."""
    return {"loss": loss} | ({"perplexity": math.exp(loss)} if loss < 700 else {})
