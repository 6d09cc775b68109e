"""The loss of a model on a prepared data set, as perplexity and bits a byte too."""

import math
from typing import Any

import numpy as np

from gptperf.data.documents import DocumentIndex, index_file
from gptperf.data.mixture import open_tokens, parts_of
from gptperf.data.shards import TokenSource
from gptperf.distributed.process import Process
from gptperf.errors import DataError
from gptperf.evaluate.models import EvaluatedModel
from gptperf.training.evaluation import mean_loss

__all__ = ["bytes_per_token", "check_tokenizer", "dataset_loss"]


def dataset_loss(
    loaded: EvaluatedModel,
    process: Process,
    *,
    dataset: str,
    data_dir: str,
    split: str,
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
        batch_size: Sequences of a batch.
        max_batches: Most batches of each data set.

    Raises:
        DataError: A data set is missing or corrupt, is too short, or was made with another tokenizer.
    """
    model = loaded.model.config
    found: dict[str, Any] = {}
    parts = parts_of(open_tokens(dataset, data_dir, split, vocab_size=model.vocab_size))
    for part in parts:
        check_tokenizer(loaded, part.source)
    for part in parts:
        keys = {"block_size": model.block_size, "batch_size": batch_size, "max_batches": max_batches}
        keys |= {"rank": process.rank, "world_size": process.world_size}
        loss = mean_loss(loaded.model, part.source, keys, process, loaded.autocast)
        size = bytes_per_token(part.source)
        bits = {} if size is None else {"bits_per_byte": loss / math.log(2) / size}
        found[part.name] = {"weight": part.weight, "loss": loss, "perplexity": _exp(loss)} | bits
    loss = math.fsum(one["weight"] * one["loss"] for one in found.values())
    whole: dict[str, Any] = {"dataset": dataset, "split": split, "loss": loss, "perplexity": _exp(loss)}
    if all("bits_per_byte" in one for one in found.values()):
        whole["bits_per_byte"] = math.fsum(one["weight"] * one["bits_per_byte"] for one in found.values())
    return whole | ({"sources": found} if len(found) > 1 else {})


def bytes_per_token(source: TokenSource) -> float | None:
    """Returns the bytes of text of a token of a split, in the mean; None if the data set does not know its text.

    The tokens that end documents count, because a model predicts them; they have no bytes. The document index has the
    bytes of each text.
    """
    if index_file(source.split) not in source.manifest.files:
        return None
    index = DocumentIndex(source.manifest, source.path, source.split)
    total = int(index.records["bytes"].sum(dtype=np.uint64))
    return total / len(source) if total else None


def check_tokenizer(loaded: EvaluatedModel, source: TokenSource) -> None:
    """Checks that data was made with the tokenizer of the model, as far as that is known.

    Raises:
        DataError: It was made with another one.
    """
    ours, theirs = loaded.tokenizer, source.manifest.tokenizer
    if ours is not None and ours.fingerprint != theirs.fingerprint:
        raise DataError(
            f"{source.path}: found the tokenizer {theirs.name} ({theirs.fingerprint[:12]}), the model has {ours.name} "
            f"({ours.fingerprint[:12]}); wanted data of the same tokenizer"
        )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
