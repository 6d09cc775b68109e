"""Long documents in pieces: the same ids where a cut is between tokens, and documents that a tokenizer refuses."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import CORPUS, END, described, from_json, restored

from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.prepare import prepare
from gptperf.data.tokenizers import TiktokenTokenizer
from gptperf.data.vocabulary import pieces, short_pieces
from gptperf.errors import DataError

PATTERNS = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?\p{L}+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
"""How gpt2, cl100k_base and o200k_base split a text."""


def byte_encoding(pattern: str) -> tiktoken.Encoding:
    pairs = ["\n\n", "  ", " a", "aa", "'s", "s ", "/\n", "\n/", "\n ", ")\n", "12", "\r\n", "a\n"]
    ranks = {bytes([i]): i for i in range(256)} | {pair.encode(): 256 + i for i, pair in enumerate(pairs)}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 300})


ENCODERS: list[Callable[[str], list[int]]] = [byte_encoding(pattern).encode_ordinary for pattern in PATTERNS]


def between_tokens(before: str, after: str) -> bool:
    """Whether a cut is at a place where every pattern above starts a new token."""
    line = re.fullmatch(r"\S\n\w", before[-2:] + after[:1])
    return line is not None or re.fullmatch(r"\S [^\W\d_]", before[-1:] + after[:2]) is not None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a1 \n\r'/s)_\u00e9\u00a0", max_size=80), st.integers(4, 20))
def test_pieces_join_to_the_text_and_good_cuts_keep_the_ids(trained: JsonTokenizer, text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(0 < len(piece) <= size for piece in found) or text == ""
    for before, after in itertools.pairwise(found):
        if not between_tokens(before, after):
            continue
        for encode in [*ENCODERS, lambda part: trained.encode(part).tolist()]:
            assert encode(before) + encode(after) == encode(before + after)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a1 \n\r'/s)_\u00e9\u00a0", max_size=80), st.integers(1, 20))
def test_short_pieces_have_the_words_of_the_whole(trained: JsonTokenizer, text: str, size: int) -> None:
    found = list(short_pieces(text, size))
    assert "".join(found) == text
    for encode in [*ENCODERS, lambda part: trained.encode(part).tolist()]:
        assert list(itertools.chain(*map(encode, found))) == encode(text)


def test_a_trained_vocabulary_encodes_a_long_text_in_short_pieces(trained: JsonTokenizer) -> None:
    """So that the memory of a thread does not depend on the length of a document."""
    lengths: list[int] = []

    class Spy:
        def encode_batch_fast(self, texts: list[str], **keys: Any) -> Any:
            lengths.extend(map(len, texts))
            return real.encode_batch_fast(texts, **keys)

    real, text = trained._library, "the tokenizer covers\n    self.name = 12345 and " * 4000
    for content, longest in ((trained, 40_000), (changed_pattern(trained), len(text))):
        tokenizer = content
        expected = tokenizer._library.encode(text).ids
        real, tokenizer._library = tokenizer._library, Spy()
        try:
            assert tokenizer.encode(text).tolist() == expected
        finally:
            tokenizer._library = real
        assert longest // 2 < max(lengths) <= longest
        lengths.clear()


def changed_pattern(trained: JsonTokenizer) -> JsonTokenizer:
    """Returns a tokenizer whose words are not known to be the same in short pieces."""
    content = described(trained)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[^e]*e"}
    return from_json(content)


_PEAK = """
import os, re, sys
os.sched_getaffinity = lambda pid: set(range(32))
from gptperf.data.prepare import prepare

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000

prepare(sys.argv[1], data_dir=sys.argv[2], name="first", tokenizer="train:300", val_fraction=0.3, quiet=True)
begin = peak_mb()
prepare(sys.argv[3], data_dir=sys.argv[2], tokenizer="train:300", val_fraction=0.3, quiet=True)
print(peak_mb() - begin)
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_cores_or_the_length_of_a_document(tmp_path: Path) -> None:
    """A thread that encodes a document of a million characters at once takes 130 MB."""
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    text = b"\n".join(CORPUS)
    for folder, count, repeats in (("small", 20, 1), ("large", 8, 1_000_000 // len(text))):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.txt").write_bytes(b"%d\n" % number + (text + b"\n") * repeats)
    command = [sys.executable, "-c", _PEAK, *(str(tmp_path / name) for name in ("small", "data", "large"))]
    environment = {"RAYON_NUM_THREADS": "32", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    assert float(done.stdout) < 400  # 32 threads with 32,768 characters each take 136 MB


def test_a_piece_ends_at_the_best_place() -> None:
    assert list(pieces("ab\ncd ef\ngh", 9)) == ["ab\ncd ef\n", "gh"]
    assert list(pieces("ab cd  ef\n\ngh", 11)) == ["ab", " cd  ef\n\ngh"]
    assert list(pieces("ab1 cd 12", 8)) == ["ab1", " cd 12"]
    assert list(pieces("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(pieces("", 3)) == [""]


def test_a_document_that_the_library_refuses_is_encoded_in_pieces() -> None:
    encoding = byte_encoding(PATTERNS[2])
    text = "a" + " " * 1_000_000
    with pytest.raises(ValueError, match="Regex error"):
        encoding.encode_to_numpy(text, disallowed_special=())
    tokenizer = TiktokenTokenizer("x", encoding)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 510_000
    assert restored(tokenizer).encode(text[:1000]).tolist() == tokenizer.encode(text[:1000]).tolist()


def test_a_document_that_is_refused_in_every_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        """An encoding that does not take the letter q."""

        def __init__(self) -> None:
            self.real = byte_encoding(".")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def encode_to_numpy(self, text: str, **keys: Any) -> Any:
            if "q" in text:
                raise ValueError("found a q")
            return self.real.encode_to_numpy(text, **keys)

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Refuses())
    lines = [json.dumps({"text": text}) for text in ("one", "two", "a" * 70_000 + "q", "four")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"x\.jsonl, record 2, .*: tokenizer 'gpt2': cannot encode .* at character 69632 .*found a q"
    ):
        prepare(str(tmp_path / "x.jsonl"), data_dir=tmp_path, tokenizer="gpt2", val_fraction=0.1, quiet=True)
