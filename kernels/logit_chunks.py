"""How the logits of linear_cross_entropy lie in memory; apart from the kernel, for a plan without torch."""

__all__ = ["chunk_rows", "padded"]

CHUNK_BYTES = 1_100_000_000
"""Of the logits of a chunk, where CHUNK_ROWS allow: 65536 rows of 50304 need less than 1 GB besides the gradients, and
32768 rows of 32000 are two chunks."""
CHUNK_ROWS = 2816
"""A chunk is a multiple of these, two at least: 22 tiles of 128 rows, so that dx fills the 132 multiprocessors of an
H200 with C = 768. There chunks of 8448 rows take 1.16 to 1.20 times the three products, by card, 8192 rows 1.23."""
MULTIPLE = 8
"""Columns of logits are padded to a multiple of these, as cuBLAS's fast products want it: with V = 50257 a step of
gpt2_openai_124m took 112 ms on an H200 without padding and 99 with padded rows and products of V columns, where 57 are
planned; with products of padded size 62 on an H100, as planned there."""


def padded(V: int) -> int:
    """Columns that V logits take."""
    return -(-V // MULTIPLE) * MULTIPLE


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk of logits `(rows, V)` of `itemsize` bytes each."""
    return CHUNK_ROWS * max(2, CHUNK_BYTES // (CHUNK_ROWS * padded(V) * itemsize))
