"""Saves in the background and by several ranks: what is saved and reported, and which errors all ranks raise."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf import checkpoint
from gptperf.checkpoint import write
from gptperf.checkpoint.background import Saved, Saver
from gptperf.checkpoint.tensor_file import join, part_name
from gptperf.distributed.agreement import SingleRank, fail_together
from gptperf.errors import CheckpointError, DiskError, GptperfError, NonFiniteError
from gptperf.files import FileRecord


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.box: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)

    def peer(self, rank: int) -> "Peer":
        return Peer(self, rank)


class Peer:
    def __init__(self, job: Threads, rank: int):
        self.job, self.rank, self.world_size = job, rank, job.world_size

    def exchange(self, value: Any) -> list[Any]:
        self.job.box[self.rank] = value
        self.job.barrier.wait()
        found = list(self.job.box)
        self.job.barrier.wait()
        return found


def in_all(world_size: int, work: Callable[[Peer], Any]) -> list[Any]:
    """Returns what every rank returns or raises."""
    job, found = Threads(world_size), [None] * world_size

    def target(rank: int) -> None:
        try:
            found[rank] = work(job.peer(rank))
        except GptperfError as error:
            found[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def tensors_of(rank: int) -> dict[str, dict[str, Tensor]]:
    """Returns half of a matrix, and a vector that only this rank has."""
    whole = torch.arange(24.0)
    part = {part_name("matrix", (4, 6), 12 * rank): whole[12 * rank : 12 * rank + 12], f"vector{rank}": torch.ones(3)}
    return {"model": part, **({"rng": {"x": torch.zeros(2)}} if rank == 0 else {})}


def save(peer: Peer, folder: Path, step: int = 1) -> Path:
    return checkpoint.save(folder, step=step, tensors=tensors_of(peer.rank), state={"a": 1}, peers=peer)


def test_the_parts_of_two_are_one_checkpoint(tmp_path: Path) -> None:
    paths = in_all(2, lambda peer: save(peer, tmp_path))
    assert paths[0] == paths[1] == tmp_path / "step-00000001"
    names = {path.name for path in paths[0].iterdir()}
    assert names >= {"model-00000.safetensors", "model-00001.safetensors", "rng-00000.safetensors", "MANIFEST.json"}
    found = checkpoint.load(paths[0])
    assert found.tensors.keys() == {"model", "rng"}
    assert torch.equal(found.tensors["model"]["matrix"], torch.arange(24.0).view(4, 6))
    assert found.tensors["model"].keys() == {"matrix", "vector0", "vector1"}
    assert checkpoint.load(paths[0], only=("rng",)).tensors.keys() == {"rng"}
    (paths[0] / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00001"):
        checkpoint.load(paths[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_one_process_finds_full_fails_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    in_all(2, lambda peer: save(peer, tmp_path, 1))
    write_tensors = write.write_tensors

    def full(path: Path, *args: Any, **kwargs: Any) -> FileRecord:
        if path.name == f"model-{rank:05d}.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(path, *args, **kwargs)

    monkeypatch.setattr(write, "write_tensors", full)
    found = in_all(2, lambda peer: save(peer, tmp_path, 2))
    for error in found:
        assert isinstance(error, DiskError)
        assert error.full
        assert f"saving step 2 in {tmp_path} failed" in str(error)
    assert str(found[1 - rank]).startswith(f"rank {rank}: ")
    assert [info.step for info in checkpoint.checkpoints(tmp_path)] == [1]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_weight_that_is_not_finite_saves_nothing_anywhere(tmp_path: Path) -> None:
    def work(peer: Peer) -> Path:
        tensors = tensors_of(peer.rank)
        if peer.rank == 1:
            tensors["model"]["vector1"][0] = torch.nan
        return checkpoint.save(tmp_path, step=1, tensors=tensors, state={}, peers=peer)

    assert all(isinstance(error, NonFiniteError) for error in in_all(2, work))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["x@0:4", "x@3:4"], "missing or stored twice"),
        (["x@0:4"], "found 2 elements of 'x', wanted 4"),
        (["x@2:4"], "missing or stored twice"),
        (["x", "x@0:2"], "missing or stored twice"),
    ],
)
def test_parts_that_do_not_fit(names: list[str], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        join({name: torch.zeros(2) for name in names}, "here")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, real = threading.Event(), checkpoint.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert go_on.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(write, "save", slow)
    weight = torch.ones(5)
    saver = Saver(tmp_path, 3, SingleRank())
    assert saver.save(1, {"model": {"w": weight}}, {}, 0.5) is None
    assert saver.poll() is None
    weight.fill_(7)  # the next step
    go_on.set()
    ended = saver.wait()
    assert ended is not None
    assert (ended.step, ended.metric, ended.path, ended.error) == (1, 0.5, tmp_path / "step-00000001", None)
    assert 0 <= ended.stall_ms <= ended.time_ms
    assert saver.wait() is None  # told once
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001").tensors["model"]["w"], torch.ones(5))
    saver.save(2, {"model": {"w": weight}}, {}, None)
    assert saver.wait() is not None
    assert torch.equal(checkpoint.load(tmp_path / "step-00000002").tensors["model"]["w"], weight)


def test_what_fails_in_the_background_is_told_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Path:
        raise RuntimeError("no idea")

    saver = Saver(tmp_path, 3, SingleRank())
    with monkeypatch.context() as patched:
        patched.setattr(write, "save", broken)
        saver.save(1, {"model": {"w": torch.ones(5)}}, {}, None)
        while saver._thread is not None and saver._thread.is_alive():
            saver._thread.join(0.1)
    before = saver.save(2, {"model": {"w": torch.ones(5)}}, {}, None)
    assert isinstance(before, Saved)
    assert isinstance(before.error, DiskError)
    assert "no idea" in str(before.error)
    after = saver.wait()
    assert after is not None
    assert after.error is None


def test_a_full_disk_is_tried_again_after_older_checkpoints_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, 9, SingleRank(), in_background=False)
    for step in (1, 2, 3):
        saver.save(step, {"model": {"w": torch.ones(5)}}, {}, None)
    monkeypatch.setenv("GPTPERF_FAILPOINT", "save.3:enospc")
    saver.save(4, {"model": {"w": torch.ones(5)}}, {}, None)
    ended = saver.wait()
    assert ended is not None
    assert isinstance(ended.error, DiskError)
    assert [info.step for info in checkpoint.checkpoints(tmp_path)] == [3]  # it had made room, and was refused again
    monkeypatch.delenv("GPTPERF_FAILPOINT")
    saver.save(5, {"model": {"w": torch.ones(5)}}, {}, None)
    assert [info.step for info in checkpoint.checkpoints(tmp_path)] == [3, 5]


def test_an_error_of_another_rank_keeps_its_kind() -> None:
    def work(peer: Peer) -> None:
        with fail_together(peer, "reading"):
            if peer.rank == 1:
                raise CheckpointError("a name")

    first, second = in_all(2, work)
    assert isinstance(first, CheckpointError)
    assert str(first) == "rank 1: a name"
    assert str(second) == "a name"


def test_a_resume_reads_part_by_part(tmp_path: Path) -> None:
    (path, _) = in_all(2, lambda peer: save(peer, tmp_path))
    found = checkpoint.load(path, later=("model",))
    assert found.tensors.keys() == {"rng"}
    parts = [(part.name, part.shape, part.start, part.values.clone()) for part in checkpoint.stored(path, "model")]
    assert sorted((name, shape, start) for name, shape, start, _ in parts) == [
        ("matrix", (4, 6), 0),
        ("matrix", (4, 6), 12),
        ("vector0", (3,), 0),
        ("vector1", (3,), 0),
    ]
    matrix = torch.cat([values for name, _, start, values in sorted(parts, key=lambda p: p[2]) if name == "matrix"])
    assert torch.equal(matrix, torch.arange(24.0))
    with open(path / "model-00001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="model-00001"):
        checkpoint.load(path, later=("model",))  # verified all the same


def test_older_checkpoints_that_cannot_be_deleted_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise DiskError("no", full=True)

    monkeypatch.setattr(write, "save", refuse)
    monkeypatch.setattr(write, "prune", refuse)

    def work(peer: Peer) -> Saved | None:
        saver = Saver(tmp_path, 3, peer)
        saver.save(1, tensors_of(peer.rank), {}, None)
        return saver.wait()

    for ended in in_all(2, work):
        assert isinstance(ended, Saved)
        assert isinstance(ended.error, DiskError)
        assert str(ended.error) == "no"  # and not that a peer did not come
