"""Memory records, and snapshots of the GPU's memory."""

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptperf.monitor.memory import MemorySnapshots, memory_record


def test_the_peak_is_never_below_the_present_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel updates the peak late."""
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1))
    record = memory_record(torch.device("cpu"))
    assert record["peak_rss_gb"] >= record.get("rss_gb", 0.0)


def test_a_snapshot_is_asked_for_by_a_signal(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with MemorySnapshots(tmp_path, torch.device("cpu"), 0, history=False).listening() as snapshots:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.01)
        assert snapshots.asked
        assert "does not track the memory of a CPU" in snapshots.write("iter3")
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu(tmp_path: Path) -> None:
    snapshots = MemorySnapshots(tmp_path, torch.device("cuda"), 0, history=False)
    path = Path(snapshots.write("iter3"))
    assert path == tmp_path / "memory_iter3_rank0.pickle"
    assert path.stat().st_size > 0
