"""The 8-bit float formats of the fp8 matmuls, and the rule that chooses a scale.

A tensor x is stored as q = round(x s) in 8 bits with one scale s, a power of two, so that scaling is exact. The largest
value of x comes to lie between 1/2 and 1 of the largest power of two of the format, a factor of 1.75 to 3.5 below the
largest number. That is the headroom of a delayed scale, which comes from the steps before; as the formats are floating
point, it costs a bit of range at the small end and no precision.

Values beyond the largest number are clamped to it. Infinities and NaN become NaN, so that a step with such gradients is
still found and skipped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["E4M3", "E5M2", "FACTORS", "INVERSE", "PROGRAMS", "SCALE_EXPONENT", "STATISTICS"]
__all__ += ["Float8", "format_of", "scale_of"]

PROGRAMS = 528
"""Most programs of a kernel that quantises, and partial results in its statistics: four for each multiprocessor of an
H200. The same on every GPU, because statistics have this shape."""
FACTORS, INVERSE = 8, 4
"""Elements of the tensor with a scale, and the index of the inverse scale: both at multiples of 16 bytes."""
STATISTICS = ("amax", "saturated", "flushed", "counted")
"""What is counted of a matrix before it is quantised: its largest absolute value, NaN if there is a NaN; and, of a
sample of its elements, those that are clamped, those that become 0, and all."""
SCALE_EXPONENT = 100
"""The exponent of a scale lies between this and its negative; the inverse too is then a normal float32 number."""


class Float8(NamedTuple):
    """An 8-bit float format."""

    dtype: torch.dtype
    largest: float
    """Largest number."""
    top: int
    """Exponent of the largest number."""
    least: int
    """Exponent of the smallest normal number."""
    mantissa: int
    """Bits of the mantissa."""

    @property
    def smallest(self) -> float:
        """Smallest number above 0. What is at most half of it becomes 0."""
        return 2.0 ** (self.least - self.mantissa)


E4M3 = Float8(torch.float8_e4m3fn, 448.0, 8, -6, 3)
E5M2 = Float8(torch.float8_e5m2, 57344.0, 15, -14, 2)


def format_of(e5m2: bool) -> Float8:
    """Returns one of the two formats."""
    return E5M2 if e5m2 else E4M3


def scale_of(amax: Tensor, top: int | Tensor) -> Tensor:
    """Returns the scale of tensors from their largest absolute values; 1 where one is not finite.

    Args:
        amax: float32, any shape, not negative.
        top: `Float8.top` of the format, or an int32 tensor of one for each.
    """
    biased = (amax.contiguous().view(torch.int32) >> 23) & 255  # exponent of amax plus 127
    exponent = (top - 1 - (biased - 127)).clamp(-SCALE_EXPONENT, SCALE_EXPONENT)
    return ((torch.where(biased == 255, 0, exponent) + 127) << 23).view(torch.float32)
