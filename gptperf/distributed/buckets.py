"""Flat buckets: parameters that lie in one buffer, with one optimizer tensor and one reduction."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptperf.cards import BUCKET_NUMEL
from gptperf.distributed.collectives import Pending

__all__ = ["ALIGN", "BUCKET_NUMEL", "Bucket", "Layout", "Piece", "Place", "by_size", "gaps", "gradient_of", "runs"]

ALIGN = 64
"""Elements that a parameter's place in a bucket is a multiple of: 128 bytes of bfloat16, for vector loads."""


class Piece(NamedTuple):
    """Elements of one parameter, flat, in memory that belongs to a bucket."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """First element."""
    values: Tensor


@dataclass(eq=False)
class Bucket:
    """Parameters that lie in one flat buffer: one optimizer tensor, one reduction.

    The gaps that alignment leaves are zero and stay zero.
    """

    names: list[str]
    decayed: bool
    master: nn.Parameter
    """float32: all elements, or those of this process."""
    grad: Tensor
    """float32: all elements, or those of this process."""
    compute: Tensor
    """All elements, as the model reads them."""
    copy: Tensor | None
    """The part of `compute` that master is rounded into; None where the model reads master itself."""
    arrived: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Gradients of this micro-batch that are not in `grad` yet."""
    started: set[str] = field(default_factory=set, repr=False)
    """Parameters that have had a gradient in this step."""
    full: bool = False
    """Whether every parameter has had its gradient in this micro-batch."""
    reduction: Pending | None = field(default=None, repr=False)


class Layout(NamedTuple):
    """What is to become a bucket."""

    parameters: dict[str, nn.Parameter]
    decayed: bool
    offsets: list[int]
    numel: int


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its bucket."""

    bucket: Bucket
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


def gradient_of(bucket: Bucket) -> Tensor:
    """What the optimizer takes, once it is reduced."""
    assert bucket.master.grad is not None
    return bucket.master.grad


def gaps(places: Iterable[Place], numel: int) -> Iterator[tuple[int, int]]:
    """What lies between the parameters of a bucket, and after the last one."""
    at = 0
    for place in sorted(places, key=lambda place: place.offset):
        if place.offset > at:
            yield at, place.offset
        at = place.offset + place.shape.numel()
    if at < numel:
        yield at, numel


def by_size(parameters: dict[str, nn.Parameter], numel: int) -> Iterator[list[str]]:
    """Names in the order in which backward reaches them (last layer first), in runs of about `numel` elements."""
    return runs([[name] for name in reversed(parameters)], parameters, numel)


def runs(groups: Sequence[list[str]], parameters: dict[str, nn.Parameter], numel: int) -> Iterator[list[str]]:
    """Groups of names joined until together they have `numel` elements; one that has them stays by itself.

    So the embedding, the last to have its gradient, has nobody else's reduced after backward has ended.
    """
    names: list[str] = []
    size = 0
    for group in groups:
        more = sum(parameters[name].numel() for name in group)
        if names and more >= numel:
            yield names
            names, size = [], 0
        names, size = names + group, size + more
        if size >= numel:
            yield names
            names, size = [], 0
    if names:
        yield names
