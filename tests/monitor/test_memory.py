"""Snapshots of the GPU's memory."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from gptperf.monitor.memory import MemorySnapshots


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
