"""The order in which training reads the tokens: a pure function of seed and sample number.

An epoch is a permutation of disjoint blocks. In each epoch the grid of blocks starts at another offset.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["BatchOrder", "MixedOrder", "Offsets", "Permutation"]

Offsets = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_FEISTEL_ROUNDS = 6
"""Four rounds give a strong pseudorandom permutation for an ideal round function (Luby and Rackoff, 1988); two more
allow for halves of few bits."""


class BatchOrder:
    """Maps a sample number to the offset of its first token.

    Sample g is block `permutation(g % n_blocks)` of epoch `g // n_blocks`. Block i of an epoch has the tokens
    `offset + i * block_size + [0, block_size]`: block_size inputs, and one token more for the last target. The offset,
    in [0, block_size), and the permutation, a keyed Feistel network with cycle walking, are derived from seed and
    epoch.

    Args:
        tokens: Length of the token stream.
        block_size: Number of inputs of a sample.
        seed: Any integer; it is taken modulo 2**64.

    Attributes:
        n_blocks: Number of blocks, and so of samples, in an epoch.

    Raises:
        DataError: The stream has fewer than 2 * block_size tokens, the minimum that has a block at every offset.
    """

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size: found {block_size}, wanted at least 1")
        self.block_size = block_size
        self.n_blocks = (tokens - block_size) // block_size
        if self.n_blocks < 1:
            shorter = f" or --block_size={tokens // 2}" if tokens > 1 else ""
            raise DataError(
                f"training data: found {counted(tokens, 'token')}, wanted at least 2 * block_size = {2 * block_size:,}"
                f"; use more text{shorter}"
            )
        self._seed = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))
        self._permutation = Permutation(self.n_blocks)

    def offset(self, epoch: int) -> int:
        """Returns the offset of the first block of an epoch's grid, in [0, block_size)."""
        return int(self.offsets(np.array([epoch * self.n_blocks], np.int64))[0]) % self.block_size

    def offsets(self, samples: Offsets) -> Offsets:
        """Returns the offset of the first token of each sample, (n,) int64 -> (n,) int64."""
        epochs, blocks = np.divmod(samples.astype(np.uint64), np.uint64(self.n_blocks))
        counter = np.arange(_FEISTEL_ROUNDS + 1, dtype=np.uint64)[:, None]
        keys = _mix(_mix(self._seed ^ epochs) + counter)  # (1 + rounds, n)
        grid = keys[0] % np.uint64(self.block_size)
        return (grid + self._permutation(blocks, keys[1:]) * np.uint64(self.block_size)).astype(np.int64)


class Permutation:
    """A keyed pseudorandom permutation of the numbers below `n`: a Feistel network with cycle walking."""

    def __init__(self, n: int) -> None:
        self.n = n
        bits = (n - 1).bit_length()  # the network permutes [0, 2**bits), less than twice n
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def __call__(self, values: Words, keys: Words) -> Words:
        """Returns the image of `values`, (m,) uint64, under the permutations with `keys`, (`_FEISTEL_ROUNDS`, m)."""
        values = self._feistel(values, keys)
        # Cycle walking (Black and Rogaway, 2002): values beyond the range are permuted again. The network permutes less
        # than twice the range, so on average less than half of the values remain each time.
        while len(beyond := np.flatnonzero(values >= self.n)):
            values[beyond] = self._feistel(values[beyond], keys[:, beyond])
        return values

    def _feistel(self, values: Words, keys: Words) -> Words:
        low, high = values & self._low_mask, values >> self._low_bits
        for i in range(0, _FEISTEL_ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[i]) & self._high_mask)
            low = low ^ (_mix(high ^ keys[i + 1]) & self._low_mask)
        return (high << self._low_bits) | low


class MixedOrder:
    """The order of a mixture: which block of which data set each sample is.

    In each period of `PERIOD` samples every data set has a fixed number of samples, as near to its weight as whole
    numbers allow, and a keyed permutation spreads them over the period. So sample g is a pure function of seed and g.
    The samples of a data set follow its own `BatchOrder`.

    Args:
        tokens: Length of each token stream.
        weights: Share of the samples of each data set; they sum to 1.
        block_size: Number of inputs of a sample.
        seed: Any integer; it is taken modulo 2**64.

    Attributes:
        counts: Samples of each data set in a period.

    Raises:
        DataError: A stream is too short for `BatchOrder`, or a weight is too small for a sample in each period.
    """

    PERIOD = 4096

    def __init__(self, tokens: Sequence[int], weights: Sequence[float], block_size: int, seed: int) -> None:
        self.block_size = block_size
        self.counts = _apportion(weights, self.PERIOD)
        # Each data set has a seed of its own: two copies of one data set are not read in step.
        self.orders = [BatchOrder(n, block_size, seed + i * 0x9E37_79B9_7F4A_7C15) for i, n in enumerate(tokens)]
        self._bases = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self._seed = _mix(np.array([~seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))
        self._permutation = Permutation(self.PERIOD)

    def offsets(self, samples: Offsets) -> Offsets:
        """Returns the offset of the first token of each sample, (n,) int64 -> (n,) int64.

        Offsets count over the streams of all data sets, one after the other.
        """
        which, indices = self.locate(samples)
        offsets = np.empty_like(samples)
        for i, order in enumerate(self.orders):
            mine = which == i
            offsets[mine] = self._bases[i] + order.offsets(indices[mine])
        return offsets

    def locate(self, samples: Offsets) -> tuple[Offsets, Offsets]:
        """Returns the data set of each sample and its sample number there, (n,) int64 -> twice (n,) int64."""
        periods, places = np.divmod(samples.astype(np.uint64), np.uint64(self.PERIOD))
        counter = np.arange(_FEISTEL_ROUNDS, dtype=np.uint64)[:, None]
        spread = self._permutation(places, _mix(_mix(self._seed ^ periods) + counter)).astype(np.int64)
        which = np.searchsorted(self._ends, spread, side="right")
        counts = np.array(self.counts)[which]
        return which, periods.astype(np.int64) * counts + spread - (self._ends[which] - counts)

    def samples_of(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples are of each data set."""
        periods = samples // self.PERIOD
        begun, _ = self.locate(np.arange(periods * self.PERIOD, samples, dtype=np.int64))
        return [periods * count + int(np.count_nonzero(begun == i)) for i, count in enumerate(self.counts)]


def _apportion(weights: Sequence[float], seats: int) -> list[int]:
    """Returns whole numbers that sum to `seats` and are nearest to the weights, by the largest remainder.

    Raises:
        DataError: A weight gets none.
    """
    exact = [weight * seats for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        small = weights[counts.index(0)]
        raise DataError(f"dataset: found the weight {small:g} in a mixture, wanted at least {1 / seats:g} of the sum")
    return counts


def _mix(words: Words) -> Words:
    """Returns splitmix64 (Steele, Lea and Flood, 2014) of each word: every input bit affects every output bit."""
    words = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))
