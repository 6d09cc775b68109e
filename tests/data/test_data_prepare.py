"""Preparation from files: the documents of each source, the choice of validation documents, names, the command."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from data_helpers import TEXTS, below, documents, write_jsonl

from gptperf import prepare as command
from gptperf.data import text as text_rule
from gptperf.data.format import read_manifest
from gptperf.data.prepare import KNOWN, prepare, summary
from gptperf.data.shards import TokenSource, verify
from gptperf.errors import ConfigError, DataError, run_main
from gptperf.formats import counted


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_documents_are_split_by_their_hash_in_any_order() -> None:
    forward = prepare(str(write_jsonl(Path("a.jsonl"), TEXTS)), val_fraction=0.3, quiet=True)
    backward = prepare(str(write_jsonl(Path("b.jsonl"), TEXTS[::-1])), val_fraction=0.3, quiet=True)
    encoded = [text.encode() for text in TEXTS]
    assert documents(forward, "val") == [document for document in encoded if below(document, 0.3)]
    assert documents(forward, "train") == [document for document in encoded if not below(document, 0.3)]
    assert documents(backward, "val") == documents(forward, "val")[::-1]
    assert 40 <= len(documents(forward, "val")) <= 80
    assert read_manifest(forward).val_fraction == 0.3
    assert verify(forward) == sum(len(document) + 1 for document in encoded)


@pytest.mark.parametrize("size", [2, 10, 11, 999, 1000])
def test_single_text_is_split_at_its_tail(size: int) -> None:
    text = bytes(65 + i % 26 for i in range(size))
    Path("text.txt").write_bytes(text)
    path = prepare("text.txt", quiet=True)
    assert path == Path("data/text")
    cut = max(1, int(size * 0.9))  # as nanoGPT cuts
    assert documents(path, "train") == [text[:cut]]
    assert documents(path, "val") == [text[cut:]]
    assert read_manifest(path).split_method == "the tail of the text"


def test_tail_never_cuts_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rule, "PIECE_BYTES", 7)  # pieces end inside of characters and lines, too
    for shift in range(4):
        text = "x" * shift + "a\u00e9\u20ac\U0001f600\n" * 30
        Path("text.txt").write_text(text, encoding="utf-8")
        for percent in range(1, 100, 9):
            path = prepare("text.txt", val_fraction=percent / 100, overwrite=True, quiet=True)
            train, val = documents(path, "train"), documents(path, "val")
            assert train[0].decode() + val[0].decode() == text
            assert 0 <= int(len(text.encode()) * (1 - percent / 100)) - len(train[0]) <= 3


def test_python_stdlib() -> None:
    path = prepare("python_stdlib", quiet=True)
    train, val = documents(path, "train"), documents(path, "val")
    assert Path(json.__file__).read_bytes() in train + val
    assert Path(threading.__file__).read_bytes() in train + val
    manifest = read_manifest(path)
    tokens = [manifest.splits[split].tokens for split in ("train", "val")]
    assert 5e6 < sum(tokens) < 3e7
    assert 0.01 < tokens[1] / sum(tokens) < 0.1
    assert all(below(document, 0.05) for document in val)
    root = Path(os.__file__).parent
    for left_out in ("test/support/__init__.py", "idlelib/pyshell.py", "lib2to3/pytree.py"):
        if (root / left_out).is_file():
            assert (root / left_out).read_bytes() not in train + val
    assert not any(b"import pytest" in document for document in train)  # no site-packages


def test_folder(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path("notes")
    for name, content in {
        "b.txt": b"bee",
        "a/z.md": b"zed",
        "a/a.py": b"ay",
        "a-b/c.txt": b"sea",
        ".hidden": b"no",
        ".git/config": b"no",
        "image.png": b"\x89PNG\r\n\0",
        "latin1.txt": b"caf\xe9",
        "nul.txt": b"a\0b",
        "empty": b"",
        "data/other/manifest.json": b"no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    os.mkfifo(root / "pipe")
    path = prepare("notes", val_fraction=0.5, data_dir="notes/data")
    assert path == Path("notes/data/notes")
    texts = [b"sea", b"ay", b"zed", b"bee"]  # sorted by relative path
    assert documents(path, "train") == [text for text in texts if not below(text, 0.5)]
    assert documents(path, "val") == [text for text in texts if below(text, 0.5)]
    out = capsys.readouterr().out
    for line in (
        "2 files or folders: hidden (first: ",
        "2 files: not UTF-8 (first: ",
        "1 file: binary (contains NUL) (first: nul.txt)",
        "1 file: empty (first: empty)",
        "1 file: not a regular file (first: pipe)",
    ):
        assert f"not read: {line}" in out
    assert all(f" {counted(len(documents(path, split)), 'document')} " in out for split in ("train", "val"))
    assert out.count("  1 shard\n") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "found a JSON list, wanted an object"),
        ("[" * 99999, "JSON"),
    ],
)
def test_bad_json_line_names_file_and_line(line: str, message: str) -> None:
    Path("bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}"):
        prepare("bad.jsonl", quiet=True)
    assert list(Path("data").iterdir()) == []


def test_text_that_is_not_utf8_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("latin1.txt").write_bytes(b"a" * 100 + b"\xe9" + b"a" * 1000)
    with pytest.raises(DataError, match=r"latin1\.txt: found bytes that are not UTF-8 at offset 100"):
        prepare("latin1.txt", quiet=True)
    monkeypatch.setattr(text_rule, "PIECE_BYTES", 50)
    with pytest.raises(DataError, match="at offset 100"):
        prepare("latin1.txt", quiet=True)


@pytest.mark.parametrize("content", [b"", b"a"])
def test_text_too_short(content: bytes) -> None:
    Path("short.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"short\.txt: found (empty, wanted a text|1 byte, wanted at least 2: )"):
        prepare("short.txt", quiet=True)


def test_no_documents() -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match="found no document"):
        prepare("empty", quiet=True)


def test_tiktoken_in_threads_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"do": 256}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    path = prepare(str(write_jsonl(Path("a.jsonl"), TEXTS)), tokenizer="gpt2", val_fraction=0.3, quiet=True)
    manifest = read_manifest(path)
    assert (manifest.dtype, manifest.tokenizer.name, manifest.tokenizer.eot) == ("uint32", "gpt2", 70_000)
    with TokenSource.open(path, "train") as source:
        tokens = np.empty(len(source), source.dtype)
        source.read_into(0, tokens)
    train = [text for text in TEXTS if not below(text.encode(), 0.3)]
    expected = [token for text in train for token in [*encoding.encode_ordinary(text), 70_000]]
    assert tokens.tolist() == expected


def test_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(DataError, match=r"found 'shakespere', .*nearest: 'shakespeare'"):
        prepare("shakespere")
    with pytest.raises(DataError, match="found 'no/such/path'"):
        prepare("no/such/path")
    assert "python_stdlib" in KNOWN


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "-x", "a b", "x" * 65, "\u00e9"])
def test_bad_names(name: str) -> None:
    Path("text.txt").write_text("hello")
    with pytest.raises(DataError, match="--name: found"):
        prepare("text.txt", name=name)
    assert not Path("data").exists()


def run(*args: str) -> None:
    assert command.main(args) == 0


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("hello world " * 20)
    run("text.txt", "--name=hello", "--data_dir=sets", "--val_fraction=0.25", "--shard_tokens=50")
    out = capsys.readouterr().out
    assert "sets/hello: file text.txt; tokenizer byte, uint16" in out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["train", "181"], ["val", "61"]]
    assert [line.split()[-2:] for line in out.splitlines()[1:3]] == [["4", "shards"], ["2", "shards"]]
    run("hello", "--data_dir=sets", "--verify")
    assert capsys.readouterr().out == "sets/hello: 242 tokens match their checksums\n"
    run("text.txt", "--name=hello", "--data_dir=sets", "--overwrite=True")
    assert "217 tokens" in summary("sets/hello", 0.0)


def test_command_errors(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("hello world")
    run("text.txt")
    for args, message in (
        (("text.txt",), "--overwrite=True"),
        (("text.txt", "--overwrite=False"), "--overwrite=True"),
        (("text.txt", "--name=b", "--tokenizer=bite"), "nearest: 'byte'"),
        (("text.txt", "--name=b", "--shard_tokens=0"), "shard_tokens: found 0"),
        (("missing", "--verify"), "no data set 'missing'"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_main(command.main, args)
        assert caught.value.code == 3
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("gptperf: E3: ")
        assert message in lines[0]
    with pytest.raises(ConfigError, match="overwrite: found 'maybe', wanted true or false"):
        run("text.txt", "--overwrite=maybe")
    with pytest.raises(DataError):
        run("text.txt", "--debug")


def test_preparation_does_not_import_torch() -> None:
    code = """
import sys
import gptperf.prepare
assert not {"torch", "numpy", "rich"} & set(sys.modules), "help must be fast"
import gptperf.data.prepare, gptperf.data.ngram
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(command.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
