"""A request to stop that only one rank hears stops the whole job, which commits a checkpoint first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT, run_command, run_log

STOPPER = """
import os, signal
from gptperf.model import RMSNorm
from gptperf.registry import register
calls = 0
class Stopper(RMSNorm):
    def forward(self, x, residual=None):
        global calls
        calls += 1
        if calls == 67 and os.environ["RANK"] == os.environ["STOPPED_RANK"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x, residual)
register("normalization", "stopper", Stopper)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_that_one_rank_hears_stops_all(rank: int, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "stopper.py").write_text(STOPPER)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "STOPPED_RANK": str(rank)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    flags = ["--plugins=stopper", "--normalization=stopper", "--save_interval=1000", "--eval_interval=1000"]
    command = run_command(corpus, tmp_path / "out", *flags, "--max_iters=100000", launcher=launcher)
    assert command[0] == sys.executable
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0  # torchrun reports that its processes left with 75
    # Five norms in a forward pass, two micro-batches per rank and step: call 67 is in step 7.
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000007"]
    assert run_log(tmp_path / "out")["summary"]["stopped"] == "asked to"
