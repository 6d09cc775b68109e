"""Records the memory that this process uses on its GPU or its CPU, and writes snapshots of the GPU's allocations."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gptperf.errors import DiskError
from gptperf.files import replacing

__all__ = ["MemorySnapshots", "memory_record"]

_STATUS = Path("/proc/self/status")


def memory_record(device: torch.device, uncounted_bytes: int = 0) -> dict[str, float]:
    """Returns the memory in use in GB (1e9 bytes), from counters on the host, without waiting for the device.

    Args:
        device: device of this process.
        uncounted_bytes: GPU memory that was allocated at the start and that PyTorch does not count.

    Returns:
        On a GPU allocated_gb, the peak of it (peak_gb) and reserved_gb; on a CPU rss_gb (on Linux) and peak_rss_gb.
    """
    if device.type == "cuda":
        return {
            "allocated_gb": (torch.cuda.memory_allocated(device) + uncounted_bytes) / 1e9,
            "peak_gb": (torch.cuda.max_memory_allocated(device) + uncounted_bytes) / 1e9,
            "reserved_gb": (torch.cuda.memory_reserved(device) + uncounted_bytes) / 1e9,
        }
    if not _STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_rss_gb": (peak if sys.platform == "darwin" else peak * 1024) / 1e9}  # bytes on macOS, else KiB
    # A child begins with the `ru_maxrss` of its parent, but with a VmHWM of its own.
    kib = dict(line.split()[:2] for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    peak_gb, rss_gb = (int(kib[name]) * 1024 / 1e9 for name in ("VmHWM:", "VmRSS:"))
    # The kernel updates the peak at intervals only, so the present value may be above it.
    return {"peak_rss_gb": max(peak_gb, rss_gb), "rss_gb": rss_gb}


class MemorySnapshots:
    """Writes `memory_<why>_rank<r>.pickle` on SIGUSR2 and when the GPU runs out of memory.

    The file is for pytorch.org/memory_viz, which reads no other format; gptperf itself reads no pickle.

    Args:
        folder: folder of the run.
        device: device whose memory is recorded.
        rank: rank of this process.
        history: whether to record where each allocation comes from, which costs a few per cent of the host's time.
    """

    _MOST_EVENTS = 200_000

    def __init__(self, folder: Path, device: torch.device, rank: int, history: bool):
        self.folder, self.device, self.rank, self.history = folder, device, rank, history
        self.asked = False
        """Whether SIGUSR2 has arrived since the flag was last cleared."""

    def _ask(self, *_: object) -> None:
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator["MemorySnapshots"]:
        """Handles SIGUSR2 as a request for a snapshot."""
        before = signal.signal(signal.SIGUSR2, self._ask)
        if self.history and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=self._MOST_EVENTS)
        try:
            yield self
        finally:
            signal.signal(signal.SIGUSR2, before)

    def write(self, why: str) -> str:
        """Writes a snapshot now. Returns its path, or the reason why there is none."""
        if self.device.type != "cuda":
            return "no snapshot: PyTorch does not track the memory of a CPU"
        path = self.folder / f"memory_{why}_rank{self.rank}.pickle"
        try:
            with replacing(path) as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
        except DiskError as error:
            return f"no snapshot: {error}"
        return str(path)
