"""Flat buckets: parameters of one kind in one buffer, with one reduction and one optimizer update.

A model has hundreds of parameters, most of them small. In a few flat buffers they need only a few collectives and a few
optimizer launches per step.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptperf.cards import BUCKET_NUMEL
from gptperf.distributed.bucket_sizes import join_units
from gptperf.distributed.collectives import Pending

__all__ = ["BUCKET_NUMEL", "Bucket", "BucketGroup", "Layout", "Piece", "Place", "by_size", "gaps"]
__all__ += ["Accumulate", "add_gradients", "gradient_of", "group_of"]

Accumulate = Callable[[Tensor, Tensor], None]
"""The op `gptperf.kernels.accumulate`."""


class BucketGroup(Enum):
    """The kind of parameters in a bucket. All parameters of a bucket are of one group.

    The group decides how the parameters of a bucket are trained and stored. Muon updates the hidden matrices, and the
    shards of their buckets are then cut between matrices (`gptperf.distributed.matrices`).
    """

    HIDDEN = "hidden matrix"
    """Matrices of the blocks."""
    EMBEDDING = "embedding or head"
    """Matrices outside the blocks: token and position embeddings, lm_head."""
    VECTOR = "vector"
    """Norm weights and biases."""

    @property
    def has_weight_decay(self) -> bool:
        """Whether the optimizer decays the weights."""
        return self is not BucketGroup.VECTOR

    @property
    def uses_compute_dtype(self) -> bool:
        """Whether the model reads a copy in the compute dtype; its gradients then have that dtype too.

        Vectors stay float32: they are a thousandth of a model, and the fused kernels compute with them in float32.
        """
        return self is not BucketGroup.VECTOR

    @property
    def fsdp_shards(self) -> bool:
        """Whether FSDP drops the weights between uses.

        Vectors stay whole on every rank. All vectors of a model lie in one bucket, which saves a small gather per unit,
        and dropping them would free very little memory.
        """
        return self is not BucketGroup.VECTOR


def group_of(name: str, parameter: Tensor) -> BucketGroup:
    """Returns the group of a parameter, by its name in the model and its number of dimensions."""
    if parameter.ndim < 2:
        return BucketGroup.VECTOR
    return BucketGroup.HIDDEN if name.startswith("blocks.") else BucketGroup.EMBEDDING


class Piece(NamedTuple):
    """Consecutive elements of one parameter, as a view of one of the buffers of its bucket."""

    name: str
    shape: torch.Size
    """Shape of the whole parameter."""
    start: int
    """Index of the first element in the flat parameter."""
    values: Tensor
    """The elements, flat."""


@dataclass(eq=False)
class Bucket:
    """Parameters of one group in one flat buffer.

    "Held by this rank" means all elements under DDP, and the shard of this rank under ZeRO-1 and FSDP: the elements
    that its optimizer updates. The gaps that alignment leaves between parameters are zero and stay zero: their gradient
    is zero, so they change neither the gradient norm nor the weights.
    """

    names: list[str]
    """Names of the parameters, in the order in which they lie in the buffer."""
    group: BucketGroup
    master: nn.Parameter
    """Master weights held by this rank, float32. Its `grad` is set once the gradient is reduced."""
    grad: Tensor
    """Accumulated gradient, float32, or in the dtype of `compute` if it is that of one micro-batch of one process. It
    has all elements, or only those of this rank's shard where FSDP reduces every micro-batch."""
    compute: Tensor
    """All elements as the model reads them. Under FSDP its storage is empty while the weights are dropped."""
    copy: Tensor | None
    """Buffer into which the optimizer rounds `master`; None where the model reads the master weights themselves."""
    arrived: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Gradients of this micro-batch that are not yet added to `grad`, by parameter."""
    started: set[str] = field(default_factory=set, repr=False)
    """Parameters that have had a gradient in this step: the first gradient overwrites `grad`, later ones are added."""
    full: bool = False
    """Whether every parameter has had its gradient in this micro-batch."""
    reduction: Pending | None = field(default=None, repr=False)
    """The reduction of `grad` that is in progress."""


class Layout(NamedTuple):
    """Parameters and offsets of a bucket whose buffers do not exist yet."""

    parameters: dict[str, nn.Parameter]
    group: BucketGroup
    offsets: list[int]
    """First element of each parameter."""
    numel: int
    """Elements of the bucket, including all gaps."""


@dataclass(frozen=True)
class Place:
    """The position of a parameter in its bucket."""

    bucket: Bucket
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """Returns the parameter's part of a flat buffer of the whole bucket, as a view in the parameter's shape."""
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


def gradient_of(bucket: Bucket) -> Tensor:
    """Returns the reduced gradient of a bucket, as the optimizer reads it."""
    assert bucket.master.grad is not None
    return bucket.master.grad


def gaps(places: Iterable[Place], numel: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges `(begin, end)` of a bucket of `numel` elements that belong to no parameter."""
    at = 0
    for place in sorted(places, key=lambda place: place.offset):
        if place.offset > at:
            yield at, place.offset
        at = place.offset + place.shape.numel()
    if at < numel:
        yield at, numel


def by_size(parameters: dict[str, nn.Parameter], numel: int, hidden_numel: int = 0) -> Iterator[list[str]]:
    """Splits parameters into buckets of about `numel` elements.

    Buckets follow the order in which backward produces gradients, the last layer first. So the first bucket is full
    early in backward, and its reduction overlaps with the rest. A bucket is closed where the group changes.

    Args:
        parameters: by name, in the order of the model.
        numel: elements at which a bucket is closed.
        hidden_numel: the same for hidden matrices, if it is more.

    Yields:
        The names of each bucket.
    """
    for group, names in itertools.groupby(reversed(parameters), key=lambda name: group_of(name, parameters[name])):
        least = max(numel, hidden_numel) if group is BucketGroup.HIDDEN else numel
        units = [[name] for name in names]
        yield from join_units(units, {name: x.numel() for name, x in parameters.items()}, least)


def add_gradients(pairs: list[tuple[Tensor, Tensor]], accumulate: Accumulate | None) -> None:
    """Adds gradients to their float32 sums.

    Args:
        pairs: sums, each with a gradient of its shape.
        accumulate: the op for gradients in 16 bits; None: PyTorch.
    """
    if accumulate is not None:
        for total, gradient in pairs:
            if gradient.dtype != total.dtype:
                accumulate(total, gradient)
        pairs = [(total, gradient) for total, gradient in pairs if gradient.dtype == total.dtype]
    if pairs:
        torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])
