"""Long documents in pieces: the same ids where a cut is between tokens, and documents that a tokenizer refuses."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import END, restored

from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.prepare import prepare
from gptperf.data.tokenizers import TiktokenTokenizer
from gptperf.data.vocabulary import pieces
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
