"""How the logits of linear_cross_entropy lie in memory; apart from the kernel, for a plan without torch."""

__all__ = ["chunk_rows", "padded"]

CHUNK_BYTES = 1_100_000_000
"""Of the logits of a chunk, where CHUNK_ROWS allow: 65536 rows of 50304 need less than 1 GB besides the gradients, and
32768 rows of 32000 are two chunks."""
CHUNK_ROWS = 2816
"""A chunk is a multiple of these, two at least: 22 tiles of 128 rows, so that dx fills the 132 multiprocessors of an
H200 with C = 768. There chunks of 8448 rows take 1.163 times the three products, 8192 rows 1.23."""
MULTIPLE = 8
"""Columns of logits are padded to a multiple of these: 16 bytes of 16-bit elements, which cuBLAS's fast products want."""


def padded(V: int) -> int:
    """Columns that V logits take."""
    return -(-V // MULTIPLE) * MULTIPLE


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk of logits `(rows, V)` of `itemsize` bytes each."""
    return CHUNK_ROWS * max(2, CHUNK_BYTES // (CHUNK_ROWS * padded(V) * itemsize))
