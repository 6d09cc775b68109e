"""Fixtures of the tests of data sets."""

import pytest
from data_helpers import write_counting
from tokenizer_helpers import CORPUS

from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.shards import TokenSource
from gptperf.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenSource]:
    """Token count -> a source of that many tokens."""
    root = tmp_path_factory.mktemp("corpora")
    sizes = (40, 97, 256, 1001)
    return {size: TokenSource.open(write_counting(root / str(size), size, shard_tokens=37), "train") for size in sizes}


@pytest.fixture(scope="session")
def trained() -> JsonTokenizer:
    """A BPE of 400 ids."""
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    return train_tokenizer("train:400", CORPUS)
