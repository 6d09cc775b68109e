"""What the tests of data sets share."""

import pytest
from data_helpers import write_counting

from gptperf.data.shards import TokenSource


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenSource]:
    """Sources of several lengths, by length."""
    root = tmp_path_factory.mktemp("corpora")
    sizes = (40, 97, 256, 1001)
    return {size: TokenSource.open(write_counting(root / str(size), size, shard_tokens=37), "train") for size in sizes}
