"""Memory records, and snapshots of the GPU's memory."""

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptperf.monitor import memory
from gptperf.monitor.memory import MemorySnapshots, memory_record


def test_the_peak_is_never_below_the_present_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel updates the peak late."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  1000 kB\nVmRSS:\t  2000 kB\n")
    assert memory_record(torch.device("cpu")) == {"peak_rss_gb": 2048e3 / 1e9, "rss_gb": 2048e3 / 1e9}
    (tmp_path / "status").unlink()
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1))
    assert list(memory_record(torch.device("cpu"))) == ["peak_rss_gb"]


def test_the_record_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field is its own counter, in 1e9 bytes, with the bytes that PyTorch does not count."""
    for name, gb in (("memory_allocated", 1), ("max_memory_allocated", 3), ("memory_reserved", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gb=gb: gb * 10**9)
    record = memory_record(torch.device("cuda"), uncounted_bytes=500_000_000)
    assert record == {"allocated_gb": 1.5, "peak_gb": 3.5, "reserved_gb": 4.5}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_record_of_a_cpu_is_the_kernels() -> None:
    held = torch.ones(1 << 26)  # 268 MB, which the peak has and the current figure loses
    del held
    record = memory_record(torch.device("cpu"))
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    told_gb = {line[0]: int(line[1]) * 1024 / 1e9 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}
    assert record["rss_gb"] == pytest.approx(told_gb["VmRSS:"], rel=0.01)
    assert record["peak_rss_gb"] == pytest.approx(told_gb["VmHWM:"], rel=0.01)
    assert record["peak_rss_gb"] > record["rss_gb"] + 0.1


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
