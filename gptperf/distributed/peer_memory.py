"""Memory of every process that the GPUs of all can read, and how their streams wait for each other.

Through `torch.distributed._symmetric_memory` and the driver. `gptperf.distributed.copy_engine` moves data with it.
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
"""Of barriers: those of one do not wait for those of another."""
_DEVICEMAP = 2  # of cuMemHostRegister


class PeerMemory(Protocol):
    """Memory that every process can read."""

    uncounted_bytes: int
    """Of GPU memory, that PyTorch's account of allocated memory does not have."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A region; every process asks for the same one."""

    def holds(self, flat: Tensor) -> bool:
        """Whether a buffer lies in a region."""

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        """What lies in the same place of another process's memory."""

    def barrier(self, channel: int) -> None:
        """Let the current stream wait for that of every process."""


class SymmetricMemory:
    """Of the GPUs of one host, through PyTorch (`torch.distributed._symmetric_memory`).

    Args:
        process: this one.

    Raises:
        RuntimeError: the driver cannot do what is needed.
    """

    def __init__(self, process: Process):
        # Not used here, and a mapping that some hosts do not survive.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.process = process
        self.uncounted_bytes = 0
        self._regions: list[tuple[Tensor, Any]] = []
        self._flags = _Flags(process)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of zeros that can become a region."""
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        torch.cuda.empty_cache()  # what PyTorch keeps for itself is not to be had here
        before = torch.cuda.memory_allocated(self.process.device)
        region = symmetric.empty(numel, dtype=dtype, device=self.process.device)
        counted = torch.cuda.memory_allocated(self.process.device) - before
        self.uncounted_bytes += max(0, region.nbytes - counted)
        return region.zero_()

    def share(self, region: Tensor) -> None:
        """Make it one; every process has to."""
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        torch.cuda.synchronize()
        self._regions.append((region, symmetric.rendezvous(region, dist.group.WORLD)))

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        region = self.allocate(numel, dtype)
        self.share(region)  # which is zero everywhere, before any process has mapped it
        return region

    def forget(self) -> None:
        """Give all regions back."""
        self._regions.clear()
        self.uncounted_bytes = 0

    def _find(self, flat: Tensor) -> tuple[int, Any] | None:
        for region, handle in self._regions:
            offset = flat.data_ptr() - region.data_ptr()
            if 0 <= offset < region.nbytes:
                return offset // flat.element_size(), handle
        return None

    def holds(self, flat: Tensor) -> bool:
        return self._find(flat) is not None

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        found = self._find(flat)
        assert found is not None, "not in memory that the others can read"
        offset, handle = found
        return handle.get_buffer(rank, flat.shape, flat.dtype, offset)

    def barrier(self, channel: int) -> None:
        self._flags.arrive(channel)


class _Flags:
    """Counters by which streams of several GPUs wait for each other, without a kernel.

    PyTorch's own barrier is a kernel that spins, on a multiprocessor, until the last process comes. The driver has the
    stream itself write to memory, and wait until memory has a value: of the host, since another GPU's it refuses.

    Args:
        process: this one.

    Raises:
        RuntimeError: the driver refuses.
        OSError: no memory that processes share.
    """

    _SPACING = 32  # int32 between two counters: a cache line each

    def __init__(self, process: Process):
        self.process, self._counts = process, [0] * CHANNELS
        nbytes = 4 * self._SPACING * CHANNELS * process.world_size
        file, path = -1, ""  # which nobody can map, if there is no memory
        with contextlib.suppress(OSError):
            if process.is_main:
                file = os.memfd_create("gptperf")
                os.truncate(file, nbytes)
                path = f"/proc/{os.getpid()}/fd/{file}"
        self._counters = torch.from_file(process.from_main(path), shared=True, size=nbytes, dtype=torch.uint8)
        self._at = self._counters.data_ptr()
        # Through the driver: the runtime would keep an error for the next launch to find.
        driver = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        register, unregister = driver.cuMemHostRegister_v2, driver.cuMemHostUnregister
        register.argtypes, unregister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint], [ctypes.c_void_p]
        _check_code("mapping of host memory", register(self._at, nbytes, _DEVICEMAP))
        weakref.finalize(self, _unmap, self._counters, unregister, file).atexit = False
        self._enqueue(self._write, 0, process.rank, 0)
        self._enqueue(self._wait, 0, process.rank, 0)
        torch.cuda.synchronize()

    def arrive(self, channel: int) -> None:
        """Tell the others, and let the current stream wait for all of them."""
        self._counts[channel] = count = (self._counts[channel] + 1) % (1 << 32)
        self._enqueue(self._write, channel, self.process.rank, count)  # after all that the stream has done before
        for rank in range(self.process.world_size):
            if rank != self.process.rank:
                self._enqueue(self._wait, channel, rank, count)  # for that or more, modulo 2^32

    def _enqueue(self, function: Any, channel: int, rank: int, count: int) -> None:
        at = self._at + 4 * self._SPACING * (channel * self.process.world_size + rank)
        code = function(torch.cuda.current_stream().cuda_stream, at, count, 0)
        _check_code("stream memory operations", code)


def _check_code(what: str, code: int) -> None:
    if code:
        raise RuntimeError(f"the driver's {what}: error {code}")


def _unmap(counters: Tensor, unregister: Callable[[int], int], file: int) -> None:
    torch.cuda.synchronize()  # no stream waits there any more
    unregister(counters.data_ptr())
    if file >= 0:
        os.close(file)
