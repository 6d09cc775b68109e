"""Memory of this process: of its GPU, or on a CPU its resident set."""

import resource
import sys
from pathlib import Path

import torch

__all__ = ["memory_record"]

_STATM = Path("/proc/self/statm")


def memory_record(device: torch.device) -> dict[str, float]:
    """Memory in GB (1e9 bytes), read from host-side counters without waiting for the device.

    Returns:
        On a GPU allocated_gb, its peak_gb, and reserved_gb; on a CPU rss_gb (on Linux) and peak_rss_gb.
    """
    if device.type == "cuda":
        return {
            "allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {"peak_rss_gb": (peak if sys.platform == "darwin" else peak * 1024) / 1e9}  # bytes on macOS, KiB elsewhere
    if _STATM.exists():
        resident_pages = int(_STATM.read_text().split()[1])
        record["rss_gb"] = resident_pages * resource.getpagesize() / 1e9
    return record
