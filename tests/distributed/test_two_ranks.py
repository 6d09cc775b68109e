"""What two ranks exchange, each with values of its own: sums, shards, agreements and first weights."""

import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gptperf.distributed.buckets import gradient_of
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.process import Process
from gptperf.distributed.replicated import Replicated
from gptperf.distributed.zero1 import Sharded
from gptperf.monitor.gradients import GradientMonitor

CPU = torch.device("cpu")


def _of(rank: int, numel: int = 256) -> torch.Tensor:
    """Returns the values of a rank, which every rank can compute."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def _collectives(process: Process) -> None:
    """Gradients are summed in either dtype, and added only where that is asked for."""
    rank, total = process.rank, _of(0) + _of(1)
    half = slice(rank * 128, (rank + 1) * 128)
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        moved = Collectives(2, rank, CPU, dtype)
        flat = _of(rank)
        moved.all_reduce(flat).wait()
        torch.testing.assert_close(flat, total, rtol=rtol, atol=rtol)
        for add, before in ((False, 0.0), (True, 5.0)):
            own = torch.full((128,), 5.0)
            moved.reduce_scatter(own, _of(rank), add=add).wait()
            torch.testing.assert_close(own, total[half] + before, rtol=rtol, atol=rtol)
        whole = _of(rank)
        moved.reduce_scatter(moved.own(whole), whole).wait()  # into the shard itself
        torch.testing.assert_close(whole[half], total[half], rtol=rtol, atol=rtol)
        whole = torch.zeros(256)
        moved.all_gather(whole, _of(rank, 128)).wait()
        assert torch.equal(whole, torch.cat([_of(0, 128), _of(1, 128)]))


def _agreements(process: Process) -> None:
    """Every rank gets the same answer, whichever rank knows it."""
    rank = process.rank
    torch.testing.assert_close(process.mean(_of(rank)), (_of(0) + _of(1)) / 2)
    for who in (0, 1):
        assert process.any(rank == who)
        assert process.highest(2 if rank == who else 1) == 2
    assert not process.any(False)
    found = {"both": f"rank {rank}", f"only {rank}": ""}
    assert process.merged(found) == {"both": "rank 0", "only 0": "", "only 1": ""}
    assert process.gather(rank) == process.exchange(rank) == [0, 1]
    assert process.from_main(f"rank {rank}") == "rank 0"


def _first_weights(process: Process) -> None:
    """Ranks that built different weights, as a plugin may, train those of rank 0; norms and sums are of all shards."""
    for kind in (Replicated, Sharded, FullySharded):
        torch.manual_seed(process.rank)
        model = nn.ModuleDict({"wte": nn.Linear(16, 8, bias=False), "blocks": nn.ModuleList([nn.Linear(16, 8)])})
        torch.manual_seed(0)
        wanted = [torch.randn(8, 16) for _ in range(2)]
        for parameter, values in zip((model["wte"].weight, model["blocks"][0].weight), wanted, strict=True):
            parameter.data.copy_(values if process.rank == 0 else -values)
        weights = kind(model, torch.bfloat16, Collectives(2, process.rank, CPU))
        weights.share()
        for name, values in zip(("wte.weight", "blocks.0.weight"), wanted, strict=True):
            (piece,) = [p for p in weights.pieces(lambda bucket: bucket.master.data, to_save=False) if p.name == name]
            assert torch.equal(piece.values, values.flatten()[piece.start :][: piece.values.numel()]), (kind, name)
            with weights.gathered():
                read = dict(model.named_parameters())[name].data.clone()
            assert torch.equal(read, values.bfloat16()), (kind, name)
        mine = torch.tensor([1.0 + process.rank])
        assert weights.summed(mine.clone()) == (mine if kind is Replicated else 3)
        assert weights.largest(mine.clone()) == (mine if kind is Replicated else 2)


def _gradients(process: Process) -> None:
    """Norm and figures are those of the summed gradients and of all weights, though a rank holds a half of them."""
    shapes = {"wte.weight": (8, 64), "blocks.0.weight": (8, 64), "blocks.0.bias": (8,)}
    named = [(i, name, torch.Size(shape)) for i, (name, shape) in enumerate(shapes.items())]
    given = [{name: _of(2 * i + rank, shape.numel()).view(shape) for i, name, shape in named} for rank in (0, 1)]
    total = {name: given[0][name] + given[1][name] for name in shapes}
    for name in shapes:
        total[name].view(-1)[0] = -99.0  # which one rank holds
        given[1][name] = total[name] - given[0][name]
    for kind in (Replicated, Sharded, FullySharded):
        model = nn.ModuleDict({"wte": nn.Linear(64, 8, bias=False), "blocks": nn.ModuleList([nn.Linear(64, 8)])})
        for i, name, shape in named:  # the first half of the elements is small
            values = _of(10 + i, shape.numel()) * torch.linspace(0.01, 1, shape.numel())
            model.get_parameter(name).data.copy_(values.view(shape))
        first = {name: model.get_parameter(name).data.clone() for name in shapes}
        weights = kind(model, torch.float32, Collectives(2, process.rank, CPU))
        weights.share()
        weights.start_step()
        weights.start_micro_batch(last=True)
        loss = torch.zeros(())
        for unit, names in enumerate((["wte.weight"], ["blocks.0.weight", "blocks.0.bias"])):
            if isinstance(weights, Sharded):
                weights.enter(unit)
            loss = loss + sum((model.get_parameter(name) * given[process.rank][name]).sum() for name in names)
        loss.backward()  # type: ignore[no-untyped-call]
        weights.finish_gradients()
        every = torch.cat([gradient.flatten() for gradient in total.values()]).double()
        assert weights.gradient_norm().item() == pytest.approx(every.norm().item(), rel=1e-5)
        monitor = GradientMonitor(weights.places, weights.numel, CPU, weights.summed, weights.largest)
        measured = monitor.measure(weights.pieces(gradient_of, to_save=False)).tolist()
        for bucket in weights.buckets:  # an update of 0.1 everywhere
            before, after = bucket.master.data.clone(), bucket.master.data + 0.1
            monitor.observe(weights.pieces_of(bucket, before), weights.pieces_of(bucket, after))
        found = monitor.record(1.0, measured, monitor.update().tolist())
        assert found["grad_mean"] == pytest.approx(every.mean().item(), rel=1e-4)
        assert found["grad_std"] == pytest.approx(every.std(correction=0).item(), rel=1e-5)
        assert (found["grad_min"], found["grad_max"]) == (every.min().item(), every.max().item())
        for layer, names in (("embedding", ["wte.weight"]), ("0", ["blocks.0.weight", "blocks.0.bias"])):
            norm = math.hypot(*(total[name].norm().item() for name in names))
            assert found["layer_norms"][layer] == pytest.approx(norm, rel=1e-5)
        ratio = 0.1 * math.sqrt(8 * 64) / (first["wte.weight"] + 0.1).norm().item()
        assert found["update_ratios"]["embedding"] == pytest.approx(ratio, rel=1e-4)


def _threads() -> list[str]:
    """Returns the names of this process's threads, those of C++ too."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def _leave(process: Process) -> None:
    """No thread of a process group outlives the job: such a thread may abort a process that shuts down."""
    cycle: list[object] = [process.host_group, process.save_group]
    cycle.append(cycle)
    del cycle
    assert [name for name in _threads() if "gloo" in name]
    process.close()
    assert not [name for name in _threads() if "gloo" in name]


def _rank(rank: int, folder: Path, works: list[Callable[[Process], None]]) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        process = Process(rank, 2, CPU, *(dist.new_group(backend="gloo") for _ in range(2)))
        for work in works:
            work(process)
        _leave(process)
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None


def test_two_ranks_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    works = [_collectives, _agreements, _first_weights, _gradients]
    ranks = [context.Process(target=_rank, args=(rank, tmp_path, works)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
