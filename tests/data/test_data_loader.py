"""Batches: every token once an epoch, whatever the ranks and the resume point; and the loader's faults."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measure.loader import rss_bytes, write_sparse_dataset
from gptperf.data.loader import Loader, validation_batches
from gptperf.data.order import BatchOrder
from gptperf.data.shards import TokenSource
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError


class Counting:
    """A tokenizer whose vocabulary is as large as the corpus, so that a token can tell its position."""

    name = "counting"
    vocab_size = 1 << 20
    eot = (1 << 20) - 1
    fingerprint = "0" * 64


def write(path: Path, tokens: int, shard_tokens: int = 100) -> Path:
    """Write a training split, and a validation split, of `tokens` tokens: 0, 1, 2, ..., eot."""
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


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenSource]:
    """Sources of several lengths, by length."""
    root = tmp_path_factory.mktemp("corpora")
    sizes = (40, 97, 256, 1001)
    return {size: TokenSource.open(write(root / str(size), size, shard_tokens=37), "train") for size in sizes}


def take(source: TokenSource, count: int, **kwargs: Any) -> list[torch.Tensor]:
    with Loader(source, **{"seed": 1, "micro_batches": 1, **kwargs}) as loader:
        return list(itertools.islice(loader, count))


def exhaust(loader: Loader) -> None:
    """Take batches until an error; the loader itself never ends."""
    for _ in loader:
        pass


# Order.


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


# Loader.


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
        ({"block_size": 21}, "found 40 tokens, wanted at least 2 . block_size = 42; .*block_size <= 20"),
    ],
)
def test_arguments(corpora: dict[int, TokenSource], kwargs: dict[str, int], message: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        take(corpora[40], 1, **{"block_size": 4, "batch_size": 1, **kwargs})
    assert threading.active_count() == threads


# Faults of the loader.


class Proxy:
    """A source that calls `before_read` and then reads from another."""

    def __init__(self, source: TokenSource, before_read: Any) -> None:
        self._source, self._before_read = source, before_read
        self.path, self.dtype, self.split = source.path, source.dtype, source.split

    def __len__(self) -> int:
        return len(self._source)

    def read_rows(self, *args: Any) -> None:
        self._before_read()
        self._source.read_rows(*args)


def proxy(source: TokenSource, before_read: Any) -> Any:
    return Proxy(source, before_read)


def test_error_in_the_thread_is_raised_after_the_good_batches(corpora: dict[int, TokenSource]) -> None:
    reads = itertools.count()

    def fail_at_the_third() -> None:
        if next(reads) == 2:
            raise ZeroDivisionError("of the thread")

    source = proxy(corpora[256], fail_at_the_third)
    with Loader(source, block_size=8, batch_size=2, micro_batches=1, seed=1) as loader:
        while threading.active_count() > 1 and loader._error is None:
            time.sleep(0.001)
        good = [next(loader), next(loader)]
        assert all(map(torch.equal, good, take(corpora[256], 2, block_size=8, batch_size=2)))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="of the thread"):
                next(loader)


def test_shard_that_shrinks_during_training(tmp_path: Path) -> None:
    path = write(tmp_path / "set", 5000, shard_tokens=1000)
    with TokenSource.open(path, "train") as source:
        loader = Loader(source, block_size=10, batch_size=4, micro_batches=1, seed=1)
        with loader:
            next(loader)
            os.truncate(path / "train_00003.bin", 100)
            with pytest.raises(DataError, match=r"train_00003\.bin: found 100 bytes.*truncated"):
                exhaust(loader)


def test_stuck_storage_is_an_error_in_words(corpora: dict[int, TokenSource]) -> None:
    release = threading.Event()
    source = proxy(corpora[256], release.wait)
    with Loader(source, block_size=8, batch_size=2, micro_batches=1, seed=1, timeout_s=0.05) as loader:
        with pytest.raises(DataError, match=r"no batch within 0\.05 s.*slow or stuck"):
            next(loader)
        assert loader.wait_s >= 0.05
        release.set()


def test_wait_is_counted_only_when_the_consumer_waits(corpora: dict[int, TokenSource]) -> None:
    slow = proxy(corpora[256], lambda: time.sleep(0.03))
    with Loader(slow, block_size=8, batch_size=2, micro_batches=1, seed=1) as loader:
        for _ in range(3):
            next(loader)
        assert loader.wait_s > 0.05
        waited = loader.wait_s
        time.sleep(0.5)  # the consumer computes, the thread reads ahead
        next(loader)
        assert loader.wait_s - waited < 0.5


@pytest.mark.parametrize("consumed", [0, 1, 10])
def test_close_joins_the_thread_and_reads_no_more(corpora: dict[int, TokenSource], consumed: int) -> None:
    reads = []
    source = proxy(corpora[256], lambda: reads.append(1))
    with Loader(source, block_size=8, batch_size=2, micro_batches=1, seed=1, prefetch=3) as loader:
        for _ in range(consumed):
            next(loader)
        assert loader._thread.daemon
    assert not loader._thread.is_alive()
    assert len(reads) <= consumed + 3 + 1  # the queue, and one in the thread's hand
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    loader.close()


def test_close_wakes_a_waiting_consumer(corpora: dict[int, TokenSource]) -> None:
    release = threading.Event()
    with Loader(proxy(corpora[256], release.wait), block_size=8, batch_size=2, micro_batches=1, seed=1) as loader:
        threading.Timer(0.05, lambda: (release.set(), loader.close())).start()
        with pytest.raises(RuntimeError, match="closed"):
            exhaust(loader)


def test_stuck_read_does_not_hold_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "set", 100)
    code = f"""
import threading
from gptperf.data.loader import Loader
from gptperf.data.shards import TokenSource
TokenSource.read_rows = lambda self, *args: threading.Event().wait()
loader = Loader(TokenSource.open({str(path)!r}, "train"), block_size=4, batch_size=1, micro_batches=1, seed=1)
print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_resident_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    path = write_sparse_dataset(tmp_path / "sparse", size_bytes=20_000_000_000, dtype="uint16")
    with TokenSource.open(path, "train") as source:
        assert len(source) == 10_000_000_000
        with Loader(source, block_size=1024, batch_size=16, micro_batches=1, seed=1) as loader:
            for _ in range(50):
                next(loader)
            before = rss_bytes()
            for _ in range(3000):  # reads 98 MB, each row in pages of its own
                next(loader)
            assert rss_bytes() - before < 24e6


# Validation.


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
