"""Checkpoints that are corrupt, incomplete, newer or hostile are refused before a tensor is used."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    assert_equal,
    assert_same_bits,
    in_child,
    make_tensors,
    no_warning,
    put,
    reseal,
    steps,
)
from safetensors.torch import save_file

from gptperf import checkpoint, files
from gptperf.checkpoint import manifest, read, tensor_file
from gptperf.errors import CheckpointError
from gptperf.formats import counted


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return put(tmp_path, 7)


def test_truncation_is_caught(saved: Path) -> None:
    for name in sorted(os.listdir(saved)):
        data = (saved / name).read_bytes()
        for cut in sorted({len(data) * i // 64 for i in range(64)}):
            (saved / name).write_bytes(data[:cut])
            with pytest.raises(CheckpointError, match=name) as caught:
                checkpoint.load(saved)
            if name != "MANIFEST.json":
                assert f"{counted(cut, 'byte')}; wanted {len(data):,}" in str(caught.value)
                with pytest.raises(CheckpointError):
                    checkpoint.load(saved, only=())
        (saved / name).write_bytes(data)
    assert_equal(checkpoint.load(saved), 7)


def test_flipped_bits_are_caught(saved: Path) -> None:
    rng = random.Random(1)
    names = sorted(os.listdir(saved))
    for index in range(250):
        path = saved / names[index % len(names)]
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(saved)
        path.write_bytes(data)
    assert_equal(checkpoint.load(saved), 7)


def test_every_bit_of_the_manifest_counts(saved: Path) -> None:
    path = saved / "MANIFEST.json"
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            manifest.read_manifest(saved)


def test_another_spelling_of_the_manifest_is_damage(saved: Path) -> None:
    path = saved / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match="corrupt"):
        checkpoint.load(saved)


@pytest.mark.slow
def test_a_deep_manifest_is_damage_at_any_depth(saved: Path) -> None:
    for depth in [*range(1, 1200, 7), 100_000]:
        (saved / "MANIFEST.json").write_text('{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(CheckpointError, match="corrupt"):
            checkpoint.load(saved)


def test_a_part_is_verified_alone(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        checkpoint.load(saved, only=["model"])
    part = checkpoint.load(saved, only=["optimizer", "rng"]).tensors
    assert part.keys() == {"optimizer"}
    assert_same_bits(part["optimizer"], make_tensors(7)["optimizer"])


def test_missing_and_extra_files(saved: Path) -> None:
    for name in ("model.safetensors", "state.json"):
        data = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing; wanted {len(data)} bytes"):
            checkpoint.load(saved)
        (saved / name).write_bytes(data)
    (saved / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.safetensors is not in MANIFEST"):
        checkpoint.load(saved)


def test_without_manifest_it_is_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    (path / "MANIFEST.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000008").write_text("")
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [1]
    lines: list[str] = []
    found = checkpoint.load_latest(tmp_path, warn=lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 3
    assert all("is not a checkpoint" in line for line in lines)
    with pytest.raises(CheckpointError, match="MANIFEST"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="MANIFEST"):
        checkpoint.load(tmp_path / "absent")


def test_a_renamed_checkpoint_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is of step 7; wanted 8"):
        checkpoint.load(saved.rename(saved.with_name("step-00000008")))


def test_a_copy_elsewhere_loads(saved: Path) -> None:
    assert_equal(checkpoint.load(Path(shutil.copytree(saved, saved.parent / "copy"))), 7)


def test_newer_schema_is_not_skipped_over(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    reseal(path, schema=checkpoint.SCHEMA + 1)
    with pytest.raises(CheckpointError, match="needs a newer gptperf"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="needs a newer gptperf"):
        checkpoint.load_latest(tmp_path, warn=no_warning)
    reseal(path)
    assert_equal(checkpoint.load(path), 2)


def test_fallback_to_the_previous_good_one(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "absent", warn=no_warning) is None
    assert checkpoint.load_latest(tmp_path, warn=no_warning) is None
    paths = [put(tmp_path, step) for step in (1, 2, 3)]
    for count, path in enumerate(reversed(paths), 1):
        with open(path / "optimizer.safetensors", "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x55")
        lines: list[str] = []
        if count < 3:
            found = checkpoint.load_latest(tmp_path, warn=lines.append)
            assert found is not None
            assert_equal(found, 3 - count)
        else:
            with pytest.raises(CheckpointError, match="found 3 checkpoints, but none that can be read"):
                checkpoint.load_latest(tmp_path, warn=lines.append)
        assert len(lines) == count
        assert all("CORRUPT" in line and "optimizer.safetensors" in line for line in lines)


def hostile(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints whose manifests are valid and whose content is not."""
    paths = {}

    def forge(name: str, change: Callable[[Path], None], **changes: Any) -> None:
        path = put(tmp_path / name, 7)
        change(path)
        reseal(path, **changes)
        paths[name] = path

    def header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
        head = (len(text) if length is None else length).to_bytes(8, "little") + text
        return lambda path: (path / "model.safetensors").write_bytes(head) and None

    def manifest_of(name: Any, size: Any = 0, digest: Any = "0") -> dict[str, Any]:
        state = files.FileRecord(name="state.json", bytes=2, sha256="0")
        return {"files": [state, files.FileRecord(name=name, bytes=size, sha256=digest)]}

    def to_link(path: Path) -> None:
        (path / "model.safetensors").rename(path.parent / "elsewhere")
        (path / "model.safetensors").symlink_to(path.parent / "elsewhere")

    def nothing(path: Path) -> None:
        pass

    pickled = b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."
    forge("pickle", lambda path: (path / "model.safetensors").write_bytes(pickled) and None)
    forge("huge_header", header(b"{}", 2**63))
    forge("long_header", header(b"{}", 90_000_000))
    forge("no_json", header(b"\xff\xfe not json"))
    forge("deep_json", header(b'{"a":' * 5000 + b"}" * 5000))
    forge("offsets", header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4000000000]}}'))
    forge("overflow", header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'))
    forge("unknown_dtype", header(b'{"a":{"dtype":"X9","shape":[0],"data_offsets":[0,0]}}'))
    forge("empty_file", lambda path: (path / "model.safetensors").write_bytes(b"") and None)
    forge("state_list", lambda path: (path / "state.json").write_text("[]") and None)
    forge("state_nan", lambda path: (path / "state.json").write_text('{"a": NaN}') and None)
    forge("state_1e999", lambda path: (path / "state.json").write_text('{"a": 1e999}') and None)
    forge("state_deep", lambda path: (path / "state.json").write_text("[" * 100_000) and None)
    forge("state_code", lambda path: (path / "state.json").write_text("__import__('os').abort()") and None)
    forge("link", to_link)
    for number, name in enumerate(["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "MANIFEST.json"]):
        forge(f"name{number}", nothing, **manifest_of(name))
    forge("name_type", nothing, **manifest_of(["x"]))
    forge("size_type", nothing, **manifest_of("a.safetensors", "1"))
    forge("negative", nothing, **manifest_of("a.safetensors", -1))
    forge("twice", nothing, **manifest_of("state.json"))
    forge("no_state", lambda path: (path / "state.json").unlink())
    forge("negative_step", nothing, step=-1)
    forge("metric_type", nothing, metric="low")
    forge("schema_0", nothing, schema=0)
    path = paths["manifest_fifo"] = put(tmp_path / "manifest_fifo", 7)
    (path / "MANIFEST.json").unlink()
    os.mkfifo(path / "MANIFEST.json")
    path = paths["manifest_link"] = put(tmp_path / "manifest_link", 7)
    (path / "MANIFEST.json").rename(path.parent / "elsewhere")
    (path / "MANIFEST.json").symlink_to(path.parent / "elsewhere")
    paths["link_to_all"] = tmp_path / "link_to_all"
    paths["link_to_all"].symlink_to(put(tmp_path / "target", 7))
    return paths


def test_hostile_checkpoints_are_refused_and_run_nothing(tmp_path: Path) -> None:
    paths = hostile(tmp_path)
    good = put(tmp_path / "good", 7)
    assert_equal(checkpoint.load(good), 7)  # whatever torch imports on its first load is imported now

    def attack() -> None:
        banned = (
            "pickle.find_class",
            "exec",
            "compile",
            "os.system",
            "subprocess.",
            "socket.",
            "os.exec",
            "os.fork",
        )
        writes: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event.startswith(banned) or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                writes.append(f"{event} {arguments!r:.80}")

        sys.addaudithook(hook)
        assert_equal(checkpoint.load(good), 7)
        accepted = []
        check_hash = read.check_hash
        for name, path in paths.items():
            for check in (check_hash, lambda *_: None):  # without the hash the parser of the tensors is reached
                read.check_hash = check
                try:
                    checkpoint.load(path)
                except CheckpointError:
                    continue
                accepted.append(name)
        print("accepted:", accepted, "events:", writes, file=sys.stderr)
        assert not accepted
        assert not writes
        try:
            eval("1")  # the hook does see such a thing
        finally:
            assert writes

    assert len(paths) >= 20
    assert in_child(attack) == 0
    assert not (tmp_path / "pwned").exists()


def test_the_header_is_limited_before_it_is_parsed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match=r"states a header of \d+ bytes; wanted at most 100"):
        checkpoint.load(saved)
    with pytest.raises(CheckpointError, match=r"header of 'model' is \d+ bytes; wanted at most 100"):
        put(saved.parent, 8)


def test_a_link_is_refused_though_its_target_is_right(saved: Path) -> None:
    target = saved.parent / "elsewhere"
    (saved / "model.safetensors").rename(target)
    (saved / "model.safetensors").symlink_to(target)
    size = len(str(target))
    os.truncate(target, size)  # the link is as long as its target, so that only its kind is wrong
    reseal(saved)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        checkpoint.load(saved)


def test_a_foreign_safetensors_file_is_only_data(saved: Path) -> None:
    save_file({"w": torch.ones(2)}, saved / "model.safetensors")
    reseal(saved)
    assert_same_bits(checkpoint.load(saved).tensors["model"], {"w": torch.ones(2)})
