"""Trained vocabularies, and the vocabulary as files of a data set."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import CORPUS, END, described, restored

from gptperf import prepare as command
from gptperf.data import prepare as prepare_module
from gptperf.data import train_tokenizer as train_module
from gptperf.data.format import read_manifest
from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource, verify
from gptperf.data.tokenizers import Tokenizer, read_vocabulary, restore_tokenizer
from gptperf.data.train_tokenizer import train_tokenizer
from gptperf.errors import DataError, DeviceError

pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")

# Trained vocabularies.


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_survives_a_trained_vocabulary(trained: JsonTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot not in ids


def test_a_trained_vocabulary_has_the_size_that_was_asked_for(trained: JsonTokenizer) -> None:
    assert (trained.vocab_size, trained.eot, trained.name) == (400, 399, "train:400")
    vocab = described(trained)["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(399))
    assert trained.encode("").tolist() == []
    assert len(trained.encode("the tokenizer's fingerprint")) <= 4
    assert not [token for token in vocab if re.search(r"\d{4}", token)]  # digits in groups of three at most


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_corpus_gives_the_same_bytes(trained: JsonTokenizer, threads: int, tmp_path: Path) -> None:
    """In any order, by any number of threads, in another process."""
    (tmp_path / "corpus.json").write_text(json.dumps([text.decode() for text in CORPUS[::-1]]))
    code = (
        "import json, sys; from gptperf.data.train_tokenizer import train_tokenizer\n"
        f"texts = json.load(open({str(tmp_path / 'corpus.json')!r}))\n"
        "found = train_tokenizer('train:400', [text.encode() for text in texts])\n"
        "sys.stdout.buffer.write(found.files['tokenizer.json'])"
    )
    environment = {"RAYON_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout == trained.files["tokenizer.json"]


def test_a_corpus_that_is_too_small_names_the_largest_vocabulary() -> None:
    with pytest.raises(DataError, match=r"nearest: train:\d+, or more text") as caught:
        train_tokenizer("train:5000", CORPUS)
    (nearest,) = re.findall(r"nearest: (train:\d+)", str(caught.value))
    assert train_tokenizer(nearest, CORPUS).vocab_size == int(nearest.removeprefix("train:"))
    for bad in ("train:", "train:256", "train:-1", "train:1e4", "train:9999999", "train:\u0665\u0665\u0665"):
        with pytest.raises(DataError, match="wanted train:N with N from 257"):
            train_tokenizer(bad, CORPUS)


def test_the_sample_is_bounded_and_does_not_depend_on_the_order() -> None:
    whole = list(train_module._sample("x", CORPUS))
    assert sorted(whole) == sorted(text.decode() for text in CORPUS)
    limit = sum(map(len, CORPUS)) // 3
    part = list(train_module._sample("x", CORPUS, limit))
    assert part == list(train_module._sample("x", CORPUS[::-1], limit)) == whole[: len(part)]
    assert limit * 0.8 < sum(len(text.encode()) for text in part) <= limit


def test_the_sample_has_a_bounded_length_of_different_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the training grows with it: in a script without spaces almost every clause is a new word."""
    monkeypatch.setattr(train_module, "_PROBE", 20_000)
    monkeypatch.setattr(train_module, "_WORD_BYTES", 50_000)
    draw = random.Random(1)

    def text(words: int) -> str:
        return " ".join("".join(chr(0x4E00 + draw.randrange(words)) for _ in range(8)) for _ in range(40))

    every_word_is_new = [text(3000) for _ in range(1000)]
    kept = list(train_module._bounded(every_word_is_new))
    assert kept == every_word_is_new[: len(kept)]
    words = {word for part in kept for word in part.split()}
    assert 40_000 < sum(len(word.encode()) for word in words) < 60_000
    few_words = [text(1) for _ in range(1000)]
    assert list(train_module._bounded(few_words)) == few_words


@pytest.mark.parametrize("single", [False, True])
def test_training_never_sees_the_validation_split(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def spy(name: str, documents: Any) -> JsonTokenizer:
        seen.extend(documents)
        return train_tokenizer(name, seen)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(CORPUS):
        (texts / f"{i}.txt").write_bytes(text)
    (tmp_path / "one.txt").write_bytes(b"\n".join(CORPUS))
    what = tmp_path / "one.txt" if single else texts
    path = prepare(str(what), data_dir=tmp_path / "data", tokenizer="train:300", val_fraction=0.2, quiet=True)
    tokenizer = load_set(path)
    decoded = {split: tokenizer.decode(ids).split(END)[:-1] for split, ids in tokens_of(path).items()}
    assert sorted(decoded["train"]) == sorted(text.decode() for text in seen)
    assert decoded["val"]


# Files of a data set.


def load_set(path: Path) -> Tokenizer:
    info = read_manifest(path).tokenizer
    return restore_tokenizer(info, read_vocabulary(path, info), path)


def tokens_of(path: Path) -> dict[str, list[int]]:
    found = {}
    for split in ("train", "val"):
        with TokenSource.open(path, split) as source:
            tokens = np.empty(len(source), source.dtype)
            source.read_into(0, tokens)
        found[split] = tokens.tolist()
    return found


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "one.txt").write_bytes(b"\n".join(CORPUS))
    return prepare(str(tmp_path / "one.txt"), data_dir=tmp_path / "data", tokenizer="train:300", quiet=True)


def test_a_damaged_vocabulary_is_found(prepared: Path) -> None:
    verify(prepared)
    file = prepared / "tokenizer" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for check in (verify, load_set):
        with pytest.raises(DataError, match=r"tokenizer\.json: found SHA-256 .* wanted .* corrupt"):
            check(prepared)
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read: No such file"):
        verify(prepared)


def test_the_manifest_of_the_files(prepared: Path) -> None:
    manifest = prepared / "manifest.json"
    data = json.loads(manifest.read_text())
    files = data["tokenizer"].pop("files")
    manifest.write_text(json.dumps(data))
    assert read_manifest(prepared).tokenizer.files == {}  # as an earlier version wrote it
    for bad in ({"../x": "0"}, {"a": 1}, [], {".hidden": "0"}):
        data["tokenizer"]["files"] = bad
        manifest.write_text(json.dumps(data))
        with pytest.raises(DataError, match=r"manifest\.json: .*found"):
            read_manifest(prepared)
    fingerprint = data["tokenizer"]["fingerprint"]
    data["tokenizer"] |= {"files": files, "fingerprint": "0" * 64}
    manifest.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"train:300.*its files have the fingerprint .*, wanted 000000000000"):
        load_set(prepared)
    data["tokenizer"] |= {"fingerprint": fingerprint, "vocab_size": 257}
    manifest.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"train:300.*its files have 300 ids, wanted 257"):
        load_set(prepared)


def test_a_second_data_set_with_the_tokenizer_of_the_first(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_bytes(b"\n".join(CORPUS[:30]))
    options: Any = {"data_dir": tmp_path / "data", "tokenizer": str(prepared), "quiet": True}
    second = prepare(str(tmp_path / "two.txt"), **options)
    assert read_manifest(second).tokenizer == read_manifest(prepared).tokenizer
    assert read_vocabulary(second, read_manifest(second).tokenizer) == dict(load_set(prepared).files)
    with pytest.raises(DataError, match=r"--eot: found 'x', wanted none: .*the id 299"):
        prepare(str(tmp_path / "two.txt"), name="three", eot="x", **options)


def test_a_set_that_exists_is_refused_before_the_training(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("trained"))
    with pytest.raises(DataError, match="this data set exists"):
        prepare(str(prepared.parents[1] / "one.txt"), data_dir=prepared.parent, tokenizer="train:300", quiet=True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, trained: JsonTokenizer, prepared: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for use in (lambda: restored(trained), lambda: train_tokenizer("train:300", CORPUS)):
        with pytest.raises(DeviceError, match=r"needs the package tokenizers.*pip install 'gptperf\[hf\]'"):
            use()
    verify(prepared)
    assert len(tokens_of(prepared)["train"])


def test_a_data_set_gives_its_vocabulary_by_name_and_by_folder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()  # the folder of texts that the data set has its name from
    wanted = load_set(prepared).fingerprint
    for number, name in enumerate(("one", "data/one")):
        path = prepare("one.txt", name=f"again{number}", tokenizer=name, quiet=True)
        assert load_set(path).fingerprint == wanted
    assert command.main(["one.txt", "--plan", "--tokenizer=one"]) == 0
    with pytest.raises(DataError, match=r"found 'onee', wanted .* a data set in data or its folder.*; nearest: 'one'"):
        prepare("one.txt", name="other", tokenizer="onee", quiet=True)
