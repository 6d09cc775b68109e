"""Ranks that reach their parameters in different orders reduce the same buckets in the same order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, "tests/helpers")
from peer_files import collectives_of
from gptperf.distributed.buckets import gradient_of
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.process import start_process
from gptperf.distributed.replicated import Replicated
from gptperf.distributed.zero1 import Sharded
process = start_process("cpu")
where = torch.float32, collectives_of(process, sys.argv[2])
torch.manual_seed(process.rank)
model = nn.ModuleDict({str(i): nn.Linear(8, 16, bias=False) for i in range(6)})
weights = {
    "ddp": lambda: Replicated(model, *where, bucket_numel=200),
    "zero1": lambda: Sharded(model, *where, bucket_numel=200),
    "fsdp": lambda: FullySharded(model, *where),
    "fsdp_once": lambda: FullySharded(model, *where, reduce_once=True),
}[sys.argv[1]]()
assert len(weights.buckets) == (6 if "fsdp" in sys.argv[1] else 3)
weights.share()
with weights.gathered():
    first = torch.cat([p.detach().flatten() for p in model.parameters()])
everyone = [torch.empty_like(first) for _ in range(2)]
dist.all_gather(everyone, first)
assert torch.equal(*everyone)
# Each rank uses its layers in another order, and one only in its first micro-batch: the reductions still pair up.
for step in range(20):
    weights.start_step()
    for micro in range(3):
        weights.start_micro_batch(last=micro == 2)
        order = list("012345")[:: 1 if process.rank else -1]
        if micro > 0:
            order.remove("3" if process.rank else "2")
        x = torch.ones(1, 8) * (process.rank + 1)
        if weights.is_sharded:
            weights.enter(0)
        sum(model[name](x).sum() for name in order).backward()
    weights.finish_gradients()
    pieces = list(weights.pieces(gradient_of, to_save=False))
    held = torch.tensor(sum(piece.values.numel() for piece in pieces))
    dist.all_reduce(held)
    assert held == 6 * 128 * (1 if weights.is_sharded else 2)
    for name, _, _, got in pieces:
        i = int(name[0])
        wanted = 3 * (1 + 2) - (2 * 1 if i == 2 else 2 * 2 if i == 3 else 0)
        assert (got == wanted).all(), (process.rank, step, i, got[0].item(), wanted)
    weights.finish_step()
process.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["by the process group", "by copies"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp", "fsdp_once"])
def test_two_processes_reduce_the_same_buckets(strategy: str, moved: str, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, tmp_path / "two.py", strategy, tmp_path if moved == "by copies" else ""]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
