"""The quality of the split: the origin of each document, whole groups held out, copies left out, leaks reported."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import documents

from gptperf.data import dedup, leak, window_search
from gptperf.data.dedup import HashSet
from gptperf.data.documents import DocumentIndex, Origin
from gptperf.data.format import read_manifest
from gptperf.data.leak import measure_leak
from gptperf.data.prepare import prepare
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(seed: int, count: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(count))


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def origins(path: Path, split: str) -> list[Origin]:
    index = DocumentIndex(read_manifest(path), path, split)
    return [index.origin(i) for i in range(len(index))]


def test_the_index_names_the_source_of_every_document() -> None:
    texts = {f"part/{i}.txt": words(i) for i in range(8)}
    for name, text in texts.items():
        Path("corpus", name).parent.mkdir(parents=True, exist_ok=True)
        Path("corpus", name).write_text(text)
    records = [words(100 + i) for i in range(8)]
    write_lines(Path("corpus/records.jsonl"), [{"text": text} for text in records])
    path = prepare("corpus", val_fraction=0.4, quiet=True)
    for split in ("train", "val"):
        index = DocumentIndex(read_manifest(path), path, split)
        found = documents(path, split)
        assert len(found) == len(index) > 0
        for i, text in enumerate(found):
            source, offset, _ = index.origin(i)
            assert text.decode() == (records[offset] if source == "records.jsonl" else texts[source])
            assert int(index.records["bytes"][i]) == len(text)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_single_text_has_two_documents_with_their_offsets(suffix: str) -> None:
    text = words(1).encode()
    Path(f"book.txt{suffix}").write_bytes(gzip.compress(text) if suffix else text)
    path = prepare(f"book.txt{suffix}", quiet=True)
    assert path == Path("data/book")
    [train], [val] = documents(path, "train"), documents(path, "val")
    assert train + val == text
    assert origins(path, "train") == [Origin(f"book.txt{suffix}", 0)]
    assert origins(path, "val") == [Origin(f"book.txt{suffix}", len(train))]


@pytest.mark.parametrize("group_by", ["top_folder", "repo", "field:repo"])
def test_groups_are_held_out_as_a_whole(group_by: str) -> None:
    for repo in range(12):
        if group_by == "field:repo":
            continue
        for file in range(3):
            path = Path(f"corpus/r{repo}/src/f{file}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(words(10 * repo + file))
        Path(f"corpus/r{repo}/.git").mkdir()
    if group_by == "field:repo":
        write_lines(Path("corpus/all.jsonl"), [{"text": words(i), "repo": f"r{i % 12}"} for i in range(36)])
    path = prepare("corpus", group_by=group_by, val_fraction=0.3, quiet=True)
    groups = {split: {origin.group for origin in origins(path, split)} for split in ("train", "val")}
    assert groups["train"] | groups["val"] == {f"r{repo}" for repo in range(12)}
    assert not groups["train"] & groups["val"]
    assert len(origins(path, "train")) == 3 * len(groups["train"])
    assert group_by in read_manifest(path).split_method


@pytest.mark.parametrize(
    ("what", "group_by", "message"),
    [
        ("notes", "folder", "wanted top_folder, repo or field:NAME"),
        ("notes", "field:", "wanted top_folder, repo or field:NAME"),
        ("book.txt", "top_folder", "wanted none: book.txt has no such groups"),
        ("a.jsonl", "repo", "wanted field:NAME: a.jsonl has no such groups"),
        ("python_stdlib", "field:x", "wanted top_folder: python_stdlib"),
        ("a.jsonl", "field:x", "a.jsonl, record 0: found no field 'x'"),
        ("notes", "top_folder", "found 2 documents of one group"),
    ],
)
def test_groups_that_there_are_not(what: str, group_by: str, message: str) -> None:
    write_lines(Path("a.jsonl"), [{"text": words(i)} for i in range(9)])
    Path("book.txt").write_text(words(1))
    Path("notes/one").mkdir(parents=True)
    for i in range(2):
        Path(f"notes/one/{i}.txt").write_text(words(i))
    with pytest.raises(DataError, match=message):
        prepare(what, group_by=group_by, quiet=True)


def test_exact_copies_are_left_out_or_reported(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [words(i) for i in range(40)]
    copies = [*texts, texts[3], *texts[:5], texts[3]]
    write_lines(Path("a.jsonl"), [{"text": text} for text in copies])
    path = prepare("a.jsonl", val_fraction=0.3)
    assert sorted(documents(path, "train") + documents(path, "val")) == sorted(text.encode() for text in texts)
    assert "7 exact copies of documents: removed" in capsys.readouterr().out
    path = prepare("a.jsonl", val_fraction=0.3, dedup="off", name="all")
    assert len(documents(path, "train") + documents(path, "val")) == len(copies)
    assert "7 exact copies of documents: kept" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"--dedup: found 'exat', wanted one of exact, near, off.*nearest: exact"):
        prepare("a.jsonl", dedup="exat", name="other", quiet=True)


def test_near_copies_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(
        "datasketch", reason="the package datasketch (extra data) is not installed", exc_type=ImportError
    )
    texts = [words(i, 400) for i in range(60)]
    near = [text + " one more sentence at the end" for text in texts[:20]]
    far = [words(i, 200) + " " + words(i + 1000, 200) for i in range(20, 40)]  # a third of the shingles in common
    write_lines(Path("a.jsonl"), [{"text": text} for text in [*texts, *near, *far]])
    path = prepare("a.jsonl", val_fraction=0.3, dedup="near")
    found = {text.decode() for text in documents(path, "train") + documents(path, "val")}
    assert found >= {*texts, *far}
    assert len(found & {*near}) <= 2  # 99% of them are found
    assert "near copies of documents: removed" in capsys.readouterr().out


def test_a_set_of_hashes_is_a_set_in_8_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_RECENT", 64)
    draw = np.random.default_rng(1)
    values = [int(value) for value in draw.integers(0, 2**64, 5000, np.uint64)] + [0, 2**64 - 1]
    found = HashSet()
    for value in values:
        assert value not in found
        found.add(value)
        assert value in found
    assert all(value in found for value in values)
    assert not any(value ^ 1 in found for value in values)
    assert sum(part.nbytes for part in found._sorted) <= 8 * len(values)
    assert len(found._sorted) < 10


def test_the_share_of_windows_in_training_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_search, "CHUNK", 50)  # windows lie across chunks
    draw = np.random.default_rng(1)
    train, val = draw.integers(0, 256, 5000), draw.integers(0, 256, 64 * 20 + 30)
    for window, at in ((0, 0), (3, 4936), (4, 117), (11, 2000), (19, 2064)):
        train[at : at + 64] = val[64 * window : 64 * window + 64]
    train[3000:3063] = val[64 * 7 : 64 * 7 + 63]  # one token less than a window
    train[3500:3564] = val[64 * 8 + 1 : 64 * 9 + 1]  # not at the begin of a window
    val[64 * 12 : 64 * 13] = val[64 * 11 : 64 * 12]  # twice in validation
    options = {"tokenizer": ByteTokenizer(), "source": "", "val_fraction": 0.2, "split_method": "", "shard_tokens": 999}
    with ShardWriter("set", **options) as writer:  # type: ignore[arg-type]
        writer.add("train", train)
        writer.add("val", val)
    assert measure_leak(Path("set")) == leak.Leak(20, 6, 1.0)
    with monkeypatch.context() as patch:  # equal hashes are not enough: tokens are compared
        patch.setattr(window_search, "rolling_hashes", lambda tokens, width: np.zeros(len(tokens) - 63, np.uint64))
        assert measure_leak(Path("set")).found == 6
    monkeypatch.setattr(leak, "_MOST_TOKENS", 1000)
    part = measure_leak(Path("set"))
    assert part.found <= 6
    assert 0.15 < part.searched < 0.25
    assert "at least: " in part.line()
    monkeypatch.setattr(leak, "_MOST_WINDOWS", 7)
    assert measure_leak(Path("set")).windows == 7


def test_the_leak_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = words(1, 500)
    Path("book.txt").write_text(text + text[: len(text) // 4])
    prepare("book.txt", val_fraction=0.2)
    assert "90.00% of 10 validation windows of 64 tokens occur verbatim in training" in capsys.readouterr().out
    Path("short.txt").write_text("some words")
    prepare("short.txt")
    assert "windows" not in capsys.readouterr().out
