"""Collectives on flat buffers: all-reduce, reduce-scatter and all-gather.

`Collectives` uses PyTorch's process group: NCCL or gloo. `gptperf.distributed.copy_engine` has the same interface.

A shard of a buffer is one of `world_size` equal parts: rank r of n has the elements [r, r + 1) * numel / n.

A call only starts a collective and returns a `Pending`. The collective runs on a stream of its own, after everything
that the current stream has enqueued so far. No kernel may touch its buffers until the current stream has waited for
the `Pending`. Every rank must make the same calls in the same order.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Collectives", "Pending"]

# The first name is that of PyTorch 2.13 and later, the second one that of earlier versions.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending(Protocol):
    """A collective in progress."""

    def wait(self) -> object:
        """Makes the current stream wait for the result. On a GPU the host does not wait."""


class _Sum(NamedTuple):
    """A reduction in progress, which keeps its buffers alive until `wait`."""

    work: dist.Work
    source: Tensor
    received: Tensor
    target: Tensor
    add: bool

    def wait(self) -> None:
        self.work.wait()
        # These run on the current stream, which now waits for the reduction: they come after it, and before any later
        # kernel that reads the target.
        if self.add:
            self.target.add_(self.received)
        elif self.target is not self.received:
            self.target.copy_(self.received)


class Collectives:
    """Collectives of the default process group.

    Args:
        world_size: number of ranks.
        rank: this rank.
        device: device of the buffers.
        reduce_dtype: dtype in which gradients travel and are added up.
        reason: why copy engines do not move the data; empty if the configuration chose the process group.
    """

    name = "process_group"
    in_flight = 1
    """Number of reductions of borrowed buffers that may be in progress while the next buffer is filled."""
    widens = False
    """Whether reductions add up 16-bit gradients in float32. Then gradients can travel in 16 bits."""
    buffer_bytes = 0
    """Bytes of the buffers that only communication uses."""
    uncounted_bytes = 0
    """Bytes of GPU memory that PyTorch does not count as allocated."""

    def __init__(
        self,
        world_size: int,
        rank: int,
        device: torch.device,
        reduce_dtype: torch.dtype = torch.float32,
        *,
        reason: str = "",
    ) -> None:
        self.world_size, self.rank, self.device, self.reduce_dtype = world_size, rank, device, reduce_dtype
        self.reason = reason

    def reserve(self, numel: dict[torch.dtype, int], borrowed: int, borrowed_dtype: torch.dtype) -> None:
        """Registers the buffers that later collectives use. Collective: every rank must call it, once.

        Args:
            numel: total elements of all buffers that `zeros` will return, by dtype.
            borrowed: elements of the largest buffer that `borrow` will return; 0 if it will not be called.
            borrowed_dtype: dtype of the buffers of `borrow`.
        """

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns a flat buffer of zeros for the collectives below, which lasts for the whole run."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns a flat buffer with arbitrary contents, which the caller fills and passes to its next reduction."""
        return torch.empty(numel, dtype=dtype, device=self.device)

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which to fill a borrowed buffer with gradients of `dtype`."""
        return self.reduce_dtype

    def own(self, flat: Tensor, rank: int | None = None) -> Tensor:
        """Returns the shard of a buffer that belongs to `rank` (default: this rank), as a view."""
        numel = flat.numel() // self.world_size
        rank = self.rank if rank is None else rank
        return flat[rank * numel : (rank + 1) * numel]

    def all_reduce(self, flat: Tensor, source: Tensor | None = None) -> Pending:
        """Starts to sum a buffer over the ranks.

        Args:
            flat: buffer of `zeros` into which the sum is written.
            source: buffer of `borrow` that is summed instead of `flat`; `flat` is then float32. Allowed only if
                `widens` is set.
        """
        assert source is None
        if flat.dtype == self.reduce_dtype:
            return _Sum(dist.all_reduce(flat, async_op=True), flat, flat, flat, add=False)
        wire = flat.to(self.reduce_dtype)
        return _Sum(dist.all_reduce(wire, async_op=True), wire, wire, flat, add=False)

    def reduce_scatter(self, own: Tensor, whole: Tensor, *, add: bool = False) -> Pending:
        """Starts to sum a buffer over the ranks; each rank gets its shard of the sum.

        Args:
            own: `(numel / n,)` float32, into which the sum is written. It may be the shard of this rank in `whole`.
            whole: `(numel,)`, buffer of `zeros` or `borrow` that is summed.
            add: add the sum to `own` instead of overwriting it.
        """
        source = whole.to(self.reduce_dtype)
        straight = not add and source.dtype == own.dtype
        received = own if straight else source.new_empty(own.numel())
        return _Sum(_reduce_scatter(received, source, async_op=True), source, received, own, add)

    def all_gather(self, whole: Tensor, own: Tensor) -> Pending:
        """Starts to gather the shards of all ranks.

        Args:
            whole: `(numel,)`, into which all shards are written.
            own: `(numel / n,)`, the shard of this rank: a buffer of `zeros` or a part of one. It may be the shard of
                this rank in `whole`. Between the write to `own` and this call, every rank must call `written`.
        """
        return _all_gather(whole, own, async_op=True)

    def written(self) -> None:
        """Makes later gathers wait until every rank has written its shards. Collective: every rank must call it.

        What counts as written is everything that the current stream of a rank has enqueued before this call.
        """

    def finish(self) -> None:
        """Makes the current stream wait until no other rank reads the buffers of this rank.

        After it, the current stream may overwrite them. Collective: every rank must call it.
        """
