"""How the logits of linear_cross_entropy lie in memory; apart from the kernel, for a plan without torch."""

__all__ = ["chunk_rows", "row_stride"]

CHUNK_BYTES = 850_000_000
"""Of the logits of a chunk, where CHUNK_ROWS allow: 65536 rows of 50304 need less than 1 GB besides the gradients."""
CHUNK_ROWS = 2816
"""A chunk is a multiple of these, two at least: 22 tiles of 128 rows, so that dx fills the 132 multiprocessors of an
H200 with C = 768. There chunks of 8448 rows take 1.163 times the three products, 8192 rows 1.23."""
ROW_MULTIPLE = 8
"""Elements from a row to the next are a multiple of these: rows of 16-bit elements then begin at multiples of 16 bytes,
which cuBLAS's fast products likely need: with rows of V elements a step of gpt2_openai_124m, V = 50257, took 112 ms on
an H200 where 57 were planned. Not timed since."""


def row_stride(V: int) -> int:
    """Elements from a row of V logits to the next."""
    return -(-V // ROW_MULTIPLE) * ROW_MULTIPLE


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk of logits `(rows, V)` of `itemsize` bytes each."""
    return CHUNK_ROWS * max(2, CHUNK_BYTES // (CHUNK_ROWS * row_stride(V) * itemsize))
