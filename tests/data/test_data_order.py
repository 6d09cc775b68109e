"""The order of the samples is a permutation of disjoint blocks in each epoch, and depends on seed and sample alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf.data.order import BatchOrder
from gptperf.errors import DataError


@settings(max_examples=150, deadline=None)
@given(tokens=st.integers(2, 3000), block_size=st.integers(1, 64), seed=st.integers(-(2**65), 2**65))
def test_an_epoch_is_a_permutation_of_disjoint_blocks(tokens: int, block_size: int, seed: int) -> None:
    if tokens < 2 * block_size:
        with pytest.raises(DataError, match=f"found {tokens} tokens, wanted at least .* {2 * block_size}"):
            BatchOrder(tokens, block_size, seed)
        return
    order = BatchOrder(tokens, block_size, seed)
    n = order.n_blocks
    assert (n + 1) * block_size <= tokens < (n + 2) * block_size
    offsets = order.offsets(np.arange(3 * n)).reshape(3, n)
    for epoch in range(3):
        start = order.offset(epoch)
        assert 0 <= start < block_size
        assert sorted(offsets[epoch]) == [start + i * block_size for i in range(n)]
        assert offsets[epoch].max() + block_size + 1 <= tokens  # with the last target


@given(st.integers(2, 2000), st.integers(1, 20), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_order_is_a_function_of_the_sample_alone(tokens: int, block_size: int, samples: list[int]) -> None:
    order = BatchOrder(tokens + 2 * block_size, block_size, 7)
    together = order.offsets(np.array(samples))
    alone = [int(order.offsets(np.array([sample]))[0]) for sample in samples]
    assert together.tolist() == alone


def test_order_is_frozen() -> None:
    """A run that resumes with a newer gptperf must see the same tokens."""
    assert BatchOrder(1000, 8, 1337).offsets(np.array([0, 1, 2, 123, 124, 10**9])).tolist() == [
        939,
        379,
        779,
        75,
        437,
        932,
    ]


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    order = BatchOrder(64_000, 64, seed=3)
    n = order.n_blocks
    epochs = [(order.offsets(np.arange(n) + e * n) - order.offset(e)) // 64 for e in range(20)]
    epochs.append((BatchOrder(64_000, 64, seed=4).offsets(np.arange(n)) - BatchOrder(64_000, 64, 4).offset(0)) // 64)
    assert len({order.offset(e) for e in range(20)}) > 10
    for first, second in itertools.combinations(epochs, 2):
        # Independent permutations agree in about one place (Poisson); 12 or more has probability 1e-10.
        assert np.count_nonzero(first == second) < 12


def test_permutation_has_no_visible_structure() -> None:
    """Serial correlation, displacement and each place's blocks are those of uniform permutations."""
    n = 1000
    orders = np.stack([BatchOrder((n + 1) * 4, 4, seed).offsets(np.arange(n)) // 4 for seed in range(400)])
    centred = orders - (n - 1) / 2
    serial = (centred[:, :-1] * centred[:, 1:]).mean() / (centred**2).mean()
    identity = (centred * (np.arange(n) - (n - 1) / 2)).mean() / (centred**2).mean()
    assert abs(serial) < 5 / np.sqrt(orders.size)
    assert abs(identity) < 5 / np.sqrt(orders.size)
    counts = np.stack([np.bincount(row * 10 // n, minlength=10) for row in orders.T])  # place x tenth of the corpus
    chi2 = ((counts - 40) ** 2 / 40).sum()
    degrees = n * 9
    assert abs(chi2 - degrees) < 6 * np.sqrt(2 * degrees)


def test_billions_of_blocks() -> None:
    order = BatchOrder(627_000_000_000, 128, seed=1)
    offsets = order.offsets(np.arange(10_000) + 10**12)
    assert len(set(offsets.tolist())) == 10_000
    assert offsets.min() >= 0
    assert offsets.max() + 129 <= 627_000_000_000
    assert offsets.max() > 600_000_000_000
