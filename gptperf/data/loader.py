"""Training batches, which one thread prefetches, and the fixed validation batches.

The order of the data is a pure function of seed and sample number (`order.BatchOrder`), so the loader has no state to
save: a run resumes at step k by starting at step k, and the tokens of a step are the same on any number of GPUs.
"""

import collections
import math
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from gptperf.data.mixture import MixedTokens, order_of
from gptperf.data.order import Offsets
from gptperf.data.shards import TokenSource
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["Loader", "validation_batches", "validation_count"]

_ORDER_CHUNK = 4096
"""Number of samples whose order is computed at once: the overhead of ~150 us per call is then 0.04 us per sample."""


class Loader:
    """Yields the micro-batches of a rank without end, from step `start_step` on.

    Micro-batch m of step s of the whole job holds the samples `(s * micro_batches + m) * batch_size + [0, batch_size)`
    of the order. Rank r of w takes m = r, r + w, r + 2w, ..., so the content of a step does not depend on w.

    Each item is a new int64 tensor (2, B, T): the inputs, and for each input the token that follows it. One daemon
    thread reads ahead; the iteration raises its errors. No global random state is read or changed.

    Args:
        source: The tokens; the prefetch thread reads them until `close`.
        block_size: T, tokens of a sequence.
        batch_size: B, sequences of a micro-batch.
        micro_batches: Micro-batches of a step of the whole job.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of ranks.
        start_step: First step to yield.
        pin_memory: Whether batches are in page-locked memory, for asynchronous copies to the GPU.
        prefetch: Number of micro-batches that are kept ready.
        timeout_s: Longest wait for one micro-batch.

    Attributes:
        order: Order of the samples.
        wait_s: Seconds that the consumer has waited for data so far.

    Raises:
        ValueError: `micro_batches` is not divisible by `world_size`, or a count is not positive.
        DataError: The data is too short. While iterating: a shard is corrupt, or no batch came within `timeout_s`.
    """

    def __init__(
        self,
        source: TokenSource | MixedTokens,
        *,
        block_size: int,
        batch_size: int,
        micro_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
        timeout_s: float = 120.0,
    ) -> None:
        _check_counts(batch_size=batch_size, micro_batches=micro_batches, prefetch=prefetch)
        _check_rank(rank, world_size)
        if start_step < 0:
            raise ValueError(f"start_step: found {start_step}, wanted at least 0")
        if micro_batches % world_size:
            near = max(world_size, round(micro_batches / world_size) * world_size)
            raise ValueError(
                f"micro_batches: found {micro_batches}, wanted a multiple of world_size = {world_size}, e.g. {near}"
            )
        self.order = order_of(source, block_size, seed)
        self.wait_s = 0.0
        self._source = source
        self._batch_size = batch_size
        self._micro_batches = micro_batches
        self._rank = rank
        self._world_size = world_size
        self._start_step = start_step
        # The current device of a new thread is GPU 0: without this every rank would create a context there.
        self._device = torch.cuda.current_device() if pin_memory else None
        self._timeout_s = timeout_s
        self._ready: collections.deque[torch.Tensor] = collections.deque()
        self._prefetch = prefetch
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="gptperf-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        """Returns the next micro-batch, (2, B, T) int64."""
        begin = time.perf_counter()
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._ready or self._error is not None or self._closed, self._timeout_s
            )
            self.wait_s += time.perf_counter() - begin
            if self._closed:
                raise RuntimeError("the loader is closed")
            if self._ready:  # batches that were read before an error are valid
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            if self._error is not None:
                raise self._error
            assert not arrived
        raise DataError(
            f"{self._source.path}: found no batch within {self._timeout_s:g} s: the storage is slow or stuck"
        )

    def close(self) -> None:
        """Stops the prefetch thread and drops its batches; a thread in a read that does not return is left running."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _produce(self) -> None:
        """Reads batches ahead, in the prefetch thread, until `close`."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            rows = np.empty((self._batch_size, self.order.block_size + 1), self._source.dtype)
            for offsets in self._micro_batch_offsets():
                batch = _read_batch(self._source, offsets, rows, pin_memory=self._device is not None)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._prefetch)
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the consumer raises it unchanged
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _micro_batch_offsets(self) -> Iterator[Offsets]:
        """Yields the token offsets of this rank's micro-batches, (B,) int64, without end."""
        per_step = self._micro_batches // self._world_size
        within = np.arange(self._batch_size, dtype=np.int64)
        chunk = max(1, _ORDER_CHUNK // self._batch_size)
        first = self._start_step * per_step  # index among the micro-batches of this rank, over all steps
        while True:
            step, index = np.divmod(np.arange(first, first + chunk, dtype=np.int64), per_step)
            micro_batch = step * self._micro_batches + self._rank + index * self._world_size
            samples = micro_batch[:, None] * self._batch_size + within
            yield from self.order.offsets(samples.reshape(-1)).reshape(samples.shape)
            first += chunk


def validation_count(source: TokenSource, *, block_size: int, batch_size: int, max_batches: int) -> int:
    """Returns the number of batches that `validation_batches` gives to all ranks together."""
    available = (len(source) - 1) // block_size
    return min(max_batches, available // min(batch_size, available)) if available else 0


def validation_batches(
    source: TokenSource,
    *,
    block_size: int,
    batch_size: int,
    max_batches: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[torch.Tensor]:
    """Yields this rank's share of the fixed validation batches, (2, B, T) int64: inputs and targets.

    The batches are disjoint blocks, evenly spread over the split, and the same in every run. Batch i belongs to rank
    `i % world_size`, so a rank may have one batch fewer than another rank, or none. A split with fewer than
    `batch_size` blocks gives one smaller batch.

    Raises:
        ValueError: A count is not positive, or the rank is out of range.
        DataError: The split has fewer than block_size + 1 tokens.
    """
    _check_counts(block_size=block_size, batch_size=batch_size, max_batches=max_batches)
    _check_rank(rank, world_size)
    available = (len(source) - 1) // block_size
    if available < 1:
        raise DataError(
            f"{source.path}: found {counted(len(source), 'token')} in the split {source.split!r}, wanted at least "
            f"block_size + 1 = {block_size + 1:,}; {_longer_split(source, block_size)}"
        )
    count = validation_count(source, block_size=block_size, batch_size=batch_size, max_batches=max_batches)
    batch_size = min(batch_size, available)
    count *= batch_size
    blocks = np.arange(count, dtype=np.int64) * available // count
    offsets = (blocks * block_size).reshape(-1, batch_size)[rank::world_size]
    rows = np.empty((batch_size, block_size + 1), source.dtype)
    return (_read_batch(source, batch, rows, pin_memory=False) for batch in offsets)


def _longer_split(source: TokenSource, block_size: int) -> str:
    """Returns what to do about a validation split that has no block."""
    total = sum(split.tokens for split in source.manifest.splits.values())
    advice = ["use more text"]
    if len(source) > 1:
        advice.append(f"--block_size={len(source) - 1}")
    share = math.ceil(1100 * (block_size + 1) / total) / 1000  # a tenth more, because it is a share of the bytes
    if share * total + 2 * block_size < total:
        advice.append(f"prepare it again with --val_fraction={share:.3f} --overwrite=True")
    return " or ".join([", ".join(advice[:-1]), advice[-1]]) if len(advice) > 1 else advice[0]


def _read_batch(
    source: TokenSource | MixedTokens, offsets: Offsets, rows: npt.NDArray[Any], pin_memory: bool
) -> torch.Tensor:
    """Reads the blocks at `offsets` through the buffer `rows`, (B, T + 1), into a new tensor (2, B, T) int64."""
    source.read_rows(offsets, rows)
    batch = torch.empty((2, rows.shape[0], rows.shape[1] - 1), dtype=torch.int64, pin_memory=pin_memory)
    view = batch.numpy()
    view[0] = rows[:, :-1]
    view[1] = rows[:, 1:]
    return batch


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: found {count}, wanted at least 1")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: found {rank} with world_size = {world_size}, wanted 0 <= rank < world_size")
