"""Batches that depend on nothing but the seed and the step, prefetched by one thread.

The order of the data is a pure function (`BatchOrder`), so there is no loader state to save: a run resumes at
step k by starting at step k, and the tokens of a step are the same on any number of GPUs. An epoch is a
permutation of disjoint blocks; the grid of blocks is shifted by another offset in each epoch.
"""

import collections
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from gptperf.data.shards import TokenSource
from gptperf.errors import DataError

__all__ = ["BatchOrder", "Loader", "validation_batches"]

Offsets = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_FEISTEL_ROUNDS = 6
"""Four rounds are a strong pseudorandom permutation for an ideal round function (Luby and Rackoff, 1988); six
leave room for a half of few bits."""
_ORDER_CHUNK = 4096
"""Samples whose order is computed at once: numpy's overhead of ~150 us a call becomes 0.04 us a sample."""


class BatchOrder:
    """The order in which training reads a stream of tokens: sample number -> token offset.

    Sample g is block `g % n_blocks`, permuted, of epoch `g // n_blocks`. Block i of an epoch covers the
    tokens `offset + i * block_size + [0, block_size]`: its inputs, and one more for the last target. The
    offset, in [0, block_size), and the permutation, a keyed Feistel network with cycle walking, are derived
    from seed and epoch.

    Args:
        tokens: Length of the stream.
        block_size: Inputs of a sample.
        seed: Any integer; taken modulo 2**64.

    Raises:
        DataError: The stream has fewer than 2 * block_size tokens, which hold one block at every offset.
    """

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size: found {block_size}, wanted at least 1")
        self.block_size = block_size
        self.n_blocks = (tokens - block_size) // block_size
        if self.n_blocks < 1:
            raise DataError(
                f"training data: found {tokens} tokens, wanted at least 2 * block_size = {2 * block_size}; "
                f"use more text or block_size <= {tokens // 2}"
            )
        self._seed = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))
        bits = (self.n_blocks - 1).bit_length()  # the network permutes [0, 2**bits), less than twice n_blocks
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def offset(self, epoch: int) -> int:
        """Return the first token of the epoch's grid of blocks, in [0, block_size)."""
        return int(self.offsets(np.array([epoch * self.n_blocks], np.int64))[0]) % self.block_size

    def offsets(self, samples: Offsets) -> Offsets:
        """Return the first token of each sample number, (n,) int64 -> (n,) int64."""
        epochs, blocks = np.divmod(samples.astype(np.uint64), np.uint64(self.n_blocks))
        counter = np.arange(_FEISTEL_ROUNDS + 1, dtype=np.uint64)[:, None]
        keys = _mix(_mix(self._seed ^ epochs) + counter)  # (1 + rounds, n)
        grid = keys[0] % np.uint64(self.block_size)
        return (grid + self._permute(blocks, keys[1:]) * np.uint64(self.block_size)).astype(np.int64)

    def _permute(self, blocks: Words, keys: Words) -> Words:
        values = self._feistel(blocks, keys)
        # Cycle walking (Black and Rogaway, 2002): values beyond the range go round again, less than half
        # of them each time on average.
        while len(beyond := np.flatnonzero(values >= self.n_blocks)):
            values[beyond] = self._feistel(values[beyond], keys[:, beyond])
        return values

    def _feistel(self, values: Words, keys: Words) -> Words:
        low, high = values & self._low_mask, values >> self._low_bits
        for i in range(0, _FEISTEL_ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[i]) & self._high_mask)
            low = low ^ (_mix(high ^ keys[i + 1]) & self._low_mask)
        return (high << self._low_bits) | low


class Loader:
    """Iterate over a rank's micro-batches of training, for ever, from step `start_step` on.

    Global micro-batch m of step s holds the samples `(s * micro_batches + m) * batch_size + [0, batch_size)`
    of the order, and rank r of w takes m = r, r + w, r + 2w, ...: the content of a step does not depend on w.

    Each item is a new torch.int64 tensor of shape (2, batch_size, block_size): inputs, and the tokens that
    follow them. One daemon thread reads ahead; its errors are raised by the iteration. No global random state
    is touched.

    Args:
        source: The tokens; used by the prefetch thread until `close`.
        block_size: T, tokens of a sequence.
        batch_size: B, sequences of a micro-batch.
        micro_batches: Micro-batches of a step of the whole job.
        seed: Seed of the order.
        rank: This process among the job's.
        world_size: Number of processes.
        start_step: The first step to yield.
        pin_memory: Allocate in page-locked memory, for asynchronous copies to the GPU.
        prefetch: Micro-batches to keep ready.
        timeout_s: Longest wait for one micro-batch.

    Attributes:
        wait_s: Seconds that the consumer has waited for data so far.

    Raises:
        ValueError: `micro_batches` is not divisible by `world_size`, or a count is not positive.
        DataError: The data is too short; later, a damaged shard, or no batch within `timeout_s`.
    """

    def __init__(
        self,
        source: TokenSource,
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
        self.order = BatchOrder(len(source), block_size, seed)
        self.wait_s = 0.0
        self._source = source
        self._batch_size = batch_size
        self._micro_batches = micro_batches
        self._rank = rank
        self._world_size = world_size
        self._start_step = start_step
        # A new thread starts on GPU 0: without this every rank would open a context there.
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
        """Return the next micro-batch, (2, B, T) int64, in the order of steps."""
        begin = time.perf_counter()
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._ready or self._error is not None or self._closed, self._timeout_s
            )
            self.wait_s += time.perf_counter() - begin
            if self._closed:
                raise RuntimeError("the loader is closed")
            if self._ready:  # batches before the error are good ones
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            if self._error is not None:
                raise self._error
            assert not arrived
        raise DataError(
            f"{self._source.path}: found no batch within {self._timeout_s:g} s, wanted one: the storage is "
            "slow or stuck"
        )

    def close(self) -> None:
        """Stop the prefetch thread and drop what it has read; a read that is stuck is left behind."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self) -> None:
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
        except BaseException as error:  # noqa: BLE001 - handed over whole: the consumer raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _micro_batch_offsets(self) -> Iterator[Offsets]:
        """Yield the token offsets of this rank's micro-batches, (B,) int64, without end."""
        per_step = self._micro_batches // self._world_size
        within = np.arange(self._batch_size, dtype=np.int64)
        chunk = max(1, _ORDER_CHUNK // self._batch_size)
        first = self._start_step * per_step  # number of a micro-batch among this rank's
        while True:
            step, index = np.divmod(np.arange(first, first + chunk, dtype=np.int64), per_step)
            micro_batch = step * self._micro_batches + self._rank + index * self._world_size
            samples = micro_batch[:, None] * self._batch_size + within
            yield from self.order.offsets(samples.reshape(-1)).reshape(samples.shape)
            first += chunk


def validation_batches(
    source: TokenSource,
    *,
    block_size: int,
    batch_size: int,
    max_batches: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[torch.Tensor]:
    """Yield this rank's share of the fixed validation batches, (2, B, T) int64: inputs and targets.

    The batches are disjoint blocks, evenly spread over the split and the same in every run; batch i goes to
    rank `i % world_size`, so a rank may have one batch fewer than another (or none). Only a split of fewer than
    `batch_size` blocks gives a smaller batch.

    Raises:
        ValueError: A count is not positive, or the rank is out of range.
        DataError: The split has fewer than block_size + 1 tokens.
    """
    _check_counts(block_size=block_size, batch_size=batch_size, max_batches=max_batches)
    _check_rank(rank, world_size)
    available = (len(source) - 1) // block_size
    if available < 1:
        raise DataError(
            f"{source.path}: found {len(source)} tokens in the split {source.split!r}, wanted at least "
            f"block_size + 1 = {block_size + 1}; use more text, a larger --val_fraction or a smaller "
            "block_size"
        )
    batch_size = min(batch_size, available)
    count = min(max_batches, available // batch_size) * batch_size
    blocks = np.arange(count, dtype=np.int64) * available // count
    offsets = (blocks * block_size).reshape(-1, batch_size)[rank::world_size]
    rows = np.empty((batch_size, block_size + 1), source.dtype)
    return (_read_batch(source, batch, rows, pin_memory=False) for batch in offsets)


def _read_batch(source: TokenSource, offsets: Offsets, rows: npt.NDArray[Any], pin_memory: bool) -> torch.Tensor:
    source.read_rows(offsets, rows)
    batch = torch.empty((2, rows.shape[0], rows.shape[1] - 1), dtype=torch.int64, pin_memory=pin_memory)
    view = batch.numpy()
    view[0] = rows[:, :-1]
    view[1] = rows[:, 1:]
    return batch


def _mix(words: Words) -> Words:
    """Return splitmix64 (Steele, Lea and Flood, 2014) of each word: every bit affects every other."""
    words = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: found {count}, wanted at least 1")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: found {rank} with world_size = {world_size}, wanted 0 <= rank < world_size")
