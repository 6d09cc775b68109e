"""Fixtures of the tests of data sets."""

import pytest
from data_helpers import write_counting

from gptperf.data.shards import TokenSource


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenSource]:
    """Token count -> a source of that many tokens."""
    root = tmp_path_factory.mktemp("corpora")
    sizes = (40, 97, 256, 1001)
    return {size: TokenSource.open(write_counting(root / str(size), size, shard_tokens=37), "train") for size in sizes}
