"""N-gram losses against a plain reference, and the promise that probabilities sum to one."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf.data import ngram
from gptperf.data.ngram import ngram_losses, trigram_loss
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter


def write(path: Path, train: list[int], val: list[int]) -> tuple[TokenSource, TokenSource]:
    with ShardWriter(
        path, tokenizer=ByteTokenizer(), source="", val_fraction=0.0, split_method="", shard_tokens=50
    ) as out:
        out.add("train", np.array(train, np.int64))
        out.add("val", np.array(val, np.int64))
    return TokenSource.open(path, "train"), TokenSource.open(path, "val")


class Reference:
    """Witten and Bell's interpolation, computed literally by the formula, one token at a time."""

    def __init__(self, train: list[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for order in range(3):
            for i in range(order, len(train)):
                self.counts[tuple(train[i - order : i])][train[i]] += 1

    def probability(self, context: tuple[int, ...], token: int) -> float:
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        counts = self.counts.get(context)
        if not counts:
            return lower
        return (counts[token] + len(counts) * lower) / (counts.total() + len(counts))

    def loss(self, val: list[int], order: int) -> float:
        terms = [-math.log(self.probability(tuple(val[i - order : i]), val[i])) for i in range(order, len(val))]
        return sum(terms) / len(terms)


texts = st.lists(st.sampled_from([0, 65, 66, 67, 97, 255]), min_size=2, max_size=200)


@settings(max_examples=40, deadline=None)
@given(train=texts, val=texts, chunk=st.integers(1, 300))
def test_losses_are_the_references(
    tmp_path_factory: pytest.TempPathFactory, train: list[int], val: list[int], chunk: int
) -> None:
    sources = write(tmp_path_factory.mktemp("n") / "set", train, val)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_CHUNK", chunk)
        losses = ngram_losses(*sources)
    reference = Reference([*train, 256], 257)
    expected = [reference.loss([*val, 256], order) for order in range(3)]
    assert [losses.unigram, losses.bigram, losses.trigram] == pytest.approx(expected, rel=1e-12)
    assert trigram_loss(*sources) == pytest.approx(expected[2], rel=1e-12)


def test_reference_sums_to_one() -> None:
    reference = Reference([65, 66, 65, 66, 67, 256], 257)
    for context in ((), (65,), (66,), (65, 66), (66, 67), (9, 9)):
        assert sum(reference.probability(context, token) for token in range(257)) == pytest.approx(1)


def test_longer_contexts_help_on_text(tmp_path: Path) -> None:
    text = list(b"the quick brown fox jumps over the lazy dog. " * 50)
    losses = ngram_losses(*write(tmp_path / "set", text, text[:450]))
    assert losses.trigram < losses.bigram < losses.unigram < math.log(257)
    assert losses.trigram < 0.3


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = write(tmp_path / "set", [65, 66, 67], [65])
    with pytest.raises(ValueError, match="found 2 tokens in 'val', wanted at least 3"):
        ngram_losses(train, val)
    monkeypatch.setattr(ngram, "MAX_VOCAB_SIZE", 256)
    with pytest.raises(ValueError, match="vocab_size: found 257, wanted at most 256"):
        ngram_losses(train, val)
