"""Mixtures: their notation, and the loader that reads them."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import take, write_counting

from gptperf.data.mixture import MixedTokens, parse_mixture
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("web:0.7,code:0.3", [("web", 0.7), ("code", 0.3)]),
        ("web:7, code:3", [("web", 0.7), ("code", 0.3)]),
        ("a/b:1e0", [("a/b", 1.0)]),
        ("c:/data:2,d:2", [("c:/data", 0.5), ("d", 0.5)]),
        ("web", None),
        ("a/path,with a comma", None),
        ("hf:repo", None),
    ],
)
def test_notation(dataset: str, expected: list[tuple[str, float]] | None) -> None:
    found = parse_mixture(dataset)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("web:0.7,code", "found 'code' in a mixture, wanted NAME:WEIGHT; nearest: 'code:1'"),
        ("web:0.7,", "found '' in a mixture, wanted NAME:WEIGHT"),
        ("web:0,code:1", "found the weight '0' of 'web', wanted a number above 0"),
        ("web:-1,code:1", "found the weight '-1' of 'web'"),
        ("web:1e999,code:1", "found the weight '1e999' of 'web'"),
        ("web:1.2.3,code:1", r"found the weight '1\.2\.3' of 'web'"),
        ("web:1,web:2", "found 'web' twice"),
    ],
)
def test_wrong_notation(dataset: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_mixture(dataset)


@pytest.fixture
def mixture(tmp_path: Path) -> MixedTokens:
    """Two data sets whose tokens are their positions; those of the second one have 2,000 tokens."""
    paths = [write_counting(tmp_path / name, tokens) for name, tokens in (("a", 5000), ("b", 2000))]
    return MixedTokens([TokenSource.open(path, "train") for path in paths], [0.75, 0.25])


def test_rows_are_read_from_their_data_set(mixture: MixedTokens) -> None:
    rows = np.empty((4, 10), mixture.dtype)
    mixture.read_rows(np.array([5000, 0, 6990, 4990]), rows)
    eot = (1 << 20) - 1
    assert rows.tolist() == [
        [*range(10)],
        [*range(10)],
        [*range(1990, 1999), eot],
        [*range(4990, 4999), eot],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_tokens_on_any_number_of_ranks(mixture: MixedTokens, ranks: int) -> None:
    options = {"block_size": 16, "batch_size": 4, "micro_batches": 4}
    alone = take(mixture, 40, **options)  # type: ignore[arg-type]
    for rank in range(ranks):
        mine = take(mixture, 40 // ranks, **options, rank=rank, world_size=ranks)  # type: ignore[arg-type]
        expected = [alone[i] for i in range(40) if i % 4 % ranks == rank]
        assert all((x == y).all() for x, y in zip(mine, expected, strict=True))


def test_a_resumed_loader_goes_on_with_the_same_tokens(mixture: MixedTokens) -> None:
    options = {"block_size": 16, "batch_size": 4, "micro_batches": 2}
    whole = take(mixture, 40, **options)  # type: ignore[arg-type]
    rest = take(mixture, 10, **options, start_step=15)  # type: ignore[arg-type]
    assert all((x == y).all() for x, y in zip(rest, whole[30:], strict=True))


def test_other_weights_or_data_sets_are_another_mixture(mixture: MixedTokens) -> None:
    a, b = mixture.sources
    fingerprints = {
        MixedTokens(sources, weights).fingerprint
        for sources, weights in (
            ([a, b], [0.75, 0.25]),
            ([b, a], [0.75, 0.25]),
            ([a, b], [0.25, 0.75]),
            ([a, a], [0.75, 0.25]),
        )
    }
    assert len(fingerprints) == 4
    assert mixture.fingerprint in fingerprints


def test_data_sets_of_different_tokenizers_are_not_mixed(mixture: MixedTokens, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "c", tokenizer=ByteTokenizer(), source="", val_fraction=0.5, split_method="") as out:
        out.add("train", np.arange(100))
    with pytest.raises(DataError, match=r"found the tokenizer 'byte' of 257 ids, wanted .* 'counting' of 1048576"):
        MixedTokens([mixture.sources[0], TokenSource.open(tmp_path / "c", "train")], [0.5, 0.5])
