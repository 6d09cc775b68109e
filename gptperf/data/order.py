"""The order in which training reads the tokens: a pure function of seed and sample number.

An epoch is a permutation of disjoint blocks. In each epoch the grid of blocks starts at another offset.
"""

import numpy as np
import numpy.typing as npt

from gptperf.errors import DataError

__all__ = ["BatchOrder", "Offsets"]

Offsets = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

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
                f"training data: found {tokens} tokens, wanted at least 2 * block_size = {2 * block_size}; "
                f"use more text{shorter}"
            )
        self._seed = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))
        bits = (self.n_blocks - 1).bit_length()  # the network permutes [0, 2**bits), less than twice n_blocks
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def offset(self, epoch: int) -> int:
        """Returns the offset of the first block of an epoch's grid, in [0, block_size)."""
        return int(self.offsets(np.array([epoch * self.n_blocks], np.int64))[0]) % self.block_size

    def offsets(self, samples: Offsets) -> Offsets:
        """Returns the offset of the first token of each sample, (n,) int64 -> (n,) int64."""
        epochs, blocks = np.divmod(samples.astype(np.uint64), np.uint64(self.n_blocks))
        counter = np.arange(_FEISTEL_ROUNDS + 1, dtype=np.uint64)[:, None]
        keys = _mix(_mix(self._seed ^ epochs) + counter)  # (1 + rounds, n)
        grid = keys[0] % np.uint64(self.block_size)
        return (grid + self._permute(blocks, keys[1:]) * np.uint64(self.block_size)).astype(np.int64)

    def _permute(self, blocks: _Words, keys: _Words) -> _Words:
        values = self._feistel(blocks, keys)
        # Cycle walking (Black and Rogaway, 2002): values beyond the range are permuted again. The network permutes less
        # than twice the range, so on average less than half of the values remain each time.
        while len(beyond := np.flatnonzero(values >= self.n_blocks)):
            values[beyond] = self._feistel(values[beyond], keys[:, beyond])
        return values

    def _feistel(self, values: _Words, keys: _Words) -> _Words:
        low, high = values & self._low_mask, values >> self._low_bits
        for i in range(0, _FEISTEL_ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[i]) & self._high_mask)
            low = low ^ (_mix(high ^ keys[i + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def _mix(words: _Words) -> _Words:
    """Returns splitmix64 (Steele, Lea and Flood, 2014) of each word: every input bit affects every output bit."""
    words = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))
