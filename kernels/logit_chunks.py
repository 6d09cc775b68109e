"""The layout of the logits of linear_cross_entropy. The file loads no torch, because the memory plan imports it too."""

__all__ = ["chunk_rows", "padded"]

CHUNK_BYTES = 1_100_000_000
"""Maximum bytes of a chunk of logits, unless two times CHUNK_ROWS rows need more. With it, 65536 rows of 50304 need
less than 1 GB besides the gradients, and 32768 rows of 32000 are two chunks."""
CHUNK_ROWS = 2816
"""The rows of a chunk are a multiple of this number, and at least twice this number. It is 22 tiles of 128 rows, so
that with C = 768 the matmul for dx fills the 132 multiprocessors of an H200. There the op takes 1.16 to 1.20 times as
long as its three matmuls, depending on the GPU, with chunks of 8448 rows, and 1.23 times with 8192 rows."""
MULTIPLE = 8
"""The columns of logits are padded to a multiple of this number, because cuBLAS's fast matmuls need it. With V = 50257
a step of gpt2_openai_124m took 112 ms on an H200 without padding, and 99 ms with padded rows and matmuls of V columns;
the plan predicts 57 ms. With matmuls of the padded size it took 62 ms on an H100, as planned for that GPU."""


def padded(V: int) -> int:
    """Returns the number of columns that V logits take with padding."""
    return -(-V // MULTIPLE) * MULTIPLE


def chunk_rows(V: int, itemsize: int) -> int:
    """Returns the rows of a chunk of logits `(rows, V)`, each of `itemsize` bytes."""
    return CHUNK_ROWS * max(2, CHUNK_BYTES // (CHUNK_ROWS * padded(V) * itemsize))
