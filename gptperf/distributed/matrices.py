"""Whole matrices in the buckets of hidden matrices, for an optimizer that updates whole matrices.

A parameter is a matrix, or packs several below one another, such as queries, keys and values. Every rank owns an equal
share of a bucket, and no matrix lies in two shares (`gptperf.distributed.bucket_sizes.cut_between`).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gptperf.distributed.buckets import Piece, Place
from gptperf.errors import ConfigError

__all__ = ["Matrix", "elements_of", "matrices_in", "row_pieces", "rows_of"]


class Matrix(NamedTuple):
    """A whole matrix of a bucket that this rank holds: a parameter, or one of those that are packed in it."""

    start: int
    """Index of its first element in `Bucket.master`."""
    rows: int
    columns: int
    first_row: int
    """Index of its first row among the rows of all matrices that this rank holds of the bucket."""


def rows_of(name: str, shape: torch.Size, packed: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the rows of each matrix of a parameter.

    Args:
        name, shape: name and shape of the parameter.
        packed: name of each parameter that packs several matrices -> the rows of each.

    Raises:
        ConfigError: the parameter is no matrix.
    """
    if len(shape) != 2:
        raise ConfigError(
            f"optimizer = 'muon' updates the matrices of the blocks: found {name} {tuple(shape)}, wanted 2 dimensions; "
            "nearest: optimizer = 'adamw'"
        )
    return packed.get(name, (shape[0],))


def elements_of(name: str, shape: torch.Size, packed: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Returns the elements of each matrix of a parameter; see `rows_of`."""
    return [rows * shape[1] for rows in rows_of(name, shape, packed)]


def matrices_in(
    places: Mapping[str, Place], packed: Mapping[str, tuple[int, ...]], held: tuple[int, int], wanted: tuple[int, int]
) -> Iterator[Matrix]:
    """Yields the matrices of a bucket that lie in a range of its elements.

    Args:
        places: place of each parameter of the bucket, in the order in which they lie there.
        packed: see `rows_of`.
        held: range of the elements that this rank holds.
        wanted: the range, within `held`.
    """
    first_row = 0
    for name, place in places.items():
        start = place.offset
        for rows in rows_of(name, place.shape, packed):
            end = start + rows * place.shape[1]
            if wanted[0] <= start and end <= wanted[1]:
                yield Matrix(start - held[0], rows, place.shape[1], first_row)
            first_row += rows if held[0] <= start and end <= held[1] else 0
            start = end


def row_pieces(
    places: Mapping[str, Place],
    packed: Mapping[str, tuple[int, ...]],
    held: tuple[int, int],
    wanted: tuple[int, int],
    values: Tensor,
) -> Iterator[Piece]:
    """Yields a piece for each parameter with matrices in a range; the arguments are those of `matrices_in`.

    Args:
        values: `(rows,)`, a number for each row of the matrices that this rank holds of the bucket.
    """
    found = list(matrices_in(places, packed, held, wanted))
    for name, place in places.items():
        offset, shape = place.offset, place.shape
        here = [matrix for matrix in found if 0 <= matrix.start + held[0] - offset < shape.numel()]
        if here:  # consecutive matrices, because the range is one
            first, rows = here[0].first_row, sum(matrix.rows for matrix in here)
            start = (here[0].start + held[0] - offset) // shape[1]
            yield Piece(name, shape[:1], start, values[first : first + rows])
