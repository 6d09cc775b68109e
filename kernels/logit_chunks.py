"""The layout of the logits of linear_cross_entropy; a file without torch, because the memory plan reads it too."""

__all__ = ["chunk_rows", "padded"]

CHUNK_BYTES = 1_100_000_000
"""The most bytes of a chunk of logits, unless two times CHUNK_ROWS rows need more: 65536 rows of 50304 need less than
1 GB besides the gradients, and 32768 rows of 32000 are two chunks."""
CHUNK_ROWS = 2816
"""The rows of a chunk are a multiple of this number, and at least two times it. It is 22 tiles of 128 rows, so that dx
fills the 132 multiprocessors of an H200 with C = 768. There the op takes 1.16 to 1.20 times as long as its three
products, depending on the card, with chunks of 8448 rows, and 1.23 times with 8192 rows."""
MULTIPLE = 8
"""The columns of logits are padded to a multiple of this number, because cuBLAS's fast products need it. With V = 50257
a step of gpt2_openai_124m took 112 ms on an H200 without padding, and 99 ms with padded rows and products of V columns;
the plan says 57 ms. With products of the padded size it took 62 ms on an H100, as planned there."""


def padded(V: int) -> int:
    """Returns the number of columns that V logits take."""
    return -(-V // MULTIPLE) * MULTIPLE


def chunk_rows(V: int, itemsize: int) -> int:
    """Returns the rows of a chunk of logits `(rows, V)`, each of `itemsize` bytes."""
    return CHUNK_ROWS * max(2, CHUNK_BYTES // (CHUNK_ROWS * padded(V) * itemsize))
