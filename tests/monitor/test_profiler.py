"""Profiles of some iterations of a run."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
from run_helpers import ROOT, losses, run, run_command, run_log

from gptperf.config import command_line
from gptperf.errors import ConfigError
from gptperf.monitor.blocks import profile_lines
from gptperf.monitor.events import Profile
from gptperf.monitor.profiler import _longest
from gptperf.monitor.trace import Kernel


def test_a_profile_of_some_iterations(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, tmp_path / "plain", "--max_iters=6") == 0
    assert run(corpus, tmp_path / "profiled", "--max_iters=6", "--profile=3:4") == 0
    path = tmp_path / "profiled" / "trace_3-4.json.gz"
    assert f"profile of 2 iterations: {path}" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names
    log = run_log(tmp_path / "profiled")
    (profile,) = log["profiles"]
    assert (profile["iter"], profile["steps"], profile["trace"]) == (4, 2, str(path))
    assert profile["waterfall"] is None  # no GPU, no MFU
    found = dict(losses(tmp_path / "profiled"))
    assert found.keys() == {1, 2, 5, 6}  # recorded iterations are not logged: their time is not comparable
    assert found.items() <= dict(losses(tmp_path / "plain")).items()
    assert list(path.parent.glob(".tmp*")) == []


def test_lines_of_a_profile() -> None:
    kernels = [{"name": "nvjet_x", "part": "gemm", "ms": 1.5, "calls": 3.0}]
    found: Profile = {
        "iter": 14,
        "trace": "t.json.gz",
        "steps": 5,
        "step_ms": 2.0,
        "parts_ms": {"gemm": 1.5, "attention": 0.0, "host_gaps": 0.5},
        "waterfall": {"gemm": 10.0, "host_gaps": 25.0},
        "mfu_percent": 65.0,
        "convention": "strict",
        "hardware_peak_tflops": 989.4,
        "peak_dtype": "bfloat16",
        "peak_basis": "dense",
        "kernels": kernels,
    }
    lines = profile_lines(found)
    assert lines[1] == "   2.00 ms per iteration: gemm 1.50 ms, host_gaps 0.50 ms"
    assert (
        lines[2]
        == "   100 points of MFU (strict, of 989.4 TFLOP/s bf16 dense): gemm 10.00, host_gaps 25.00, left 65.00"
    )
    assert "nvjet_x" in lines[3]


def test_times_and_calls_of_kernels_are_those_of_an_iteration() -> None:
    """Two iterations, each with three short kernels and a long one, the longest first."""
    short = [Kernel("_norm_kernel", 0.0, 100.0, 7) for _ in range(6)]
    found = _longest([*short, Kernel("nvjet_x", 0.0, 900.0, 7), Kernel("nvjet_x", 0.0, 700.0, 7)], 2)
    assert found == [
        {"name": "nvjet_x", "part": "gemm", "ms": pytest.approx(0.8), "calls": 1},
        {"name": "_norm_kernel", "part": "memory_bound", "ms": pytest.approx(0.3), "calls": 3},
    ]


@pytest.mark.parametrize("value", ["5", "4:3", "0:3", "1:7", "1:5000", "a:b", "-1:2"])
def test_a_profile_that_cannot_be(value: str) -> None:
    with pytest.raises(ConfigError, match="wanted START:STOP with 1 <= START <= STOP <= max_iters = 6"):
        command_line.resolve(["--max_iters=6", f"--profile={value}"])


@pytest.mark.slow
def test_every_process_knows_what_is_recorded(corpus: Path, tmp_path: Path) -> None:
    """Otherwise one rank would wait in the collectives of a log line that the other one skips."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    flags = ["--max_iters=5", "--profile=3:4", "--collective_timeout_s=20"]
    command = run_command(corpus, tmp_path, *flags, launcher=launcher)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(run_log(tmp_path)["profiles"]) == 1


def test_a_profile_that_is_over_is_said(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, tmp_path, "--max_iters=2", "--profile=1:1") == 0
    assert "profile = 1:1: nothing left to record" in capsys.readouterr().out
