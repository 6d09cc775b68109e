"""Checkpoints: a load returns what was saved; kills, full disks and pruning."""

import errno
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    Tensors,
    assert_equal,
    assert_same_bits,
    in_child,
    leftovers,
    no_warning,
    put,
    steps,
)
from safetensors.torch import load_file

from gptperf import checkpoint
from gptperf.checkpoint import FAILPOINTS, manifest, tensor_file
from gptperf.errors import CheckpointError, DiskError, NonFiniteError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return put(tmp_path, 7)


def test_all_dtypes_shapes_and_views_come_back_bitwise(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8).repeat(4)
    big = torch.randn(10_000)
    half = torch.randn(64)
    tensors: Tensors = {
        "model": {
            "fp32": torch.tensor([0.0, -0.0, 1e-45, 3.4e38, math.pi]),
            "fp64": torch.tensor([math.pi, -0.0], dtype=torch.float64),
            "bf16": half.bfloat16(),
            "fp16": half.half(),
            "int64": torch.tensor([-(2**63), 2**63 - 1]),
            "int32": torch.tensor([-5], dtype=torch.int32),
            "uint8": bits,
            "int8": bits.view(torch.int8),
            "bool": torch.tensor([True, False]),
            "zero_size": torch.empty(0, 5),
            "scalar": torch.tensor(2.5),
            "transposed": torch.arange(6.0).view(2, 3).t(),
            "expanded": torch.ones(1).expand(7),
            "strided": big[::3],
        },
        "flat": {f"slice{i}": big[i * 1000 : (i + 1) * 1000].view(10, 100) for i in range(10)},
        "shared": {"all": big, "part": big[5:50], "again": big},
        "empty": {},
    }
    path = checkpoint.save(tmp_path, step=1, tensors=tensors, state={})
    loaded = checkpoint.load(path)
    assert loaded.tensors.keys() == tensors.keys()
    for stem, named in tensors.items():
        assert_same_bits(loaded.tensors[stem], named)
        assert_same_bits(load_file(path / f"{stem}.safetensors"), named)  # the public format, by its own reader
    assert_same_bits(checkpoint.load(path, only=["flat"]).tensors["flat"], tensors["flat"])


def test_a_tensor_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 1000)
    monkeypatch.setattr(manifest, "READ_CHUNK", 777)
    tensors = {"model": {"a": torch.randn(1999), "b": torch.randn(3, 7).half()}}
    path = checkpoint.save(tmp_path, step=1, tensors=tensors, state={})
    assert_same_bits(checkpoint.load(path).tensors["model"], tensors["model"])


def test_loaded_tensors_do_not_depend_on_the_file(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    with open(saved / "model.safetensors", "r+b") as stream:
        size = os.path.getsize(saved / "model.safetensors")
        stream.write(b"\xff" * size)
    assert_equal(loaded, 7)


def test_state_floats_keep_their_bits(tmp_path: Path) -> None:
    rng = random.Random(0)
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308] + [
        value for value in (disk_float(rng.getrandbits(64)) for _ in range(2000)) if math.isfinite(value)
    ]
    state = {
        "floats": floats,
        "big": 2**200,
        "text": "\u00e9\ud800\n",
        "none": None,
        "flag": True,
        "nest": {"a": [[]]},
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, step=1, tensors={}, state=state)).state
    assert loaded == state
    assert [value.hex() for value in loaded["floats"]] == [value.hex() for value in floats]


def disk_float(bits: int) -> float:
    return float(torch.tensor(bits - 2**63).view(torch.float64))


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, b"x", torch.tensor(1), 1 + 2j, {1}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\.a"):
        checkpoint.save(tmp_path, step=1, tensors={}, state={"a": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"state\.loss\[1\]"):
        checkpoint.save(tmp_path, step=1, tensors={}, state={"loss": [1.0, bad]})
    with pytest.raises(NonFiniteError, match="metric"):
        put(tmp_path, 1, metric=bad)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size, at in [(1, 0), (7, 6), (64, 33), (1000, 999), (40_001, 20_000)]:
            tensor = torch.ones(size, dtype=dtype)
            tensor[at] = bad
            good = {"w": torch.ones(2), "odd": torch.ones(3, 3)[:, 1]}
            with pytest.raises(NonFiniteError, match=r"tensor 'm\.3' of 'optimizer'"):
                checkpoint.save(tmp_path, step=1, tensors={"model": good, "optimizer": {"m.3": tensor}}, state={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"../model": {"w": torch.ones(1)}},
        {"": {"w": torch.ones(1)}},
        {"model": {"__metadata__": torch.ones(1)}},
        {"model": {"w": torch.ones(1, dtype=torch.complex64)}},
        {"model": {"w": torch.ones(1, device="meta")}},
        {"model": {"w": torch.ones(2, 2).to_sparse()}},
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(CheckpointError):
        checkpoint.save(tmp_path, step=1, tensors=tensors, state={})
    assert os.listdir(tmp_path) == []


def test_tensor_bytes_counts_views_by_what_is_written() -> None:
    big = torch.zeros(100)
    assert tensor_file.tensor_bytes({"a": {"x": big[:10], "y": big}, "b": {"z": torch.zeros(3).half()}}) == 446


def scene(directory: Path, name: str) -> int:
    """Checkpoints 1 to 3, then the step whose save passes the failpoint `name`."""
    for step in (1, 2, 3):
        put(directory, step)
    return 3 if name == "same_step_set_aside" else 4


@pytest.mark.parametrize("number", range(1, len(FAILPOINTS) + 1))
def test_kill_in_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    name = FAILPOINTS[number - 1]
    step = scene(tmp_path, name)
    monkeypatch.setenv("GPTPERF_FAILPOINT", f"save.{number}")
    assert in_child(lambda: put(tmp_path, step) and None) == -signal.SIGKILL, f"{name} was not reached"
    monkeypatch.delenv("GPTPERF_FAILPOINT")

    committed = number >= FAILPOINTS.index("renamed") + 1
    newest = 4 if committed else 3
    found = checkpoint.load_latest(tmp_path, warn=no_warning)
    assert found is not None
    assert_equal(found, newest)
    assert len(steps(tmp_path)) >= 3
    if name in ("tmp_made", "tmp_synced", "same_step_set_aside", "prune_renamed"):
        assert leftovers(tmp_path)

    checkpoint.clean(tmp_path)
    assert leftovers(tmp_path) == []
    assert steps(tmp_path)[-1] == newest
    put(tmp_path, 4)
    assert steps(tmp_path) == [2, 3, 4]
    assert leftovers(tmp_path) == []
    assert_equal(checkpoint.load(checkpoint.latest(tmp_path).path), 4)  # type: ignore[union-attr]
    lines = (tmp_path / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:3]] == [1, 2, 3]
    assert json.loads(lines[-1])["step"] == 4  # a torn line does not take the next one with it


def test_kill_then_save_without_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = scene(tmp_path, "same_step_set_aside")
    number = FAILPOINTS.index("same_step_set_aside") + 1
    monkeypatch.setenv("GPTPERF_FAILPOINT", f"save.{number}")
    assert in_child(lambda: put(tmp_path, step) and None) == -signal.SIGKILL
    monkeypatch.delenv("GPTPERF_FAILPOINT")
    assert not (tmp_path / "step-00000003").exists()
    put(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    checkpoint.clean(tmp_path)
    assert leftovers(tmp_path) == []
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("number", range(1, len(FAILPOINTS) + 1))
def test_disk_full_in_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    name = FAILPOINTS[number - 1]
    step = scene(tmp_path, name)
    monkeypatch.setenv("GPTPERF_FAILPOINT", f"save.{number}:enospc")
    with pytest.raises(DiskError, match=f"saving step {step} .*No space.*{name}"):
        put(tmp_path, step)
    monkeypatch.delenv("GPTPERF_FAILPOINT")
    assert not [entry for entry in leftovers(tmp_path) if entry.startswith((".tmp-", ".old-"))]
    assert {2, 3} <= set(steps(tmp_path))
    for info in checkpoint.checkpoints(tmp_path):
        assert_equal(checkpoint.load(info.path), info.step)
    checkpoint.prune(tmp_path, keep=2)
    put(tmp_path, step)
    assert steps(tmp_path)[-1] == step


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_each_disk_error_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    put(tmp_path, 1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskError, match="saving step 2"):
        put(tmp_path, 2)
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    assert steps(tmp_path) == [1]


def test_vanished_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        put(tmp_path / "file" / "checkpoints", 1)


def test_failed_replacement_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DiskError):
        put(tmp_path, 1)
    assert_equal(checkpoint.load(tmp_path / "step-00000001"), 1)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("text", ["save.0", "save.99", "save.", "save.1:eio", "save.x"])
def test_a_wrong_failpoint_is_no_silent_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GPTPERF_FAILPOINT", text)
    with pytest.raises(ValueError, match=r"save\.N"):
        put(tmp_path, 1)


def test_every_file_and_directory_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watch_fsync(fd: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def watch_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    put(tmp_path, 1)
    at = events.index("rename")
    files = {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}
    assert files == set(events[: at - 1])
    assert events[at - 1].startswith(".tmp-00000001-")
    assert events[at + 1 :] == [tmp_path.name, "index.jsonl"]


def test_prune_keeps_newest_and_best(tmp_path: Path) -> None:
    for step, metric in enumerate([3.0, 1.0, 2.0, 2.5, 2.2, 2.1], 1):
        put(tmp_path, step, metric=metric, keep=2)
    assert steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best(tmp_path) == checkpoint.CheckpointInfo(path=tmp_path / "step-00000002", step=2, metric=1.0)
    assert checkpoint.latest(tmp_path).step == 6  # type: ignore[union-attr]
    put(tmp_path, 7, metric=1.0, keep=2)  # of equal ones the newest is the best
    assert steps(tmp_path) == [6, 7]
    assert checkpoint.prune(tmp_path, keep=1) == ["step-00000006"]
    assert leftovers(tmp_path) == []
    with pytest.raises(ValueError, match="keep 0"):
        checkpoint.prune(tmp_path, keep=0)


def test_prune_does_not_count_what_lacks_bytes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 10)
    put(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [2, 3, 4]
    os.truncate(tmp_path / "step-00000002" / "model.safetensors", 10)
    put(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [4, 5]
    put(tmp_path, 6, keep=2, metric=1.0)
    put(tmp_path, 7, keep=2, metric=2.0)
    os.truncate(tmp_path / "step-00000006" / "model.safetensors", 10)  # the best is lost: the next one is
    for step in (8, 9, 10):
        put(tmp_path, step, keep=2)
    assert steps(tmp_path) == [7, 9, 10]


def test_prune_spares_what_was_just_saved(tmp_path: Path) -> None:
    put(tmp_path, 10)
    put(tmp_path, 20)
    put(tmp_path, 5, keep=1)  # a run that went back
    assert steps(tmp_path) == [5, 20]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 7)
    tensors = {"model": {"w": torch.full((3,), 9.0)}}
    path = checkpoint.save(tmp_path, step=7, tensors=tensors, state={})
    assert_same_bits(checkpoint.load(path).tensors["model"], tensors["model"])
    assert steps(tmp_path) == [7]
    assert leftovers(tmp_path) == []


def test_steps_beyond_eight_digits_are_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 2):
        put(tmp_path, step)
    assert steps(tmp_path) == [2, 99_999_999, 100_000_000]


def test_clean_removes_leftovers_only(tmp_path: Path) -> None:
    put(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for name in (".tmp-00000002-abc", ".trash-step-00000001-abc"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("x")
    (tmp_path / ".tmp-link").symlink_to(outside)
    (tmp_path / ".other").write_text("")
    assert len(checkpoint.clean(tmp_path)) == 3
    assert leftovers(tmp_path) == [".other"]
    assert (outside / "kept").read_text() == "kept"
    assert steps(tmp_path) == [1]
    assert checkpoint.clean(tmp_path / "absent") == []
