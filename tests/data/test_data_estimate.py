"""What a preparation will take is said before, is about right, and nothing is written for it."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest

from gptperf import prepare as command
from gptperf.data import estimate
from gptperf.data.format import read_manifest
from gptperf.errors import DataError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(50, 900))) for _ in range(1200)]
    lines = "".join(json.dumps({"text": text, "other": "x" * 300}) + "\n" for text in texts).encode()
    Path("records.jsonl").write_bytes(lines)
    Path("records.jsonl.gz").write_bytes(gzip.compress(lines))
    Path("book.txt").write_text("\n".join(texts))
    Path("mixed/sub").mkdir(parents=True)
    Path("mixed/records.jsonl").write_bytes(lines)
    Path("mixed/sub/image.bin").write_bytes(b"\0" * 2_000_000)
    for number, text in enumerate(texts[:300]):
        Path(f"mixed/sub/{number}.txt").write_text(text + str(number))


def tokens_of(out: str) -> float:
    found = re.search(r"tokens +about ([\d,]+),", out)
    assert found, out
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("what", ["records.jsonl", "records.jsonl.gz", "book.txt", "mixed"])
def test_the_plan_is_about_right_and_writes_nothing(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.walk("."))
    assert command.main([what, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert sorted(os.walk(".")) == before
    assert command.main([what]) == 0
    [path] = Path("data").iterdir()
    tokens = sum(split.tokens for split in read_manifest(path).splits.values())
    assert 0.75 < tokens_of(planned) / tokens < 1.25
    for line in ("disk", "time", "MB free" if "MB free" in planned else "GB free"):
        assert line in planned


@pytest.mark.parametrize("binaries", [".so", ""])
def test_the_plan_sees_many_small_texts_among_large_binaries(binaries: str, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(2)
    for number in range(6):
        path = Path(f"mixed/sub/{number}{binaries}")
        path.touch()
        os.truncate(path, draw.randint(100, 900) * 1_000_000)
    for number in range(50):
        Path(f"mixed/sub/{number}.pdf").write_text("x" * 200_000)  # not read, whatever it has
        Path(f"mixed/sub/{number}.{number}").write_text("another suffix each, " * 30 + str(number))
    assert command.main(["mixed", "--plan"]) == 0
    planned = tokens_of(capsys.readouterr().out)
    assert command.main(["mixed"]) == 0
    tokens = sum(split.tokens for split in read_manifest("data/mixed").splits.values())
    assert 0.75 < planned / tokens < 1.25


@pytest.mark.parametrize(("cores", "text"), [(1, " in 1 thread, "), (2, " in 2 threads, ")])
def test_the_plan_of_one_file_says_one_file(
    cores: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "threads", lambda tokenizer: cores)
    Path("one.txt").write_text("one text\n" * 1000)
    assert command.main(["one.txt", "--plan", "--tokenizer=byte"]) == 0
    planned = capsys.readouterr().out
    assert " in 1 file of " in planned
    assert text in planned


def test_a_plan_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match="--plan: hf:me/set is streamed"):
        command.main(["hf:me/set", "--plan"])
    Path("empty").mkdir()
    with pytest.raises(DataError, match="--plan: found no text in 0 files of empty"):
        command.main(["empty", "--plan"])
