"""Items that the training data contains: against a search token by token, with their documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import run
from task_helpers import PIQA, TARGET, write_lines
from tokenizer_helpers import CORPUS

from gptperf.data import window_search
from gptperf.data.mixture import open_tokens, parts_of
from gptperf.data.prepare import prepare
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.window_search import NOWHERE, WindowSearch, chunks_of, rolling_hashes, search
from gptperf.distributed.process import Process
from gptperf.errors import DataError
from gptperf.evaluate.__main__ import main
from gptperf.evaluate.contained import find_contained, ngram_tokens
from gptperf.tasks import load_tasks

SMALL = st.lists(st.integers(0, 2), max_size=24).map(lambda ids: np.array(ids, np.uint16))


class Stored:
    """Tokens in memory in place of those of a data set."""

    dtype = np.dtype("<u2")

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        out[:] = self._tokens[offset : offset + len(out)]


@settings(max_examples=200, deadline=None)
@given(SMALL, st.lists(SMALL, min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 30), st.booleans())
def test_every_window_is_found_where_it_is_first(
    tokens: np.ndarray, texts: list[np.ndarray], width: int, chunk: int, collide: bool
) -> None:
    """In chunks of any size, and even if all hashes are equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_search, "CHUNK", chunk)
        if collide:
            patch.setattr(window_search, "rolling_hashes", lambda ids, n: np.zeros(max(len(ids) - n + 1, 0), np.uint64))
        windows, other = WindowSearch(texts, width), WindowSearch(texts, 3)
        source: Any = Stored(tokens)
        search(source, [windows, other], chunks_of(source, min(width, 3)))
    for one in (windows, other):
        size = one.width
        wanted = [
            next((at for at in range(len(tokens) - size + 1) if (tokens[at : at + size] == part).all()), NOWHERE)
            for text in texts
            for part in (text[i : i + size] for i in range(len(text) - size + 1))
        ]
        assert one.first.tolist() == wanted
        owners = [number for number, text in enumerate(texts) for _ in range(len(text) - size + 1)]
        assert one.text_of.tolist() == owners


@given(st.lists(st.integers(0, 65535), max_size=60), st.integers(1, 40))
def test_a_hash_depends_on_the_tokens_of_its_window_alone(ids: list[int], width: int) -> None:
    tokens = np.array(ids, np.uint16)
    hashes = rolling_hashes(tokens, width)
    assert len(hashes) == max(len(ids) - width + 1, 0)
    for at, value in enumerate(hashes):
        window = tokens[at : at + width].copy()
        assert rolling_hashes(window, width).tolist() == [value]
        window[value % width] ^= 1  # any one token
        assert rolling_hashes(window, width).tolist() != [value]


WORDS = np.array([f"w{number}" for number in range(5000)])


def text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of six documents in two files; every one of them is in the training split but one."""
    documents = [text(seed, 300) for seed in range(12)]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents[:6])
    write_jsonl(tmp_path / "in" / "b.jsonl", documents[6:])
    prepare(str(tmp_path / "in"), data_dir=tmp_path, name="d", quiet=True, val_fraction=0.2, shard_tokens=1000)
    return tmp_path


def contained(folder: Path, paths: list[Path], ngram: int | None = None, dataset: str = "d") -> Any:
    tasks, tokenizer = load_tasks(paths), ByteTokenizer()
    parts = parts_of(open_tokens(dataset, folder, "train"))
    size = ngram or ngram_tokens(tasks, tokenizer)
    return find_contained(tasks, tokenizer, parts, size, Process(0, 1, torch.device("cpu")))


def test_an_item_is_contained_where_its_text_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_search, "CHUNK", 500)
    (source,) = parts_of(open_tokens("d", data, "train"))
    stream = np.empty(len(source.source), source.source.dtype)
    source.source.read_into(0, stream)
    train = bytes(stream[stream < 256].astype(np.uint8))
    records, wanted = [], []
    for seed in range(12):
        words = text(seed, 300).split()
        for prompt, target in (
            (words[20:50], words[50]),  # word for word
            ([*words[20:30], "other", *words[31:50]], words[50]),  # 19 words of it
            ([*words[20:30], "other", *words[31:36], "another", *words[37:45]], "x"),  # at most 10 words of it
            (words[100:102], words[102]),  # shorter than an n-gram
        ):
            records.append({"prompt": " ".join(prompt), "target": target})
            passage = f"{records[-1]['prompt']} {target}".encode()
            wanted.append(passage)
    path = write_lines(data / "t.jsonl", records)
    found = contained(data, [path])
    size = found["ngram"]
    assert size == round(13 * sum(map(len, wanted)) / sum(len(passage.split()) for passage in wanted))
    hit = [any(passage[i : i + size] in train for i in range(max(len(passage) - size + 1, 1))) for passage in wanted]
    of_task = found["tasks"]["t"]
    assert [one["number"] for one in of_task["hits"]] == [number for number, yes in enumerate(hit) if yes]
    assert (of_task["items"], of_task["contained"], of_task["share"]) == (48, sum(hit), sum(hit) / 48)
    assert {sum(hit[i::4]) for i in (0, 1, 3)} == {hit[::4].count(True)}
    assert not any(hit[2::4])
    for one in of_task["hits"]:
        seed = one["number"] // 4
        (document,) = one["documents"]
        assert document == {"dataset": "d", "source": f"{'ab'[seed // 6]}.jsonl", "offset": seed % 6, "group": ""}
        assert one["item"] == f"{path}:{one['number'] + 1}"
        if one["number"] % 4 == 0:
            assert one["found"] >= one["ngrams"] - 1  # all but the one with a space before it may be


def test_the_right_answer_is_looked_for_without_the_words_of_the_prompt(data: Path) -> None:
    """The goal alone, with its wrong answer, is not what the data has."""
    for seed in range(12):
        words = text(seed, 300).split()
        goal, right, wrong = " ".join(words[:9]), " ".join(words[9:14]), " ".join(words[200:205])
        paths = [
            write_lines(data / f"{name}.jsonl", [PIQA | {"goal": goal, "sol1": right, "sol2": wrong, "label": label}])
            for name, label in (("right", 0), ("wrong", 1))
        ]
        found = contained(data, paths, ngram=60)["tasks"]
        assert found["wrong"]["contained"] == 0
        if found["right"]["contained"]:
            return
    raise AssertionError("no document is in the training split")


def test_a_passage_is_found_after_a_space(tmp_path: Path) -> None:
    """Its first word is another token at the start of a text than inside of one."""
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    from gptperf.data.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer("train:400", CORPUS)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    (tmp_path / "a.txt").write_text("one covers the tokenizer's fingerprint and more " * 20)
    prepare(
        str(tmp_path / "a.txt"), data_dir=tmp_path, name="d", tokenizer=str(tmp_path / "tokenizer.json"), quiet=True
    )
    assert tokenizer.encode("covers")[0] != tokenizer.encode(" covers")[0]
    path = write_lines(tmp_path / "t.jsonl", [TARGET | {"prompt": "covers the", "target": "tokenizer's"}])
    parts = parts_of(open_tokens("d", tmp_path, "train"))
    found = find_contained(load_tasks([path]), tokenizer, parts, 50, Process(0, 1, torch.device("cpu")))
    (hit,) = found["tasks"]["t"]["hits"]
    assert (hit["found"], hit["ngrams"]) == (1, 2)


def test_ranks_share_the_search(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ranks looks through every other chunk, and both know what either found."""
    monkeypatch.setattr(window_search, "CHUNK", 500)
    path = write_lines(data / "t.jsonl", [TARGET | {"prompt": " ".join(text(s, 300).split()[:40])} for s in range(12)])
    tasks, parts, seen = load_tasks([path]), parts_of(open_tokens("d", data, "train")), list[Any]()
    whole = contained(data, [path], 40)

    class Rank(Process):
        def gather(self, value: Any) -> list[Any]:
            seen.append(value.copy())
            return seen[-2:]

    found = [find_contained(tasks, ByteTokenizer(), parts, 40, Rank(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    assert found[1] == whole
    assert whole["tasks"]["t"]["contained"] > found[0]["tasks"]["t"]["contained"] > 0


def test_of_a_mixture_each_data_set_is_searched(data: Path) -> None:
    (data / "own.txt").write_text(text(99, 400))
    prepare(str(data / "own.txt"), data_dir=data, name="own", quiet=True)
    path = write_lines(data / "t.jsonl", [{"prompt": " ".join(text(99, 400).split()[:30]), "target": "x"}])
    (hit,) = contained(data, [path], dataset="d:1,own:2")["tasks"]["t"]["hits"]
    assert hit["documents"] == [{"dataset": "own", "source": "own.txt", "offset": 0, "group": ""}]


def test_the_command_says_it_and_scores_the_others(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, tmp_path / "out", "--max_iters=1", "--sample_tokens=0") == 0
    words = (corpus / "text.txt").read_text().split()
    records = [{"prompt": " ".join(words[9:40]), "choices": [words[40], "?"], "answer": 0}]
    records += [{"prompt": f"{i} things that nobody wrote before", "choices": ["?", "!"], "answer": i} for i in (0, 1)]
    path = write_lines(tmp_path / "t.jsonl", records)
    capsys.readouterr()
    assert main([str(tmp_path / "out"), f"--tasks={path}", "--contains", "--ngram=50", "--device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "items with 50 consecutive tokens" in shown
    assert f"{path}:1: " in shown
    assert "in text: text.txt:0\n" in shown
    assert "33.33%" in shown
    assert main([str(tmp_path / "out"), f"--tasks={path}", "--contains", "--json", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    write_lines(tmp_path / "t.jsonl", records[1:])
    assert main([str(tmp_path / "out"), f"--tasks={path}", "--json", "--device=cpu"]) == 0
    others = json.loads(capsys.readouterr().out)["tasks"]["t"]
    clean = found["contained"]["tasks"]["t"]
    assert (clean["clean_acc"], clean["clean_acc_stderr"]) == (others["acc"], others["acc_stderr"])
    assert clean["clean_acc"] != found["tasks"]["t"]["acc"]


def test_data_without_an_index_is_refused(data: Path) -> None:
    manifest = json.loads((data / "d" / "manifest.json").read_text())
    (data / "d" / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(DataError, match="this data set has no document index; prepare it again"):
        contained(data, [write_lines(data / "t.jsonl", [TARGET])])
