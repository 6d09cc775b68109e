"""Helpers for the tests of data sets: small data sets, and functions that read their documents back."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptperf.data.format import read_manifest
from gptperf.data.loader import Loader
from gptperf.data.shards import TokenSource
from gptperf.data.writer import ShardWriter

TEXTS = [f"document {i} \u00e9" for i in range(200)]


class Counting:
    """A tokenizer whose vocabulary is as large as the corpus, so that a token can tell its position."""

    name = "counting"
    vocab_size = 1 << 20
    eot = (1 << 20) - 1
    fingerprint = "0" * 64
    files: Mapping[str, bytes] = {}


def write_counting(path: Path, tokens: int, shard_tokens: int = 100) -> Path:
    """Writes a training split, and a validation split, of `tokens` tokens: 0, 1, 2, ..., eot."""
    with ShardWriter(
        path,
        tokenizer=Counting(),  # type: ignore[arg-type]
        source="",
        val_fraction=0.0,
        split_method="",
        shard_tokens=shard_tokens,
    ) as out:
        for split in ("train", "val"):
            out.add(split, np.arange(tokens - 1))
    return path


def take(source: TokenSource, count: int, **kwargs: Any) -> list[torch.Tensor]:
    with Loader(source, **{"seed": 1, "micro_batches": 1, **kwargs}) as loader:
        return list(itertools.islice(loader, count))


def exhaust(loader: Loader) -> None:
    """Takes batches until an error; the loader itself never ends."""
    for _ in loader:
        pass


def documents(path: Path, split: str) -> list[bytes]:
    """Returns the documents of a split of a data set of bytes."""
    if read_manifest(path).splits[split].tokens == 0:
        return []
    with TokenSource.open(path, split) as source:
        tokens = np.empty(len(source), source.dtype)
        source.read_into(0, tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
    assert len(pieces.pop()) == 0
    return [piece[:-1].astype(np.uint8).tobytes() for piece in pieces]


def below(document: bytes, fraction: float) -> bool:
    return int(hashlib.sha256(document).hexdigest()[:16], 16) / 2**64 < fraction


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n")
    return path
