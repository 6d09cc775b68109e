"""The shard format: shards are read back as written, and every kind of corruption is found and named."""

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptperf.data import shards
from gptperf.data.format import read_manifest
from gptperf.data.shards import TokenSource, verify
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError
from gptperf.formats import counted

BYTE = ByteTokenizer()


@dataclasses.dataclass
class WideTokenizer:
    """A tokenizer whose ids need uint32."""

    name: str = "wide"
    vocab_size: int = 100_000
    eot: int = 99_999
    fingerprint: str = "0" * 64
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def write(path: Path, train: list[list[int]], val: list[list[int]], tokenizer: Any = BYTE, **kwargs: Any) -> Path:
    with ShardWriter(
        path, tokenizer=tokenizer, source="test", val_fraction=0.5, split_method="by hand", **kwargs
    ) as out:
        for split, documents in (("train", train), ("val", val)):
            for document in documents:
                out.add(split, np.array(document, np.int64))
    return path


def read(source: TokenSource) -> list[int]:
    out = np.empty(len(source), source.dtype)
    source.read_into(0, out)
    return out.tolist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three training shards of 16, 16 and 8 tokens and one of validation."""
    return write(tmp_path / "set", [list(range(19)), list(range(100, 119))], [[7, 8, 9]], shard_tokens=16)


def edit_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


# Reading back.


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 40),
    wide=st.booleans(),
    data=st.data(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    wide: bool,
    data: st.DataObject,
) -> None:
    tokenizer = WideTokenizer() if wide else BYTE
    path = write(tmp_path_factory.mktemp("w") / "set", documents, [[1]], tokenizer, shard_tokens=shard_tokens)
    expected = [token for document in documents for token in [*document, tokenizer.eot]]
    split = read_manifest(path).splits["train"]
    assert split.documents == len(documents)
    assert [shard.tokens for shard in split.shards[:-1]] == [shard_tokens] * (len(split.shards) - 1)
    with TokenSource.open(path, "train") as source:
        assert source.dtype == np.dtype("<u4" if wide else "<u2")
        assert len(source) == split.tokens == len(expected)
        assert source.max_id == tokenizer.eot
        assert read(source) == expected
        width = data.draw(st.integers(1, len(expected)))
        offsets = data.draw(st.lists(st.integers(0, len(expected) - width), max_size=5))
        rows = np.empty((len(offsets), width), source.dtype)
        source.read_rows(np.array(offsets, np.int64), rows)
        assert rows.tolist() == [expected[offset : offset + width] for offset in offsets]
    assert verify(path) == len(expected) + 2


def test_layout_of_a_shard(data: Path) -> None:
    raw = (data / "train_00001.bin").read_bytes()
    assert raw[:8] == b"GPTPERF\0"
    assert int.from_bytes(raw[8:12], "little") == 1
    assert int.from_bytes(raw[12:16], "little") == 2
    assert [int.from_bytes(raw[i : i + 8], "little") for i in (16, 24, 32)] == [16, 1, 256]
    assert raw[40:64] == bytes(24)
    assert np.frombuffer(raw[64:], "<u2").tolist() == [16, 17, 18, 256, *range(100, 112)]
    shard = read_manifest(data).splits["train"].shards[1]
    assert shard.sha256 == hashlib.sha256(raw[64:]).hexdigest()
    assert shard.bytes == len(raw)


def test_pieces_of_a_document_are_one_document(tmp_path: Path) -> None:
    with ShardWriter(
        tmp_path / "set", tokenizer=BYTE, source="", val_fraction=0.0, split_method="", shard_tokens=4
    ) as out:
        for begin in range(0, 10, 3):
            out.append("train", np.arange(begin, min(begin + 3, 10)))
        out.end_document("train")
    with TokenSource.open(tmp_path / "set", "train") as source:
        assert read(source) == [*range(10), 256]
    assert read_manifest(tmp_path / "set").splits["train"].documents == 1


@pytest.mark.parametrize("bad", [[-1], [257], [256]])
def test_ids_that_no_tokenizer_gives(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^tokens: found"):
        write(tmp_path / "set", [[1], bad], [])
    assert list(tmp_path.iterdir()) == []


def test_read_checks_its_arguments(data: Path) -> None:
    with TokenSource.open(data, "train") as source:
        n = len(source)
        for offset, size in ((-1, 4), (n - 3, 4), (0, n + 1)):
            with pytest.raises(ValueError, match=r"offset: found"):
                source.read_into(offset, np.empty(size, source.dtype))
            with pytest.raises(ValueError, match=r"offsets: wanted"):
                source.read_rows(np.array([offset]), np.empty((1, size), source.dtype))
        for out in (np.empty(4, np.int64), np.empty((2, 2), source.dtype), np.empty(8, source.dtype)[::2]):
            with pytest.raises(ValueError, match="out: found"):
                source.read_into(0, out)


def test_more_shards_than_open_files(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    before = len(os.listdir("/proc/self/fd"))
    with TokenSource.open(data, "train") as source:
        expected = [*range(19), 256, *range(100, 119), 256]
        for offset in (30, 2, 14, 39, 0):
            out = np.empty(min(10, 40 - offset), source.dtype)
            source.read_into(offset, out)
            assert out.tolist() == expected[offset : offset + 10]
            assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_fingerprint_is_of_the_content(data: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with TokenSource.open(path, "train") as source:
            return source.fingerprint

    train = [list(range(19)), list(range(100, 119))]
    same = write(tmp_path / "other_name", train, [[1]], shard_tokens=16)
    assert fingerprint(same) == fingerprint(data)
    assert fingerprint(write(tmp_path / "order", train[::-1], [[1]], shard_tokens=16)) != fingerprint(data)
    assert fingerprint(write(tmp_path / "cut", train, [[1]], shard_tokens=20)) != fingerprint(data)

    permuted = [list(range(19)), [*range(101, 119), 100]]  # the same sizes and headers
    assert fingerprint(write(tmp_path / "permuted", permuted, [[1]], shard_tokens=16)) != fingerprint(data)

    def swap(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][:2] = manifest["splits"]["train"]["shards"][1::-1]

    edit_manifest(same, swap)
    assert fingerprint(same) != fingerprint(data)


# Damage before the run.


def test_truncation_at_every_offset_is_found(data: Path) -> None:
    shard = data / "train_00001.bin"
    raw = shard.read_bytes()
    for size in range(len(raw)):
        shard.write_bytes(raw[:size])
        with pytest.raises(DataError, match=f"train_00001.bin: found {counted(size, 'byte')}, wanted"):
            TokenSource.open(data, "train")
    for extra in (1, 2, 64):
        shard.write_bytes(raw + bytes(extra))
        with pytest.raises(DataError, match=f"found {len(raw) + extra:,} bytes, wanted {len(raw):,}"):
            TokenSource.open(data, "train")
    shard.write_bytes(raw)
    TokenSource.open(data, "train").close()


def test_every_bit_of_the_header_counts(data: Path) -> None:
    shard = data / "train_00002.bin"
    raw = shard.read_bytes()
    for bit in range(8 * 64):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train_00002\.bin: found"):
            TokenSource.open(data, "train")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"NOTASHRD", "magic b'NOTASHRD', wanted"),
        (8, b"\2\0\0\0", "format version 2, wanted 1"),
        (12, b"\7\0\0\0", "dtype code 7, wanted 2"),
        (12, b"\4\0\0\0", "dtype uint32 in the header, wanted uint16"),
        (16, b"\x11" + bytes(7), "tokens = 17 in the header, wanted 16"),
        (24, b"\5" + bytes(7), "documents = 5 in the header, wanted 0"),
        (32, b"\xff" + bytes(7), "max_id = 255 in the header, wanted 18"),
        (63, b"\1", "padding"),
    ],
)
def test_each_header_field_has_its_message(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    path = write(tmp_path / "set", [[*range(3, 19)] * 2], [], shard_tokens=16)
    shard = path / "train_00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[offset : offset + len(value)] = value
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        TokenSource.open(path, "train")


def test_missing_unreadable_and_odd_shards(data: Path) -> None:
    shard = data / "train_00000.bin"
    shard.unlink()
    with pytest.raises(DataError, match=r"train_00000\.bin: No such file"):
        TokenSource.open(data, "train")
    shard.mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        TokenSource.open(data, "train")
    shard.rmdir()
    os.mkfifo(shard)  # must not block either
    with pytest.raises(DataError, match="not a regular file"):
        TokenSource.open(data, "train")


def test_ids_beyond_the_vocabulary(data: Path) -> None:
    TokenSource.open(data, "train", vocab_size=257).close()
    TokenSource.open(data, "train", vocab_size=50304).close()
    with pytest.raises(DataError, match=r"token id 256, wanted ids below vocab_size = 256; .*--vocab_size=257"):
        TokenSource.open(data, "train", vocab_size=256)


def test_empty_split_and_wrong_split(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [[1, 2]], [])
    with pytest.raises(DataError, match="'val' is empty"):
        TokenSource.open(path, "val")
    with pytest.raises(DataError, match="found 'test', wanted one of train, val"):
        TokenSource.open(path, "test")
    assert verify(path) == 3


def _set(*keys: Any, value: Any) -> Any:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        if value is None:
            del manifest[keys[-1]]
        else:
            manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value="other"), "found 'other', wanted 'gptperf-tokens'"),
        (_set("schema_version", value=3), "found 3, wanted 1 to 2; a newer gptperf"),
        (_set("schema_version", value=0), "found 0, wanted 1 to 2; prepare"),
        (_set("dtype", value="int8"), "found 'int8', wanted one of uint16, uint32"),
        (_set("dtype", value="uint32"), "found bytes = 96, wanted 128"),
        (_set("tokenizer", value=None), "'tokenizer' is missing"),
        (_set("tokenizer", "eot", value="x"), "eot: found 'x', wanted a count"),
        (_set("tokenizer", "eot", value=True), "eot: found True, wanted a count"),
        (_set("tokenizer", value=[]), "tokenizer: found \\[\\], wanted a dict"),
        (_set("splits", "val", value=None), "wanted \\['train', 'val'\\]"),
        (_set("splits", "train", "tokens", value=41), "tokens: found 41 .* wanted 40"),
        (_set("splits", "train", "documents", value=-1), "documents: found -1, wanted a count"),
        (_set("splits", "train", "shards", 0, value="x"), "found str, wanted an object"),
        (_set("splits", "train", "shards", 0, "file", value="../train_00000.bin"), "wanted a name like"),
        (_set("splits", "train", "shards", 0, "sha256", value=None), "'sha256' is missing"),
    ],
)
def test_wrong_manifest(data: Path, change: Any, message: str) -> None:
    edit_manifest(data, change)
    with pytest.raises(DataError, match=f"manifest.json: .*{message}"):
        TokenSource.open(data, "train")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 5000]
)
def test_broken_json(data: Path, text: bytes) -> None:
    (data / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        read_manifest(data)


def test_manifest_cut_anywhere_is_an_error(data: Path) -> None:
    raw = (data / "manifest.json").read_bytes().rstrip()
    for size in range(0, len(raw), 13):
        (data / "manifest.json").write_bytes(raw[:size])
        with pytest.raises(DataError):
            TokenSource.open(data, "train")


def test_verify_finds_every_flipped_bit(data: Path) -> None:
    files = sorted(data.glob("*.bin"))
    rng = random.Random(0)
    for _ in range(100):
        file = rng.choice(files)
        raw = file.read_bytes()
        damaged = bytearray(raw)
        bit = rng.randrange(8 * (64 if "_0" in file.name else 0), 8 * len(raw))
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{file.name}: found (sha256|another SHA-256)"):
            verify(data)
        file.write_bytes(raw)
    assert verify(data) == 44


def test_verify_rechecks_largest_id_and_documents(data: Path) -> None:
    # A checksum that was made for the damage: the other two checks stand on their own.
    file = data / "val_00000.bin"
    raw = bytearray(file.read_bytes())
    raw[64:66] = (300).to_bytes(2, "little")
    file.write_bytes(raw)
    key = ("splits", "val", "shards", 0, "sha256")
    edit_manifest(data, _set(*key, value=hashlib.sha256(raw[64:]).hexdigest()))
    with pytest.raises(DataError, match="found max_id = 300"):
        verify(data)
    raw[64:66] = (256).to_bytes(2, "little")
    file.write_bytes(raw)
    edit_manifest(data, _set(*key, value=hashlib.sha256(raw[64:]).hexdigest()))
    with pytest.raises(DataError, match="found documents = 2"):
        verify(data)


# Damage during the run.


def test_shard_that_shrinks_while_it_is_read(data: Path) -> None:
    with TokenSource.open(data, "train") as source:
        out = np.empty(30, source.dtype)
        source.read_into(0, out)
        os.truncate(data / "train_00001.bin", 64 + 2 * 5)
        message = r"train_00001\.bin: found 74 bytes, wanted 96: the shard was truncated"
        with pytest.raises(DataError, match=message):
            source.read_into(0, out)
        with pytest.raises(DataError, match=message):
            source.read_rows(np.array([0, 20]), np.empty((2, 4), source.dtype))
        source.read_into(0, out[:21])  # what is left can be read


def test_bytes_that_are_appended_while_it_is_read_are_no_tokens(data: Path) -> None:
    with TokenSource.open(data, "train") as source:
        with (data / "train_00000.bin").open("ab") as file:
            file.write(bytes(100))
        rows = np.empty((2, 12), source.dtype)
        source.read_rows(np.array([5, 14]), rows)
        assert rows.tolist() == [[*range(5, 17)], [*range(14, 19), 256, *range(100, 106)]]


def test_shard_that_changed_is_not_opened_again(data: Path) -> None:
    with TokenSource.open(data, "train") as source:
        source.close()
        read(source)
        source.close()
        file = data / "train_00000.bin"
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(1, 1))
        with pytest.raises(DataError, match=r"train_00000\.bin: the shard changed during the run"):
            read(source)


def test_id_above_the_headers_maximum_is_not_handed_out(data: Path) -> None:
    with (data / "val_00000.bin").open("r+b") as file:
        file.seek(64)
        file.write((4000).to_bytes(2, "little"))
    with TokenSource.open(data, "val", verify=False) as source:
        with pytest.raises(DataError, match=r"token id 4000 .* wanted at most 256.*--verify"):
            read(source)
        with pytest.raises(DataError, match="token id 4000"):
            source.read_rows(np.array([0]), np.empty((1, 2), source.dtype))
