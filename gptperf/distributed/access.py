"""Access to the parameters in the buckets of a rank, by name."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from gptperf.distributed.buckets import Bucket, Piece, Place
from gptperf.distributed.matrices import Matrix, matrices_in, row_pieces

__all__ = ["Access"]


class Access:
    """The buckets of a rank, and what it holds and saves of each parameter.

    Args:
        world_size: number of ranks.
        rank: this rank.
        packed: rows of the matrices that are packed in parameters, if the buckets of hidden matrices are cut between
            matrices; else None.
    """

    def __init__(self, world_size: int, rank: int, packed: Mapping[str, tuple[int, ...]] | None):
        self.world_size, self.rank, self.packed = world_size, rank, packed
        self.places: dict[str, Place] = {}
        self.buckets: list[Bucket] = []

    @property
    def numel(self) -> int:
        """Number of parameters of the model; a tied parameter counts once."""
        return sum(place.shape.numel() for place in self.places.values())

    def gradients(self) -> Iterator[Tensor]:
        """Yields the flat gradients that the optimizer reads, with zeros in the gaps."""
        return (bucket.grad if bucket.master.grad is None else bucket.master.grad for bucket in self.buckets)

    def gradient(self, name: str) -> Tensor:
        """Returns the gradient of a parameter before it is reduced, in the parameter's shape."""
        place = self.places[name]
        return place.view(place.bucket.grad)

    def _held(self, bucket: Bucket) -> tuple[int, int]:
        """Returns the range of a bucket's elements that `master` has."""
        return 0, bucket.compute.numel()

    def _share_of(self, bucket: Bucket) -> tuple[int, int]:
        """Returns the range of a bucket's elements that this rank saves: replicas too save one part each."""
        numel = bucket.compute.numel() // self.world_size
        return self.rank * numel, (self.rank + 1) * numel

    def matrices(self, bucket: Bucket, *, own: bool = False) -> Iterator[Matrix]:
        """Returns the whole matrices of a bucket of hidden matrices, if the buckets are cut between them.

        Args:
            bucket: the bucket.
            own: only those in this rank's share, of which replicas too have one each.
        """
        assert self.packed is not None
        held = self._held(bucket)
        return matrices_in(self._places_of(bucket), self.packed, held, self._share_of(bucket) if own else held)

    def pieces(self, values: Callable[[Bucket], Tensor], *, to_save: bool) -> Iterator[Piece]:
        """Yields the elements of all parameters that this rank has.

        Args:
            values: returns a bucket's master weights, or a buffer of that size such as an optimizer state.
            to_save: yield only the elements that this rank saves; the pieces of all ranks then cover each element once.
        """
        for bucket in self.buckets:
            yield from self.pieces_of(bucket, values(bucket), to_save=to_save)

    def pieces_of(self, bucket: Bucket, flat: Tensor, *, to_save: bool = False) -> Iterator[Piece]:
        """Yields the elements of one bucket's parameters that this rank has; see `pieces`.

        `flat` may also be `(rows, 1)`, a number for each row of the matrices that this rank holds of the bucket. The
        pieces are then vectors with a number for each row of a parameter.
        """
        begin, end = self._held(bucket)
        low, high = self._share_of(bucket) if to_save else (begin, end)
        if flat.dim() == 2:
            assert self.packed is not None
            yield from row_pieces(self._places_of(bucket), self.packed, (begin, end), (low, high), flat[:, 0])
            return
        for name in bucket.names:
            place = self.places[name]
            first = max(place.offset, low, begin)
            last = min(place.offset + place.shape.numel(), high, end)
            if first < last:
                yield Piece(name, place.shape, first - place.offset, flat[first - begin : last - begin])

    def _places_of(self, bucket: Bucket) -> dict[str, Place]:
        return {name: self.places[name] for name in bucket.names}
