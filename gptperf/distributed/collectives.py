"""What a strategy asks the processes for: sums, shares of sums, and gathered shares of flat buffers.

`Collectives` has PyTorch's process group do it: NCCL or gloo. `gptperf.distributed.copy_engine` has the same interface.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Collectives", "Pending"]

# The names of PyTorch 2.13; before, the others.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending(Protocol):
    """What has begun and may not have ended."""

    def wait(self) -> object:
        """Let the current stream wait until the results are there."""


class _Sum(NamedTuple):
    """A sum that is on its way in buffers of its own."""

    work: dist.Work
    source: Tensor
    received: Tensor
    target: Tensor
    add: bool

    def wait(self) -> None:
        self.work.wait()
        if self.add:
            self.target.add_(self.received)
        elif self.target is not self.received:
            self.target.copy_(self.received)


class Collectives:
    """Over the default process group.

    Every process makes the same calls in the same order. A call begins; until the stream has waited for what it
    returns, its buffers are not to be touched. Process r of n has the elements [r, r + 1) * numel / n of a buffer.

    Args:
        world_size: processes.
        rank: of this one.
        device: of the buffers.
        reduce_dtype: in which gradients travel and are added up.
        reason: why it is not copy engines that move them, where that was not asked for.
    """

    name = "process_group"
    in_flight = 1
    """Sums of borrowed buffers that may be on their way while the next one is prepared."""
    widens = False
    """Whether gradients of 16 bits are added up in float32 as they are, so that they need not be widened before."""
    buffer_bytes = 0
    """Held for communication alone."""
    uncounted_bytes = 0
    """Of GPU memory in its buffers, that PyTorch's account of allocated memory does not have."""

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
        """Say what will be asked of `zeros`, by dtype, and what of `borrow` at most."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for the calls below, for good."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for the one sum that comes next."""
        return torch.empty(numel, dtype=dtype, device=self.device)

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients of a dtype are to be borrowed for."""
        return self.reduce_dtype

    def own(self, flat: Tensor, rank: int | None = None) -> Tensor:
        """A process's share of a buffer; default: of this one."""
        numel = flat.numel() // self.world_size
        rank = self.rank if rank is None else rank
        return flat[rank * numel : (rank + 1) * numel]

    def all_reduce(self, flat: Tensor, source: Tensor | None = None) -> Pending:
        """Sum a buffer over the processes, in place.

        Args:
            flat: of `zeros`.
            source: of `borrow`, to be summed instead into `flat`, which is float32; only where `widens`.
        """
        assert source is None
        if flat.dtype == self.reduce_dtype:
            return _Sum(dist.all_reduce(flat, async_op=True), flat, flat, flat, add=False)
        wire = flat.to(self.reduce_dtype)
        return _Sum(dist.all_reduce(wire, async_op=True), wire, wire, flat, add=False)

    def reduce_scatter(self, own: Tensor, whole: Tensor, *, add: bool = False) -> Pending:
        """Sum a buffer over the processes, each its share.

        Args:
            own: float32, for the sum of this process's share; it may be that share.
            whole: of `zeros` or `borrow`.
            add: to what is there, instead of writing over it.
        """
        source = whole.to(self.reduce_dtype)
        straight = not add and source.dtype == own.dtype
        received = own if straight else source.new_empty(own.numel())
        return _Sum(_reduce_scatter(received, source, async_op=True), source, received, own, add)

    def all_gather(self, whole: Tensor, own: Tensor) -> Pending:
        """Gather the shares of all processes.

        Args:
            whole: for all of them.
            own: this process's, of `zeros` or part of what `zeros` gave; it may be the share in `whole`. `written` is
                called between a change of it and this.
        """
        return _all_gather(whole, own, async_op=True)

    def written(self) -> None:
        """Let the gathers that follow read what every process has written to its shares."""

    def finish(self) -> None:
        """Let the current stream wait until no process reads a buffer of this one any more."""
