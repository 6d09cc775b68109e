"""A preparation that is killed goes on where it was, with the same bytes at the end."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import in_child
from tokenizer_helpers import CORPUS

from gptperf.data import pipeline
from gptperf.data import text as text_rule
from gptperf.data.prepare import prepare
from gptperf.data.shards import verify
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError

OPTIONS: dict[str, Any] = {"name": "set", "quiet": True, "shard_tokens": 5000, "val_fraction": 0.3}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(text_rule, "PIECE_BYTES", 1000)  # so that long documents have several parts
    draw = random.Random(1)
    texts = [text.decode() for text in CORPUS]
    texts.insert(30, " ".join(texts[:9]))
    texts += draw.sample(texts, 5)  # copies
    Path("records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("book.txt").write_text("\n".join(texts))
    for number, text in enumerate(texts):
        folder = Path(f"files/f{number % 7}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(text)


def killed_after(writes: int, monkeypatch: pytest.MonkeyPatch, what: str, **options: Any) -> int:
    """Prepares in a child that is killed after so many parts; returns its exit status."""

    def work() -> None:
        real, count = ShardWriter.append, 0

        def append(self: ShardWriter, *args: Any) -> None:
            nonlocal count
            count += 1
            if count > writes:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "append", append)
            prepare(what, **OPTIONS | options)

    return in_child(work)


def content(path: Path) -> dict[str, bytes]:
    return {entry.relative_to(path).as_posix(): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


def encoded_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    total, real = 0, pipeline._encode

    def counting(task: list[Any], tokenizer: Any) -> Any:
        nonlocal total
        total += sum(len(part.text) for part in task)
        return real(task, tokenizer)

    monkeypatch.setattr(pipeline, "_encode", counting)
    return lambda: total


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("records.jsonl", {}),
        ("book.txt", {}),
        ("files", {"group_by": "top_folder", "dedup": "off"}),
        ("records.jsonl", {"tokenizer": "train:300"}),
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    what: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tokenizer" in options:
        pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    expected = content(prepare(what, data_dir="whole", **OPTIONS | options))
    for writes in (1, 2, 14) if what == "book.txt" else (1, 2, 31, 33, 60):
        assert killed_after(writes, monkeypatch, what, **options) == -signal.SIGKILL
        assert killed_after(3, monkeypatch, what, **options) == -signal.SIGKILL  # and again
        with monkeypatch.context() as patch:
            total = encoded_bytes(patch)
            path = prepare(what, **OPTIONS | options)
            assert total() < sum(map(len, CORPUS)) * 1.5 * (1 - (writes + 2) / 100)
        assert content(path) == expected
        assert [entry.name for entry in Path("data").iterdir()] == ["set"]
        for entry in sorted(path.rglob("*"), reverse=True):
            entry.unlink() if entry.is_file() else entry.rmdir()
        path.rmdir()


def change_text() -> None:
    text = Path("records.jsonl").read_text()
    Path("records.jsonl").write_text(text.replace("the", "teh", 1))


def shorten_text() -> None:
    Path("records.jsonl").write_text("\n".join(Path("records.jsonl").read_text().splitlines()[:9]))


def flip_a_byte() -> None:
    [shard] = Path("data").glob(".set.tmp-*/train_00000.bin")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)


def cut_the_index() -> None:
    [index] = Path("data").glob(".set.tmp-*/train_documents.bin")
    os.truncate(index, 10)


@pytest.mark.parametrize("harm", [change_text, shorten_text, flip_a_byte, cut_the_index])
def test_work_that_does_not_fit_is_not_used(harm: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_after(40, monkeypatch, "records.jsonl") == -signal.SIGKILL
    harm()
    path = prepare("records.jsonl", **OPTIONS)
    assert content(path) == content(prepare("records.jsonl", data_dir="whole", **OPTIONS))
    assert [entry.name for entry in Path("data").iterdir()] == ["set"]


def test_other_options_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_after(40, monkeypatch, "records.jsonl") == -signal.SIGKILL
    other = OPTIONS | {"val_fraction": 0.4}
    path = prepare("records.jsonl", **other)
    assert content(path) == content(prepare("records.jsonl", data_dir="whole", **other))
    assert [entry.name for entry in Path("data").iterdir()] == ["set"]


def test_the_work_on_another_data_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_after(40, monkeypatch, "records.jsonl", name="a") == -signal.SIGKILL
    prepare("book.txt", **OPTIONS | {"name": "b"})
    with monkeypatch.context() as patch:
        total = encoded_bytes(patch)
        assert verify(prepare("records.jsonl", **OPTIONS | {"name": "a"}))
        assert total() < sum(map(len, CORPUS)) * 0.8
    assert sorted(entry.name for entry in Path("data").iterdir()) == ["a", "b"]


def test_an_error_late_in_the_source_loses_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Path("records.jsonl").read_text()
    Path("records.jsonl").write_text(good + "{\n")
    monkeypatch.setattr(pipeline, "_IN_FLIGHT_BYTES", 1)
    monkeypatch.setattr(pipeline, "_TASK_BYTES", 1)
    with pytest.raises(DataError, match=r"records\.jsonl:67: not valid JSON"):
        prepare("records.jsonl", **OPTIONS)
    Path("records.jsonl").write_text(good)
    total = encoded_bytes(monkeypatch)
    path = prepare("records.jsonl", **OPTIONS)
    assert total() < sum(map(len, CORPUS)) * 0.2
    assert content(path) == content(prepare("records.jsonl", data_dir="whole", **OPTIONS))


def test_any_number_of_cores_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    found = []
    for cores in (1, 3, 16):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        path = prepare("files", data_dir=f"cores{cores}", tokenizer="train:300", **OPTIONS)
        found.append(content(path))
    assert found[0] == found[1] == found[2]
