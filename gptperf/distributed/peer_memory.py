"""GPU memory that every rank of a host can read, and barriers between the streams of its GPUs.

The memory is PyTorch's symmetric memory, and the barriers are stream memory operations of the CUDA driver.
`gptperf.distributed.copy_engine` moves data with both.
"""

import contextlib
import ctypes
import importlib
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gptperf.distributed.process import Process

__all__ = ["CHANNELS", "PeerMemory", "SymmetricMemory"]

CHANNELS = 2
"""Number of independent sequences of barriers: a stream that waits in one channel does not wait for other channels."""
_DEVICEMAP = 2  # flag of cuMemHostRegister: the GPU can write and read the memory


class PeerMemory(Protocol):
    """Memory that every rank can read. A region is allocated by all ranks at the same time, with the same size."""

    uncounted_bytes: int
    """Bytes of GPU memory that PyTorch does not count as allocated."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns a new region of zeros. Collective: every rank must call it with the same arguments."""

    def holds(self, flat: Tensor) -> bool:
        """Returns whether a buffer lies in a region of this rank."""

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        """Returns the buffer at the same place in the memory of another rank."""

    def barrier(self, channel: int) -> None:
        """Makes the current stream wait until every rank has reached the same barrier of the channel."""


class SymmetricMemory:
    """`PeerMemory` of the GPUs of one host, through `torch.distributed._symmetric_memory`.

    Args:
        process: this rank.

    Raises:
        RuntimeError: the driver does not support the barriers.
    """

    def __init__(self, process: Process):
        # Multicast mappings are not used here, and some hosts do not survive them.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.process = process
        self.uncounted_bytes = 0
        self._regions: list[tuple[Tensor, Any]] = []
        self._flags = _Flags(process)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns memory of zeros, which `share` turns into a region. Not a collective."""
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        torch.cuda.empty_cache()  # the memory comes from the driver, which cannot use what PyTorch has cached
        before = torch.cuda.memory_allocated(self.process.device)
        region = symmetric.empty(numel, dtype=dtype, device=self.process.device)
        counted = torch.cuda.memory_allocated(self.process.device) - before
        self.uncounted_bytes += max(0, region.nbytes - counted)
        return region.zero_()

    def share(self, region: Tensor) -> None:
        """Turns allocated memory into a region that all ranks map. Collective: every rank must call it."""
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        torch.cuda.synchronize()  # the zeros are written before another rank can read the memory
        self._regions.append((region, symmetric.rendezvous(region, dist.group.WORLD)))

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        region = self.allocate(numel, dtype)
        self.share(region)
        return region

    def forget(self) -> None:
        """Frees all regions."""
        self._regions.clear()
        self.uncounted_bytes = 0

    def _find(self, flat: Tensor) -> tuple[int, Any] | None:
        """Returns where a buffer lies: the index of its first element in a region, and the region's handle."""
        for region, handle in self._regions:
            offset = flat.data_ptr() - region.data_ptr()
            if 0 <= offset < region.nbytes:
                return offset // flat.element_size(), handle
        return None

    def holds(self, flat: Tensor) -> bool:
        return self._find(flat) is not None

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        found = self._find(flat)
        assert found is not None, "the buffer is not in memory that other ranks can read"
        offset, handle = found
        return handle.get_buffer(rank, flat.shape, flat.dtype, offset)

    def barrier(self, channel: int) -> None:
        self._flags.arrive(channel)


class _Flags:
    """Barriers between streams of several GPUs, by counters in host memory and without a kernel.

    PyTorch's own barrier is a kernel that spins on a multiprocessor until the last rank arrives. Here the stream itself
    writes the rank's counter, then waits until the counters of the other ranks have reached the same value
    (cuStreamWriteValue32, cuStreamWaitValue32). The counters are in host memory, because the driver refuses these
    operations on the memory of another GPU.

    Args:
        process: this rank.

    Raises:
        RuntimeError: the driver does not support the operations.
        OSError: processes cannot share host memory here.
    """

    _SPACING = 32  # distance of two counters in int32, so that each has a cache line of its own

    def __init__(self, process: Process):
        self.process, self._counts = process, [0] * CHANNELS
        nbytes = 4 * self._SPACING * CHANNELS * process.world_size
        # If the main process gets no memory, the path stays empty and the mapping fails on every rank.
        file, path = -1, ""
        with contextlib.suppress(OSError):
            if process.is_main:
                file = os.memfd_create("gptperf")
                os.truncate(file, nbytes)
                path = f"/proc/{os.getpid()}/fd/{file}"
        self._counters = torch.from_file(process.from_main(path), shared=True, size=nbytes, dtype=torch.uint8)
        self._at = self._counters.data_ptr()
        # Functions of the driver, not of the runtime: the next kernel launch would raise an error of the runtime again.
        driver = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        register, unregister = driver.cuMemHostRegister_v2, driver.cuMemHostUnregister
        register.argtypes, unregister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint], [ctypes.c_void_p]
        _check_code("mapping of host memory", register(self._at, nbytes, _DEVICEMAP))
        weakref.finalize(self, _unmap, self._counters, unregister, file).atexit = False
        # One write, and one wait that is fulfilled already, so that a driver without them fails here.
        self._enqueue(self._write, 0, process.rank, 0)
        self._enqueue(self._wait, 0, process.rank, 0)
        torch.cuda.synchronize()

    def arrive(self, channel: int) -> None:
        """Enqueues a barrier on the current stream. Every rank counts its barriers, so all write the same value."""
        self._counts[channel] = count = (self._counts[channel] + 1) % (1 << 32)
        # The stream writes the counter when everything enqueued before it is done.
        self._enqueue(self._write, channel, self.process.rank, count)
        for rank in range(self.process.world_size):
            if rank != self.process.rank:
                # Waits for this count or a later one, modulo 2^32: the other rank may be at its next barrier already.
                self._enqueue(self._wait, channel, rank, count)

    def _enqueue(self, function: Any, channel: int, rank: int, count: int) -> None:
        """Enqueues a write of a count to the counter of a rank, or a wait for it.

        Flags of 0 mean a memory fence before a write, and "greater or equal, cyclically" for a wait.
        """
        at = self._at + 4 * self._SPACING * (channel * self.process.world_size + rank)
        code = function(torch.cuda.current_stream().cuda_stream, at, count, 0)
        _check_code("stream memory operations", code)


def _check_code(what: str, code: int) -> None:
    """Raises a RuntimeError if a function of the driver has failed."""
    if code:
        raise RuntimeError(f"the driver's {what}: error {code}")


def _unmap(counters: Tensor, unregister: Callable[[int], int], file: int) -> None:
    """Frees the counters. Takes the tensor itself, which keeps its memory mapped until this call."""
    torch.cuda.synchronize()  # no stream waits for a counter any more
    unregister(counters.data_ptr())
    if file >= 0:
        os.close(file)
