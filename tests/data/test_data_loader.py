"""Batches: every token once an epoch for any number of ranks and any resume point; the fixed validation batches."""

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import Counting, take
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf.data.loader import validation_batches
from gptperf.data.shards import TokenSource
from gptperf.errors import DataError


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([40, 97, 256, 1001]),
    block_size=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    per_rank=st.integers(1, 3),
    start_step=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
def test_every_token_once_an_epoch_for_any_world_and_resume_point(
    corpora: dict[int, TokenSource],
    tokens: int,
    block_size: int,
    batch_size: int,
    per_rank: int,
    start_step: int,
    seed: int,
) -> None:
    source = corpora[tokens]
    micro_batches = 4 * per_rank
    n_blocks = (tokens - block_size) // block_size
    samples_a_step = micro_batches * batch_size
    steps = start_step + 1 + -(-2 * n_blocks // samples_a_step)
    common = {
        "block_size": block_size,
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "seed": seed,
    }

    whole = torch.stack(take(source, steps * micro_batches, **common))  # (steps * M, 2, B, T)
    assert whole.dtype == torch.int64
    assert whole.shape[1:] == (2, batch_size, block_size)
    inputs, targets = whole[:, 0].reshape(-1, block_size), whole[:, 1].reshape(-1, block_size)
    eot = Counting.eot
    follows = torch.where(inputs == tokens - 2, eot, inputs + 1)
    assert torch.equal(targets, follows)
    for epoch in range(2):
        seen = inputs[epoch * n_blocks : (epoch + 1) * n_blocks].flatten().sort().values
        first = int(seen[0])
        assert seen.tolist() == list(range(first, first + n_blocks * block_size))
        assert first < block_size

    by_step = whole.reshape(steps, micro_batches, *whole.shape[1:])
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            mine = take(
                source,
                (steps - start_step) * micro_batches // world_size,
                **common,
                rank=rank,
                world_size=world_size,
                start_step=start_step,
            )
            expected = by_step[start_step:, rank::world_size].flatten(0, 1)
            assert torch.equal(torch.stack(mine), expected)


def test_batches_are_fresh_and_contiguous(corpora: dict[int, TokenSource]) -> None:
    first, second = take(corpora[1001], 2, block_size=8, batch_size=3)
    assert first.data_ptr() != second.data_ptr()
    assert first[0].is_contiguous()
    assert first[1].is_contiguous()
    kept = second.clone()
    first.zero_()
    assert torch.equal(second, kept)


def test_no_global_random_state_is_touched(corpora: dict[int, TokenSource]) -> None:
    def states() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()

    before = states()
    first = take(corpora[256], 5, block_size=8, batch_size=2)
    list(validation_batches(corpora[256], block_size=8, batch_size=2, max_batches=3))
    assert states() == before
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, take(corpora[256], 5, block_size=8, batch_size=2)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"micro_batches": 3, "world_size": 2},
            "micro_batches: found 3, wanted a multiple of world_size = 2, e.g. 4",
        ),
        ({"micro_batches": 1, "world_size": 4}, "e.g. 4"),
        ({"rank": 2, "world_size": 2, "micro_batches": 2}, "rank: found 2"),
        ({"rank": -1}, "rank: found -1"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"micro_batches": 0}, "micro_batches: found 0"),
        ({"block_size": 0}, "block_size: found 0"),
        ({"prefetch": 0}, "prefetch: found 0"),
        ({"start_step": -1}, "start_step: found -1"),
        ({"block_size": 21}, "found 40 tokens, wanted at least 2 . block_size = 42; .*--block_size=20"),
    ],
)
def test_arguments(corpora: dict[int, TokenSource], kwargs: dict[str, int], message: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        take(corpora[40], 1, **{"block_size": 4, "batch_size": 1, **kwargs})
    assert threading.active_count() == threads


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.sampled_from([40, 97, 256, 1001]),
    block_size=st.integers(1, 39),
    batch_size=st.integers(1, 30),
    max_batches=st.integers(1, 12),
    world_size=st.sampled_from([1, 2, 3, 4]),
)
def test_validation_blocks(
    corpora: dict[int, TokenSource],
    tokens: int,
    block_size: int,
    batch_size: int,
    max_batches: int,
    world_size: int,
) -> None:
    source = corpora[tokens]
    common = {"block_size": block_size, "batch_size": batch_size, "max_batches": max_batches}
    batches = list(validation_batches(source, **common))
    available = (tokens - 1) // block_size
    count = min(max_batches, available // batch_size)
    assert [len(batch[0]) for batch in batches] == ([batch_size] * count if count else [available])
    starts = []
    for inputs, targets in (row for batch in batches for row in zip(*batch, strict=True)):
        assert inputs.tolist() == list(range(int(inputs[0]), int(inputs[0]) + block_size))
        assert targets[:-1].tolist() == inputs[1:].tolist()
        starts.append(int(inputs[0]))
    assert all(start % block_size == 0 for start in starts)
    steps = np.diff(starts)
    assert (steps >= block_size).all()  # in order and disjoint
    if len(steps):
        assert steps.max() - steps.min() <= block_size  # evenly spread
        assert tokens - starts[-1] <= steps.max() + 2 * block_size
    shares = [list(validation_batches(source, **common, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sum(map(len, shares)) == len(batches)
    for rank, share in enumerate(shares):
        assert all(map(torch.equal, share, batches[rank::world_size]))


def test_validation_too_short(corpora: dict[int, TokenSource]) -> None:
    with pytest.raises(DataError, match=r"found 40 tokens in the split 'train', wanted at least block_size . 1 = 41"):
        validation_batches(corpora[40], block_size=40, batch_size=1, max_batches=1)
    assert len(list(validation_batches(corpora[40], block_size=39, batch_size=4, max_batches=9))) == 1
    with pytest.raises(ValueError, match="max_batches: found 0"):
        validation_batches(corpora[40], block_size=4, batch_size=1, max_batches=0)
