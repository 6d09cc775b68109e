"""Damage to a data set is found when its tokens are read, and the document index names the source of every token."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import exhaust

from gptperf.data.blocks import BLOCK_BYTES
from gptperf.data.documents import DocumentIndex, Origin
from gptperf.data.format import read_manifest
from gptperf.data.loader import Loader
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError

SHARD_TOKENS = 100_000  # 200,064 bytes: four blocks, the last one short


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a data set: three training shards of random bytes, 250,000 tokens, and one of validation."""
    folder, rng = tmp_path_factory.mktemp("data") / "set", np.random.default_rng(0)
    with ShardWriter(
        folder, tokenizer=ByteTokenizer(), source="test", val_fraction=0.5, split_method="", shard_tokens=SHARD_TOKENS
    ) as out:
        for i in range(50):
            text = rng.integers(0, 256, 4999)
            digest = int.from_bytes(hashlib.sha256(text.astype(np.uint8).tobytes()).digest()[:8], "big")
            out.add("train", text, Origin(f"file {i // 20}", i, f"group {i % 3}"), digest, 4999)
        out.add("val", np.arange(200), Origin("val\n\u00e9", 7))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def data(intact: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in intact.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def train_an_epoch(folder: Path, verify: bool = True) -> None:
    """Reads every token of the training split in the order of training, as a run does."""
    with TokenSource.open(folder, "train", verify=verify) as source:
        order_steps = len(source) // 128 // 8 + 1
        with Loader(source, block_size=128, batch_size=8, micro_batches=1, seed=1) as loader:
            for _ in range(2 * order_steps):
                next(loader)


def test_intact_data_set_is_read_without_an_error(data: Path) -> None:
    train_an_epoch(data)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_is_found_while_training(data: Path, intact: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    name = f"train_0000{rng.randrange(3)}.bin"
    raw = bytearray(intact[name])
    bit = rng.randrange(8 * 64, 8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    (data / name).write_bytes(raw)
    with pytest.raises(DataError) as error:
        train_an_epoch(data)
    begin = bit // 8 // BLOCK_BYTES * BLOCK_BYTES
    assert f"{name}: found wrong bytes in [{begin}, " in str(error.value)
    assert "copy this file again" in str(error.value)


@pytest.mark.parametrize("kind", ["zeros", "other shard", "shifted", "swapped blocks", "other run's page"])
def test_overwritten_bytes_are_found_while_training(data: Path, intact: dict[str, bytes], kind: str) -> None:
    one, two = (intact[f"train_0000{i}.bin"] for i in (0, 1))
    raw = bytearray(one)
    if kind == "zeros":
        raw[70_000:74_096] = bytes(4096)
    elif kind == "other shard":  # shards of equal size and equal header fields can be swapped without a trace in sizes
        raw[64:] = two[64:]
    elif kind == "shifted":
        raw[64:] = one[66:] + one[64:66]
    elif kind == "swapped blocks":
        raw[BLOCK_BYTES : 2 * BLOCK_BYTES], raw[2 * BLOCK_BYTES : 3 * BLOCK_BYTES] = (
            one[2 * BLOCK_BYTES : 3 * BLOCK_BYTES],
            one[BLOCK_BYTES : 2 * BLOCK_BYTES],
        )
    else:
        raw[4096:8192] = two[4096:8192]
    (data / "train_00000.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"train_00000\.bin: found wrong bytes"):
        train_an_epoch(data)


def test_swapped_shards_are_found(data: Path, intact: dict[str, bytes]) -> None:
    (data / "train_00000.bin").write_bytes(intact["train_00001.bin"])
    (data / "train_00001.bin").write_bytes(intact["train_00000.bin"])
    with pytest.raises(DataError, match=r"train_0000[01]\.bin: found"):
        train_an_epoch(data)


@pytest.mark.parametrize("name", ["checksums.bin", "sources.txt"])
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_damaged_side_file_is_found(data: Path, intact: dict[str, bytes], name: str, kind: str) -> None:
    raw = bytearray(intact[name])
    raw[3] ^= 4
    (data / name).write_bytes(raw if kind == "flipped" else raw[:-1])
    if kind == "missing":
        (data / name).unlink()
    manifest = read_manifest(data)
    with pytest.raises(DataError, match=rf"{name}: (found|No such file)"):
        TokenSource.open(data, "train") if name == "checksums.bin" else DocumentIndex(manifest, data, "train")


def test_each_block_is_read_once_for_verification(data: Path, intact: dict[str, bytes]) -> None:
    with TokenSource.open(data, "train") as source:
        out = np.empty(len(source), source.dtype)
        for _ in range(2):
            source.read_into(0, out)
            rows = np.empty((900, 260), source.dtype)
            source.read_rows(np.arange(900, dtype=np.int64) * 250, rows)
        assert source.checksums is not None
        assert source.checksums.read_bytes == sum(len(intact[f"train_0000{i}.bin"]) for i in range(3))
        assert (rows == out[np.arange(900)[:, None] * 250 + np.arange(260)]).all()


def test_only_blocks_that_are_used_are_verified(data: Path, intact: dict[str, bytes]) -> None:
    raw = bytearray(intact["train_00000.bin"])
    raw[-1] ^= 1
    (data / "train_00000.bin").write_bytes(raw)
    with TokenSource.open(data, "train") as source:
        rows = np.empty((2, 10), source.dtype)
        source.read_rows(np.array([0, 40_000]), rows)  # blocks 0 and 1
        assert source.checksums is not None
        assert source.checksums.read_bytes == 2 * BLOCK_BYTES
        with pytest.raises(DataError, match=r"train_00000\.bin: found wrong bytes in \[196608, 200064\)"):
            source.read_rows(np.array([SHARD_TOKENS - 5]), np.empty((1, 10), source.dtype))  # spans two shards


def test_rows_longer_than_a_block_verify_the_blocks_between(data: Path, intact: dict[str, bytes]) -> None:
    raw = bytearray(intact["train_00001.bin"])
    raw[70_000] ^= 1
    (data / "train_00001.bin").write_bytes(raw)
    with TokenSource.open(data, "train") as source:
        row = np.empty((1, 70_000), source.dtype)
        source.read_rows(np.array([0]), row)
        with pytest.raises(DataError, match=r"found wrong bytes in \[65536, 131072\)"):
            source.read_rows(np.array([SHARD_TOKENS + 10]), row)


def test_verification_can_be_switched_off(data: Path, intact: dict[str, bytes]) -> None:
    raw = bytearray(intact["train_00000.bin"])
    raw[1000] ^= 1
    (data / "train_00000.bin").write_bytes(raw)
    train_an_epoch(data, verify=False)


def test_data_set_of_version_1_is_read(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    with TokenSource.open(data, "train") as source:
        fingerprint, tokens = source.fingerprint, np.empty(len(source), source.dtype)
        source.read_into(0, tokens)
    for name in manifest.pop("files"):
        (data / name).unlink()
    (data / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with TokenSource.open(data, "train") as source:
        old = np.empty_like(tokens)
        source.read_into(0, old)
        assert source.checksums is None
        assert source.fingerprint == fingerprint
        assert (old == tokens).all()
    with pytest.raises(DataError, match="no document index; prepare it again"):
        DocumentIndex(read_manifest(data), data, "train")


def test_index_names_the_source_of_every_token(data: Path) -> None:
    manifest = read_manifest(data)
    index = DocumentIndex(manifest, data, "train")
    with TokenSource.open(data, "train") as source:
        tokens = np.empty(len(source), source.dtype)
        source.read_into(0, tokens)
    expected = np.concatenate([[0], np.cumsum(tokens == 256)[:-1]])  # documents that ended before each token
    assert (index.at(np.arange(len(tokens))) == expected).all()
    for i in (0, 19, 20, 49):
        assert index.origin(i) == Origin(f"file {i // 20}", i, f"group {i % 3}")
        begin = 0 if i == 0 else int(index.records["end"][i - 1])
        text = tokens[begin : int(index.records["end"][i]) - 1].astype(np.uint8).tobytes()
        assert int(index.records["digest"][i]) == int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        assert int(index.records["bytes"][i]) == len(text)
    val = DocumentIndex(manifest, data, "val")
    assert val.origin(0) == Origin("val\n\u00e9", 7, "")


def test_loader_raises_the_error_in_the_training_thread(data: Path, intact: dict[str, bytes]) -> None:
    raw = bytearray(intact["train_00002.bin"])
    raw[64:] = bytes(len(raw) - 64)
    (data / "train_00002.bin").write_bytes(raw)
    with TokenSource.open(data, "train") as source, pytest.raises(DataError, match=r"train_00002\.bin: found wrong"):
        exhaust(Loader(source, block_size=64, batch_size=4, micro_batches=1, seed=0))
