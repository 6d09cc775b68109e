"""The quantities that cards state, and sizes in bytes."""

from typing import Literal, NamedTuple

__all__ = ["BUCKET_NUMEL", "FP32_BYTES", "Cost", "Implementation", "Matmul", "Moved", "element_bytes"]

FP32_BYTES = 4
"""Bytes of a float32 element: master weights, gradients, optimizer states, statistics of a norm."""

BUCKET_NUMEL = 32 << 20
"""Most elements in a bucket of parameters, unless one parameter alone is larger."""

Implementation = Literal["triton", "compiled", "eager"]
"""The code that runs the fused ops: Triton kernels, or PyTorch with or without torch.compile."""

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": FP32_BYTES}


def element_bytes(dtype: str) -> int:
    """Returns the bytes of an element of a compute dtype: bfloat16, float16 or float32."""
    return _ELEMENT_BYTES[dtype]


class Cost(NamedTuple):
    """Forward FLOPs of one element. Every operation counts as one, including exp, erf and tanh."""

    flops: int
    why: str
    """The operations that are counted, in words."""


class Matmul(NamedTuple):
    """A linear layer: `(T, into)` times the transpose of a weight `(out, into)`."""

    name: str
    out: int
    """Columns of the result."""
    into: int
    """Columns of the input."""
    packed: tuple[int, ...] = ()
    """Rows of the matrices that are packed in the weight; empty if it is one matrix."""

    @property
    def weight(self) -> int:
        """Number of elements of the weight."""
        return self.out * self.into

    @property
    def matrices(self) -> tuple[int, ...]:
        """Rows of each matrix in the weight."""
        return self.packed or (self.out,)


class Moved(NamedTuple):
    """Elements read from and written to GPU memory for one token."""

    forward: int
    backward: int
