"""Every format, compressed or not, gives the same documents, by one rule; damage is found and named."""

import codecs
import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptperf.data import readers, text
from gptperf.data.documents import Origin
from gptperf.data.readers import STRUCTURED, open_file, read_records
from gptperf.data.text import Refused, Skipped, cut, file_document, text_document
from gptperf.data.walk import Fields, file_documents, folder_documents
from gptperf.errors import DataError, DeviceError

RECORDS = [
    {"text": f'{"x" * (37 * i % 300)} \u00e9\U0001f600 "quoted",\t{i}\n', "repo": f"r{i % 3}"} for i in range(60)
]
TEXTS = [record["text"].encode() for record in RECORDS]


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["repo", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def arrow(kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    data, out = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    if kind == "parquet":
        importlib.import_module("pyarrow.parquet").write_table(data, out, row_group_size=25)
    else:
        ipc = importlib.import_module("pyarrow.ipc")
        with (ipc.new_file if kind == "file" else ipc.new_stream)(out, data.schema) as writer:
            writer.write_table(data, 25)
    return out.getvalue()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
CONTENTS: dict[str, Callable[[], bytes]] = {
    "lines.jsonl": lambda: LINES,
    "LINES.JSONL": lambda: LINES,
    "lines.ndjson": lambda: LINES.removesuffix(b"\n"),
    "utf16.jsonl": lambda: LINES.decode().encode("utf-16"),
    "lines.json": lambda: LINES,
    "array.json": lambda: json.dumps(RECORDS).encode(),
    "pretty.json": lambda: b"\xef\xbb\xbf\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "comma.csv": lambda: table(","),
    "excel.csv": lambda: codecs.BOM_UTF8 + table(","),
    "tab.tsv": lambda: table("\t"),
    "a.parquet": lambda: arrow("parquet"),
    "stream.arrow": lambda: arrow("stream"),
    "file.arrow": lambda: arrow("file"),
}


def zstd(data: bytes) -> bytes:
    """Compresses into two frames, as parallel compressors do."""
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    half = len(data) // 2
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    ".XZ": lzma.compress,
    ".zst": zstd,
}


def read(path: Path, skipped: Skipped | None = None, **fields: str) -> list[tuple[Origin, bytes]]:
    documents = file_documents(path, path.name, Fields(**fields), skipped or Skipped())
    return [(document.origin, b"".join(document.pieces)) for document in documents]


def test_a_file_system_that_reads_less_than_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems may: a document is not taken for whole because its first read is short."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"the whole text\n" * 9)

    def opened(*arguments: Any, **options: Any) -> Any:
        file = io.BytesIO(path.read_bytes())
        read = file.read
        monkeypatch.setattr(file, "read", lambda size: read(min(size, 20)))
        return contextlib.nullcontext(file)

    monkeypatch.setattr("gptperf.data.walk.open", opened, raising=False)
    assert [text for _, text in read(path)] == [b"the whole text\n" * 9]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSIONS[compression](CONTENTS[name]()))
    assert read(path) == [(Origin(path.name, i), text) for i, text in enumerate(TEXTS)]
    groups = [origin.group for origin, _ in read(path, group="repo")]
    assert groups == [record["repo"] for record in RECORDS]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_truncated_file_is_refused_or_ends_with_a_whole_record(tmp_path: Path, name: str, compression: str) -> None:
    content = COMPRESSIONS[compression](CONTENTS[name]())
    path = tmp_path / (name + compression)
    for size in (len(content) // 3, len(content) - 3):
        path.write_bytes(content[:size])
        if name.endswith((".csv", ".tsv")) and not compression and size > len(content) - 10:
            continue  # a table has no end mark: a cut within its last field is not seen
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize("name", ["text.txt", "code.PY", "README", "page.md"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_plain_text_is_one_document(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSIONS[compression]("first\nz\u00fcri \U0001f600".encode()))
    assert read(path) == [(Origin(path.name), "first\nz\u00fcri \U0001f600".encode())]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: found a JSON list, wanted an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', r"element 1: found a JSON int"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"element 0: found '{' after it"),
        ("a.json", b'[{"text": "a"}', r"element 0: not valid JSON \(the array does not end"),
        ("a.json", b'[{"text": "a"}] x', r"found 'x' after the array"),
        ("a.json", b"[" + b"[" * 100_000, r"element 0: not valid JSON"),
        ("a.csv", b"text,n\na,1\nb\n", r"a\.csv:3: found 1 field, wanted 2"),
        ("a.csv", b'text,n\n"a,1\n', r"a\.csv:\d: not a valid table"),
        ("a.csv", b"text,n\n\xff,1\n", r"not a valid table"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: the compressed file is truncated or corrupt"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz: the compressed file is truncated or corrupt"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"content": "a"}\n{"content": "b", "id": 3}\n', "no text in the field 'text'; .* content, id"),
        ("package.json", b'{\n "name": "x",\n "files": []\n}', "no text in the field 'text'; .* files, name"),
        ("a.csv", b"body,n\na,1\n", "no text in the field 'text'; .* body, n"),
        ("a.csv", b"text,n\n", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.txt", b"", "empty"),
        ("a.txt", codecs.BOM_UTF8 + b" \r\n\t", "empty"),
        ("a.txt", b"a\0b", "binary"),
        ("a.txt", b"caf\xe9", "not UTF-8; at offset 3"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "not UTF-16-LE, which its byte-order mark promises"),
        ("a.zip", b"PK", r"format \.zip; unpack it first"),
        ("a.tar.gz", b"", r"format \.tar"),
        ("a.ipynb", b"{}", r"format \.ipynb; Jupyter notebook is not read"),
    ],
)
def test_what_is_no_text_is_refused_with_its_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name == "a.tar.gz" else content)
    with pytest.raises(Refused, match=reason):
        read(tmp_path / name)


@pytest.mark.parametrize("columns", [["body"], ["n"], []])
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columns_without_the_field_are_named(tmp_path: Path, kind: str, columns: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.RECORDS", [dict.fromkeys(columns, "a")] if columns else [{"other": None}])
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    path.write_bytes(arrow(kind))
    with pytest.raises(Refused, match=f"no text in the field 'text'; its fields are {(columns or ['other'])[0]}"):
        read(path)


def test_records_without_text_are_counted(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": None}, {}, {"text": 3}, {"text": " \n"}, {"text": "b\0"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    skipped = Skipped()
    assert read(tmp_path / "a.jsonl", skipped) == [(Origin("a.jsonl", 0), b"a"), (Origin("a.jsonl", 6), b"c")]
    assert skipped.counts == {
        "record: no text in the field 'text'": 3,
        "record: empty": 1,
        "record: binary (contains NUL)": 1,
    }


# One rule for every source.

RULE = [
    (b"a\r\nb\rc\n", b"a\nb\rc\n"),
    (codecs.BOM_UTF8 + b"a", b"a"),
    (codecs.BOM_UTF16_LE + "z\u00fc\U0001f600\r\n".encode("utf-16-le"), "z\u00fc\U0001f600\n".encode()),
    (codecs.BOM_UTF16_BE + "z\u00fc".encode("utf-16-be"), "z\u00fc".encode()),
    (codecs.BOM_UTF32_LE + "z\u00fc".encode("utf-32-le"), "z\u00fc".encode()),
    (b"  a  ", b"  a  "),
]


@pytest.mark.parametrize(("raw", "expected"), RULE)
@pytest.mark.parametrize("piece", [4, 7, 1 << 24])
def test_rule_for_files(tmp_path: Path, raw: bytes, expected: bytes, piece: int, monkeypatch: Any) -> None:
    """The rule does not depend on where a long file is cut."""
    monkeypatch.setattr(text, "PIECE_BYTES", piece)
    (tmp_path / "a.txt").write_bytes(raw)
    [(_, found)] = read(tmp_path / "a.txt")
    assert found == expected


def test_rule_for_records() -> None:
    document = text_document(Origin("a"), "\ufeffa\r\nb\ud800")
    assert b"".join(document.pieces) == b"a\nb?"
    for wrong in ("", " \n", "\ufeff", "a\0"):
        with pytest.raises(Refused):
            text_document(Origin("a"), wrong)


def test_digest_and_size_are_those_of_the_text(tmp_path: Path, monkeypatch: Any) -> None:
    import hashlib

    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"line\r\n" * 1000)
    found = []
    for piece in (100, 1 << 24):
        monkeypatch.setattr(text, "PIECE_BYTES", piece)
        document = file_document(Origin("a"), lambda: open_file(path))
        pieces = list(document.pieces)
        assert (len(pieces) == 1) == (piece > 10_000)
        assert b"".join(pieces) == b"line\n" * 1000
        assert (document.digest, document.size) == (hashlib.sha256(b"line\n" * 1000).digest(), 5000)
        found.append(document.digest)
    assert found[0] == found[1]


@pytest.mark.parametrize("begin", [b"", codecs.BOM_UTF8, b"x", b"xy", b"xyz"])
def test_a_large_file_is_judged_by_its_head_and_read_as_a_whole(begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    whole = begin + "\U0001f600\r\n".encode() * 20_000  # characters and line ends lie across the end of the head
    path.write_bytes(whole)
    document = file_document(Origin("a"), lambda: open_file(path))
    expected = whole.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    assert (b"".join(document.pieces), document.size) == (expected, len(expected))
    for binary in (b"\xff", b"\0"):
        file = io.BytesIO(begin + binary + bytes(5_000_000))
        with pytest.raises(Refused):
            file_document(Origin("a"), lambda file=file: contextlib.nullcontext(file))
        assert file.tell() < 100_000


@pytest.mark.parametrize("content", ["a\n" * 50, "a " * 50, "\u00e9" * 50, "a" * 100, "\U0001f600" * 30, " " * 99])
def test_pieces_end_with_a_line_or_before_a_space_or_with_a_character(content: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 21)
    data = content.encode()
    pieces = list(cut(iter([data[:40], data[40:]])))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= 21 for piece in pieces)
    assert all(piece.decode() for piece in pieces)
    if "\n" in content:
        assert all(piece.endswith(b"\n") for piece in pieces)
    elif content.startswith("a "):
        assert all(piece.startswith(b" ") for piece in pieces[1:])


def test_memory_for_a_large_array_is_that_of_one_element(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(readers, "_READ_BYTES", 64)
    (tmp_path / "a.json").write_bytes(json.dumps(RECORDS).encode())
    assert [record["text"].encode() for record in read_records(tmp_path / "a.json", ("text",))] == TEXTS
    monkeypatch.setattr(readers, "_MAX_RECORD_BYTES", 100)
    with pytest.raises(DataError, match="element"):
        list(read_records(tmp_path / "a.json", ("text",)))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: found a line of more than 100 characters"):
        list(read_records(tmp_path / "a.jsonl", ("text",)))


# Folders.


def walk(root: Path, **fields: str) -> tuple[list[Origin], Skipped]:
    skipped = Skipped()
    documents = folder_documents(root, Fields(**fields), skipped, without=root / "data")
    return [document.origin for document in documents], skipped


def test_a_walk_reads_every_format_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.txt").write_text("written by prepare")
    for name, content in (
        ("b.txt", b"text"),
        ("sub/a.jsonl", LINES),
        ("a.py", b"code"),
        ("c.csv", table(",")),
        ("empty.txt", b""),
        ("blank.md", b" \n"),
        ("image.png", b"PNG\0"),
        ("latin.txt", b"caf\xe9"),
        ("package.json", b'{"name": "x"}'),
        ("torn.jsonl", b'{"text": "a'),
        ("archive.zip", b"PK"),
        (".hidden", b"x"),
        ("sub/d.txt.gz", gzip.compress(b"zipped")),
    ):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    origins, skipped = walk(tmp_path)
    names = list(dict.fromkeys(origin.source for origin in origins))
    assert names == ["a.py", "b.txt", "c.csv", "sub/a.jsonl", "sub/d.txt.gz"]
    assert len(origins) == 3 + 2 * len(RECORDS)
    assert skipped.counts == {
        "file: empty": 2,
        "file: binary (contains NUL)": 1,
        "file: not UTF-8": 1,
        "file: no text in the field 'text'": 1,
        "file: corrupt, or not of the format that the name says": 1,
        "file: format .zip": 1,
        "file: not a regular file": 1,
        "file: unreadable (No such file or directory)": 1,
        "file or folder: hidden": 1,
    }
    assert any("torn.jsonl:1: not valid JSON" in line for line in skipped.lines())


def test_a_missing_package_ends_a_walk_only_for_files_that_are_named_as_its_format(
    tmp_path: Path, monkeypatch: Any
) -> None:
    for module in ("zstandard", "pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "text.txt").write_text("text")
    heads = {".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1", ".arrow": b"ARROW1"}
    for number, head in enumerate(heads.values()):
        (tmp_path / f"{number}.cache").write_bytes(head + bytes(20))
    origins, skipped = walk(tmp_path)
    assert [origin.source for origin in origins] == ["text.txt"]
    assert sum(skipped.counts.values()) == 3
    for suffix, head in heads.items():
        named = tmp_path / f"a.jsonl{suffix.upper()}"
        named.write_bytes(head + bytes(20))
        with pytest.raises(DeviceError, match=re.escape(str(named))):
            walk(tmp_path)
        named.unlink()


def test_a_linked_folder_is_entered_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.txt").write_text("a")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.txt").write_text("b")
    (root / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "linked2").symlink_to(tmp_path / "outside")
    origins, _ = walk(root)
    assert sorted(Path(origin.source).name for origin in origins) == ["a.txt", "b.txt"]


def test_every_suffix_is_tried() -> None:
    assert {Path(name).suffix.lower() for name in CONTENTS} == set(STRUCTURED)
