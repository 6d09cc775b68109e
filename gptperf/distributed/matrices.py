"""Whole matrices in the buckets of hidden matrices, for an optimizer that updates whole matrices.

A parameter is a matrix, or packs several below one another, such as queries, keys and values. Every rank owns an equal
share of a bucket. `cut_between` lays the parameters out so that no matrix lies in two shares; the rest of a share is
padding.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptperf.distributed.buckets import ALIGN, Piece, Place
from gptperf.errors import ConfigError

__all__ = ["Matrix", "cut_between", "elements_of", "matrices_in", "row_pieces", "rows_of"]


class Matrix(NamedTuple):
    """A whole matrix of a bucket that this rank holds: a parameter, or one of those that are packed in it."""

    start: int
    """Index of its first element in `Bucket.master`."""
    rows: int
    columns: int
    first_row: int
    """Index of its first row among the rows of all matrices that this rank holds of the bucket."""


def cut_between(parameters: Sequence[Sequence[int]], shares: int) -> tuple[list[int], int]:
    """Lays parameters out so that none of their matrices lies in two of the equal shares of a bucket.

    Args:
        parameters: elements of each matrix of each parameter.
        shares: number of equal parts into which the bucket is cut.

    Returns:
        The first element of each parameter, a multiple of `ALIGN`, and the elements of a share, as few as a bisection
        finds.
    """
    total = sum(map(sum, parameters))
    # The offsets for a share of `high` units exist: the first share takes all parameters.
    low = -(-max(max(map(max, parameters)), -(-total // shares)) // ALIGN)
    high = sum(-(-sum(matrices) // ALIGN) for matrices in parameters)
    found = _offsets(parameters, low * ALIGN, shares)
    if found is not None:
        return found, low * ALIGN
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _offsets(parameters, middle * ALIGN, shares) else (middle, high)
    found = _offsets(parameters, high * ALIGN, shares)
    assert found is not None
    return found, high * ALIGN


def _offsets(parameters: Sequence[Sequence[int]], share: int, shares: int) -> list[int] | None:
    """Returns the first element of each parameter if each share has `share` elements, or None if they are too few."""
    offsets, at = [], 0
    for matrices in parameters:
        begins = list(itertools.accumulate(matrices, initial=0))
        # The parameter begins at the next multiple of ALIGN or, if a cut would fall into one of its matrices there, at
        # the next place where a cut falls between two of them; at the latest at a cut.
        places = sorted({at, *(-(-(at + begin) // share) * share - begin for begin in begins[:-1])})
        for place in places:
            if place % ALIGN == 0 and not any(
                (place + a) // share < (place + b - 1) // share for a, b in itertools.pairwise(begins)
            ):
                break
        else:
            return None
        offsets.append(place)
        at = place + -(-begins[-1] // ALIGN) * ALIGN
    return offsets if at <= share * shares else None


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
