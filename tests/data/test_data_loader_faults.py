"""The prefetch thread of the loader: errors, slow and stuck storage, closing, memory."""

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import exhaust, take, write_counting

from bench.measure.loader import rss_bytes, write_sparse_dataset
from gptperf.data.loader import Loader
from gptperf.data.shards import TokenSource
from gptperf.errors import DataError


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
    path = write_counting(tmp_path / "set", 5000, shard_tokens=1000)
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


@pytest.mark.slow
def test_stuck_read_does_not_hold_the_process(tmp_path: Path) -> None:
    path = write_counting(tmp_path / "set", 100)
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
