"""The order of the samples is a permutation of disjoint blocks in each epoch, and depends on seed and sample alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf.data.order import BatchOrder, MixedOrder
from gptperf.errors import DataError
from gptperf.formats import counted


@settings(max_examples=150, deadline=None)
@given(tokens=st.integers(2, 3000), block_size=st.integers(1, 64), seed=st.integers(-(2**65), 2**65))
def test_an_epoch_is_a_permutation_of_disjoint_blocks(tokens: int, block_size: int, seed: int) -> None:
    if tokens < 2 * block_size:
        with pytest.raises(DataError, match=f"found {counted(tokens, 'token')}, wanted at least .* {2 * block_size:,}"):
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


# Mixtures.

WEIGHTS = [0.7, 0.25, 0.05]


def mixed(seed: int = 3) -> MixedOrder:
    return MixedOrder([50_000, 20_000, 3_000], WEIGHTS, 16, seed)


def test_shares_of_a_mixture_are_its_weights() -> None:
    which, _ = mixed().locate(np.arange(10_000))
    shares = np.bincount(which, minlength=3) / len(which)
    # 10,000 samples are two whole periods, in which shares are exact, and 1,808 samples drawn from a third one.
    assert np.abs(shares - WEIGHTS).max() < 4 * np.sqrt(0.25 * 1808) / 10_000
    for period in range(5):
        which, _ = mixed().locate(np.arange(period * 4096, (period + 1) * 4096))
        assert np.abs(np.bincount(which) - np.array(WEIGHTS) * 4096).max() < 1


def test_each_data_set_of_a_mixture_is_read_in_its_own_order() -> None:
    order = mixed()
    samples = np.arange(30_000)
    which, indices = order.locate(samples)
    bases = [0, 50_000, 70_000]
    offsets = order.offsets(samples)
    for i in range(3):
        mine = indices[which == i]
        assert len(set(mine.tolist())) == len(mine)
        whole = 7 * order.counts[i]  # seven whole periods of 4,096 samples are within 30,000
        assert set(range(whole)) <= set(mine.tolist())
        assert (offsets[which == i] == bases[i] + order.orders[i].offsets(mine)).all()


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_mixture_is_a_function_of_the_sample_alone(samples: list[int]) -> None:
    order = mixed()
    together = order.offsets(np.array(samples))
    assert together.tolist() == [int(order.offsets(np.array([sample]))[0]) for sample in samples]


@given(st.integers(0, 20_000))
@settings(max_examples=20, deadline=None)
def test_samples_of_a_mixture_are_counted(samples: int) -> None:
    which, _ = mixed().locate(np.arange(samples))
    assert mixed().samples_of(samples) == np.bincount(which, minlength=3).tolist()


def test_neighbouring_samples_of_a_mixture_are_independent() -> None:
    which, _ = mixed().locate(np.arange(40_960))
    both = np.count_nonzero((which[:-1] == 0) & (which[1:] == 0)) / 40_959
    assert abs(both - 0.49) < 0.015  # independent draws: 0.7 * 0.7, with a standard deviation below 0.003


def test_copies_of_a_data_set_in_a_mixture_are_read_in_different_orders() -> None:
    order = MixedOrder([64_000, 64_000], [0.5, 0.5], 64, 0)
    first, second = (order.orders[i].offsets(np.arange(900)) // 64 for i in (0, 1))
    assert np.count_nonzero(first == second) < 12


def test_a_weight_without_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match=r"found the weight 0\.0001 in a mixture, wanted at least"):
        MixedOrder([1000, 1000], [0.9999, 0.0001], 8, 0)
    with pytest.raises(DataError, match="found 10 tokens"):
        MixedOrder([1000, 10], [0.5, 0.5], 8, 0)


def test_order_of_a_mixture_is_frozen() -> None:
    """A run that resumes with a newer gptperf must see the same tokens."""
    found = mixed(1337).offsets(np.array([0, 1, 2, 4095, 4096, 10**9]))
    assert found.tolist() == [33459, 11251, 49811, 64986, 45317, 37489]
