"""The sizes of buckets: where one is closed, and where each of its parameters lies. Loads no torch.

The plan of a run counts the memory of the buckets with the same functions that lay them out.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["ALIGN", "cut_between", "join_units", "least_numel"]

ALIGN = 64
"""A parameter starts at a multiple of this many elements: 128 bytes of bfloat16, for vector loads."""


def least_numel(block: int, shares: int) -> int:
    """Returns the least elements of a bucket of hidden matrices that is cut between matrices.

    A block of a LLaMA has 7 matrices of different sizes. With half as many blocks as ranks, about a tenth of a bucket
    is padding; with one block for 4 ranks it is 18%, and 44% for 8.

    Args:
        block: elements of the matrices of the largest block.
        shares: number of equal parts into which a bucket is cut.
    """
    return block * -(-shares // 2)


def join_units(units: Sequence[list[str]], sizes: Mapping[str, int], numel: int) -> Iterator[list[str]]:
    """Joins consecutive units into buckets of at least `numel` elements; the last bucket may have fewer.

    A unit that has `numel` elements by itself is not joined with others. So the embedding, whose gradient comes last,
    does not delay the reduction of other parameters until the end of backward.

    Args:
        units: names of parameters that stay together.
        sizes: elements of each parameter, by name.
        numel: elements at which a bucket is closed.

    Yields:
        The names of each bucket.
    """
    names: list[str] = []
    size = 0
    for unit in units:
        unit_numel = sum(sizes[name] for name in unit)
        if names and unit_numel >= numel:
            yield names
            names, size = [], 0
        names, size = names + unit, size + unit_numel
        if size >= numel:
            yield names
            names, size = [], 0
    if names:
        yield names


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
