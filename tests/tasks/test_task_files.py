"""Task files of every format, and one line for each mistake in them."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_helpers import ARC, ARC_HUB, ASKED, CHOICES, CONTEXTS, HELLASWAG, PIQA, TARGET, WINOGRANDE, write_lines

from gptperf.errors import DataError
from gptperf.tasks import load_tasks


@pytest.mark.parametrize("name", ASKED)
def test_a_record_becomes_the_prompt_of_its_benchmark(name: str, tmp_path: Path) -> None:
    record, pairs, answer = ASKED[name]
    (task,) = load_tasks([write_lines(tmp_path / f"{name}.jsonl", [record, record | {"id": 3}])])
    first, second = task.items
    assert (list(first.pairs), first.answer) == (pairs, answer)
    assert second.pairs == first.pairs
    assert (first.where, second.where) == (f"{tmp_path / name}.jsonl:1", f"{tmp_path / name}.jsonl:2")
    assert len(first.sizes) == len(pairs)
    if task.kind == "choice":
        assert first.sizes == tuple(len(text.strip()) for _, text in pairs)
    assert pairs[answer][1].strip() in first.passage
    assert not first.passage.startswith("Question:")


def test_an_answer_is_a_number_or_the_choice_itself(tmp_path: Path) -> None:
    records = [CHOICES | {"answer": 2}, CHOICES | {"answer": "many"}, CHOICES | {"choices": ["4", "0"], "answer": "0"}]
    (task,) = load_tasks([write_lines(tmp_path / "own.jsonl", records)])
    assert [item.answer for item in task.items] == [2, 2, 1]
    sizes = load_tasks([write_lines(tmp_path / "u.jsonl", [CHOICES | {"choices": ["4", "\u00e9\u00e9"]}])])[0].items[0]
    assert sizes.sizes == (1, 4)  # bytes, not characters


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "a.jsonl": write_lines,
    "a.json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "one.json": lambda path, records: path.write_text("\n".join(map(json.dumps, records))),
    "a.jsonl.gz": lambda path, records: path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode())),
    "a.ndjson.xz": lambda path, records: path.write_bytes(lzma.compress("\n".join(map(json.dumps, records)).encode())),
    "bom.jsonl": lambda path, records: path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8-sig"),
    "crlf.jsonl": lambda path, records: path.write_bytes("\r\n\r\n".join(map(json.dumps, records)).encode()),
    "wide.jsonl": lambda path, records: path.write_bytes("\n".join(map(json.dumps, records)).encode("utf-16")),
    "plain.jsonl": lambda path, records: path.write_text(
        "\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8"
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_may_be_compressed_and_have_any_line_ends_and_encoding(name: str, tmp_path: Path) -> None:
    records = [HELLASWAG | {"activity_label": f"\u00e4 \U0001f600 {number}"} for number in range(3)]
    WRITERS[name](tmp_path / name, records)
    (task,) = load_tasks([tmp_path / name])
    assert task.name == name.partition(".")[0]
    assert [item.pairs[0][0] for item in task.items] == [
        f"\u00e4 \U0001f600 {number}: A man is sitting. He" for number in range(3)
    ]


@pytest.mark.parametrize("record", [ARC, ARC_HUB, HELLASWAG, CHOICES, CONTEXTS, TARGET])
def test_parquet(record: dict[str, Any], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([record] * 2), tmp_path / "a.parquet")
    (task,) = load_tasks([tmp_path / "a.parquet"])
    (same,) = load_tasks([write_lines(tmp_path / "a.jsonl", [record] * 2)])
    assert [item._replace(where="") for item in task.items] == [item._replace(where="") for item in same.items]


def test_plain_text_has_a_passage_a_line(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbfone two three\r\n\r\n  four five  \r\n")
    (task,) = load_tasks([tmp_path / "l.txt"])
    assert task.kind == "target"
    assert [item.pairs[0] for item in task.items] == [("one two", " three"), ("  four", " five")]
    assert [item.where.rpartition(":")[2] for item in task.items] == ["1", "3"]


def test_answers_of_piqa_may_be_in_a_file_beside_it(tmp_path: Path) -> None:
    bare = {key: value for key, value in PIQA.items() if key != "label"}
    path = write_lines(tmp_path / "valid.jsonl", [bare, bare])
    with pytest.raises(
        DataError,
        match=r"valid\.jsonl: found no label in its records, wanted one there or in .*valid-labels\.lst: No su",
    ):
        load_tasks([path])
    for text, wrong in (
        ("1\n0\n", None),
        ("1\n", r"valid\.jsonl:2: label: found 'no answer on this line', wanted a number from 0 to 1"),
        ("1\n0\n1\n", r"valid-labels\.lst: found more labels than the 2 items"),
        ("1\n2\n", r"valid\.jsonl:2: label: found '2', wanted a number from 0 to 1"),
    ):
        (tmp_path / "valid-labels.lst").write_text(text)
        if wrong is None:
            assert [item.answer for item in load_tasks([path])[0].items] == [1, 0]
        else:
            with pytest.raises(DataError, match=wrong):
                load_tasks([path])


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


MISTAKES: list[tuple[list[Any], str]] = [
    ([], "found no item"),
    (
        [without(HELLASWAG, "label")],
        ":1: found the fields .*; wanted those of one format .*; nearest: HellaSwag, which has activity_label, ctx_a",
    ),
    ([PIQA, WINOGRANDE], ":2: found the fields 'sentence'.*; wanted those of PIQA, as before it; nearest: PIQA, which"),
    ([{"a": 1}], ":1: found the fields 'a'; wanted those of one format .*target.$"),
    ([CHOICES | TARGET], ":1: found the fields .* which are those of choices and target; wanted those of one format"),
    ([HELLASWAG | {"label": 4}], ":1: label: found 4, wanted a number from 0 to 3"),
    ([HELLASWAG | {"label": ""}], ":1: label: found '', wanted a number .*; a file without answers cannot be scored"),
    ([HELLASWAG | {"label": True}], ":1: label: found True, wanted a number"),
    ([HELLASWAG | {"label": 1.0}], r":1: label: found 1\.0, wanted a number"),
    ([HELLASWAG | {"endings": ["a", "b", "[all a note]"]}], r":1: endings\[2\]: found '', wanted a text that is not"),
    ([PIQA, PIQA | {"label": -1}], ":2: label: found -1, wanted a number from 0 to 1; a file without answers"),
    ([PIQA | {"sol1": 3}], ":1: sol1: found 3, wanted a text"),
    ([PIQA | {"sol2": PIQA["sol1"]}], r":1: found the right answer 'Turn the lid\.' as the choices 0 and 1"),
    ([WINOGRANDE | {"sentence": "no blank"}], ":1: sentence: found 'no blank', wanted a blank _ with text after it"),
    ([WINOGRANDE | {"answer": "3"}], ":1: answer: found '3', wanted a number from 1 to 2"),
    ([ARC | {"answerKey": "D"}], ":1: answerKey: found 'D', wanted one of A, B, C"),
    ([ARC | {"question": {"stem": "x"}}], r":1: found no field 'question\.choices', which an item"),
    ([ARC | {"question": 3}], ":1: question: found 3, wanted an object with 'stem'"),
    ([ARC_HUB | {"choices": {"text": ["a", "b"], "label": ["1"]}}], r":1: choices\.label: .* wanted 2 labels"),
    ([CHOICES | {"choices": []}], r":1: choices: found \[\], wanted two or more choices"),
    ([CHOICES | {"choices": "abc"}], ":1: choices: found 'abc', wanted a list of texts"),
    ([CHOICES | {"choices": ["4", " "]}], r":1: choices\[1\]: found ' ', wanted a text that is not blank"),
    ([CHOICES | {"choices": ["4", "4"], "answer": 1}], r":1: found the right answer '4' as the choices 0 and 1"),
    ([CHOICES | {"answer": 3}], ":1: answer: found 3, wanted a number from 0 to 2"),
    ([CHOICES | {"answer": "four"}], ":1: answer: found 'four', wanted one of the choices, or a number from 0 to 2"),
    ([CHOICES | {"answer": None}], ":1: answer: found None, wanted a number from 0 to 2"),
    ([TARGET | {"target": ""}], ":1: target: found '', wanted a text that is not blank"),
    ([{"text": "word"}], ":1: text: found 'word', wanted a passage of several words"),
    ([["a"]], ":1: found a JSON list, wanted an object"),
]


@pytest.mark.parametrize(("records", "wrong"), MISTAKES)
def test_a_mistake_is_one_line_with_its_place(records: list[Any], wrong: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "task.jsonl", records)
    with pytest.raises(DataError, match=rf"^{path}.*{wrong}") as caught:
        load_tasks([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.jsonl", b'{"prompt": 1\n', ":1: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a", "target": "b"}\n{"prompt": "a"', ":2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a", "target": "b"}\n\xff\n', ":2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "target": "b"}\n', mtime=0)[:-9], "truncated or corrupt"),
        ("a.json", b"[1]", ": element 0: found a JSON int, wanted an object"),
        ("a.md", b"# text", r": found the suffix '\.md', wanted one of \.jsonl"),
        ("a.csv", b"prompt,target\na\n", ":2: found 1 field, wanted 2"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, content: bytes, wrong: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path / name}.*{wrong}") as caught:
        load_tasks([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_have_one_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"^{path}: (cannot be read: No such file|found the suffix|cannot be read)"):
            load_tasks([path])
    for folder in ("arc", "piqa"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "dev.jsonl", [TARGET])
    tasks = load_tasks([tmp_path / "arc" / "dev.jsonl", tmp_path / "piqa" / "dev.jsonl"])
    assert [task.name for task in tasks] == ["arc/dev", "piqa/dev"]
    with pytest.raises(DataError, match="a second task of the name 'arc/dev'"):
        load_tasks([tmp_path / "arc" / "dev.jsonl"] * 2)


def test_a_limit_takes_items_evenly(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [TARGET | {"target": f"t{number}"} for number in range(10)])
    for most, wanted in ((1, [0]), (4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))):
        (task,) = load_tasks([path], most)
        assert [item.pairs[0][1] for item in task.items] == [f" t{number}" for number in wanted]
