"""Token files of nanoGPT, llm.c and modded-nanogpt: converted to the same tokens, or refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import SMALL, run, run_log

from gptperf import prepare
from gptperf.data.documents import DocumentIndex
from gptperf.data.foreign import convert
from gptperf.data.format import read_manifest
from gptperf.data.shards import TokenSource, resolve_dataset, verify
from gptperf.errors import ConfigError, DataError

EOT = 40
DOCUMENTS = [[1, 2, 3], [4], [], [39] * 50, [5, 6]]


def header(count: int, magic: int = 20240520, version: int = 1) -> bytes:
    values = np.zeros(256, "<i4")
    values[:3] = magic, version, count
    return values.tobytes()


def llm_c(path: Path, tokens: list[int], dtype: str = "<u2", **changes: int) -> None:
    kind = {} if dtype == "<u2" else {"magic": 20240801, "version": 7}
    path.write_bytes(header(len(tokens), **kind | changes) + np.array(tokens, dtype).tobytes())


def after(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (*document, EOT)]


def before(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (EOT, *document)]


def read(path: Path, split: str) -> list[int]:
    with TokenSource.open(path, split) as source:
        out = np.empty(len(source), source.dtype)
        source.read_into(0, out)
    return out.tolist()


def converted(folder: Path, **options: Any) -> Path:
    keys = {"tokenizer": "ids:41", "eot": str(EOT), "data_dir": folder / "data", "name": "set", "quiet": True}
    return convert(f"bin:{folder}", **keys | options)


@pytest.fixture(params=["nanogpt", "nanogpt32", "llm.c", "llama3"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder of token files, the training split in two files that cut a document in llm.c's formats."""
    options: dict[str, Any] = {}
    if request.param.startswith("nanogpt"):
        dtype = "<u2" if request.param == "nanogpt" else "<u4"
        for split in ("train", "val"):
            (tmp_path / f"{split}.bin").write_bytes(np.array(after(DOCUMENTS), dtype).tobytes())
        options = {} if dtype == "<u2" else {"dtype": "uint32"}
    else:
        dtype, stream = "<u2" if request.param == "llm.c" else "<u4", before(DOCUMENTS)
        llm_c(tmp_path / "fineweb_train_000002.bin", stream[20:], dtype)
        llm_c(tmp_path / "fineweb_train_000001.bin", stream[:20], dtype)
        llm_c(tmp_path / "fineweb_val_000000.bin", stream, dtype)
    return tmp_path, options


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_same_tokens_in_the_same_documents(
    chunk: int, written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = written
    monkeypatch.setattr("gptperf.data.foreign._CHUNK", chunk)
    path = converted(folder, **options, shard_tokens=13)
    for split in ("train", "val"):
        assert read(path, split) == after(DOCUMENTS)
        manifest = read_manifest(path)
        assert manifest.splits[split].documents == len(DOCUMENTS)
        index = DocumentIndex(manifest, path, split)
        for i, document in enumerate(DOCUMENTS):
            source, offset, _ = index.origin(i)
            if document:
                raw = (folder / source).read_bytes()
                itemsize = 4 if options or raw[:4] == header(0, 20240801)[:4] else 2
                begin = (0 if "fineweb" not in source else 1024) + offset * itemsize
                assert int.from_bytes(raw[begin : begin + itemsize], "little") == document[0]
    verify(path)


def test_a_last_document_without_an_end_gets_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.array([1, EOT, 2, 3], "<u2").tobytes())
    assert read(converted(tmp_path), "train") == [1, EOT, 2, 3, EOT]


def test_ids_without_an_end_of_a_document_are_one_document(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.arange(41, dtype="<u2").tobytes())
    path = converted(tmp_path, eot=None)
    assert read(path, "train") == [*range(42)]
    assert read_manifest(path).tokenizer.vocab_size == 42


def test_documents_are_held_out_by_their_hash(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, 6).tolist() for _ in range(400)]
    (tmp_path / "train.bin").write_bytes(np.array(after(documents + documents[:50]), "<u2").tobytes())
    with pytest.raises(DataError, match=r"found no file with val in its name, wanted one; or --val_fraction"):
        converted(tmp_path)
    path = converted(tmp_path, val_fraction=0.3)
    splits = {split: read(path, split) for split in ("train", "val")}
    assert sorted(splits["train"] + splits["val"]) == sorted(after(documents + documents[:50]))
    assert 0.2 < len(splits["val"]) / sum(map(len, splits.values())) < 0.4
    as_text = {split: {tuple(tokens[i : i + 6]) for i in range(0, len(tokens), 7)} for split, tokens in splits.items()}
    assert not as_text["train"] & as_text["val"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"found 1,157 bytes, wanted 1,158 for the 67 tokens of its header"),
        (lambda raw: raw + b"\0\0", r"found 1,160 bytes, wanted 1,158"),
        (lambda raw: header(1 << 30) + raw[1024:], r"wanted 2,147,484,672 for"),
        (lambda raw: header(67, version=2) + raw[1024:], r"found version 2 of the format 20240520, wanted 1"),
        (lambda raw: raw[3::-1] + raw[4:], r"big-endian order, wanted little-endian"),
        (lambda raw: raw[:1030] + b"\x29\0" + raw[1032:], r"found the id 41 as token 3, wanted ids below 41"),
        (lambda raw: b"", r"found 0 bytes, wanted a multiple of 2"),
        (lambda raw: raw[1024:] + b"\0", r"found 135 bytes, wanted a multiple of 2, the bytes of a uint16"),
        (lambda raw: np.array(after(DOCUMENTS), "<u4").tobytes(), r"seem to be uint32; wanted --dtype=uint32"),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    stream = before([*DOCUMENTS, [1]])
    assert len(stream) == 63
    llm_c(tmp_path / "x_val.bin", [*stream, 1, 2, 3, 4])
    llm_c(tmp_path / "x_train.bin", [*stream, 1, 2, 3, 4])
    raw = (tmp_path / "x_train.bin").read_bytes()
    (tmp_path / "x_train.bin").write_bytes(damage(raw))
    with pytest.raises(DataError, match=message):
        converted(tmp_path)
    assert not (tmp_path / "data" / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "byte"}, r"found 'byte', wanted the tokenizer that made the ids, such as gpt2, or ids:N"),
        ({"tokenizer": "ids:0"}, r"found 'ids:0', wanted ids:N"),
        ({"tokenizer": "ids:x"}, r"found 'ids:x', wanted ids:N"),
        ({"eot": "41"}, r"--eot: found '41', wanted an id below 41; nearest: --eot=40"),
        ({"dtype": "uint32"}, r"found 122 bytes, wanted a multiple of 4, the bytes of a uint32"),
        ({"val_fraction": 0.1}, r"--val_fraction: found 0.1, wanted none"),
        ({"name": "a/b"}, r"--name: found 'a/b'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.array(after(DOCUMENTS), "<u2").tobytes())
    with pytest.raises(DataError, match=message):
        converted(tmp_path, **options)


def test_a_type_that_the_header_denies_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        llm_c(tmp_path / f"x_{split}.bin", before(DOCUMENTS))
    with pytest.raises(DataError, match="found 'uint32', wanted none or uint16, as in the header"):
        converted(tmp_path, dtype="uint32")


def test_a_run_on_the_files_themselves_is_told_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=rf"prepare bin:{tmp_path} --name={tmp_path.name}-tokens --tokenizer=TOKENIZER"):
        resolve_dataset(str(tmp_path), "data")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


def test_the_command_and_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was recognised is printed; meta.pkl is not read; a run trains on the ids, and prints no sample."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(rng.integers(0, 65, 3000).astype("<u2").tobytes())
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    argv = [f"bin:{tmp_path}", "--tokenizer=ids:65", f"--data_dir={tmp_path / 'data'}", "--name=chars"]
    assert prepare.main(argv) == 0
    printed = capsys.readouterr().out
    assert f"train: {tmp_path}/train.bin: nanoGPT (no header), uint16, 3,000 tokens" in printed
    assert "val: 3,001 tokens, 1 document" in printed
    with pytest.raises(DataError, match=r"--text_field: found 'text', wanted none: bin:"):
        prepare.main([*argv, "--text_field=text"])
    with pytest.raises(DataError, match=r"--dtype: found 'uint16', wanted none"):
        prepare.main(["python_stdlib", "--dtype=uint16"])
    with pytest.raises(ConfigError, match=r"dtype.*uint16"):
        prepare.main([*argv, "--dtype=int16"])
    (tmp_path / "small.toml").write_text(SMALL)
    assert run(tmp_path, tmp_path / "out", "--dataset=chars", "--max_iters=2") == 0
    assert "the run will print no sample of text: tokenizer 'ids:66': these ids have no vocabulary" in (
        capsys.readouterr().out
    )
    assert run_log(tmp_path / "out")["startup_info"]["tokenizer"] == "ids:66"
