"""Tokenizers: round trips, special tokens as plain text, fingerprints, and errors of names and networks."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gptperf.data.tokenizers import ByteTokenizer, TiktokenTokenizer, load_tokenizer, token_dtype
from gptperf.errors import DataError

RANKS = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258}


def _encoding(name: str = "gpt2", special: dict[str, int] | None = None) -> tiktoken.Encoding:
    special = {"<|endoftext|>": 260} if special is None else special  # 259 is a gap
    return tiktoken.Encoding(name, pat_str=r"\w+|\W", mergeable_ranks=RANKS, special_tokens=special)


@pytest.fixture
def local_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: _encoding(name))


@given(st.binary())
def test_bytes_are_their_own_ids(data: bytes) -> None:
    ids = ByteTokenizer().encode(data)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(data)
    assert ByteTokenizer().decode(ids) == data.decode("utf-8", errors="replace")


@given(st.text())
def test_text_survives_bytes(text: str) -> None:
    byte = ByteTokenizer()
    assert byte.decode(byte.encode(text)) == text  # hypothesis' text has no lone surrogates
    assert byte.decode([*byte.encode(text).tolist(), byte.eot]) == text


def test_lone_surrogate_becomes_a_question_mark(local_gpt2: None) -> None:
    for tokenizer in (ByteTokenizer(), load_tokenizer("gpt2")):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_byte_facts() -> None:
    byte = load_tokenizer("byte")
    assert (byte.name, byte.vocab_size, byte.eot) == ("byte", 257, 256)
    assert byte.fingerprint == ByteTokenizer().fingerprint
    # Frozen: a change would orphan every data set that users have prepared.
    assert byte.fingerprint == "833d1711fdac92d38c00d6922d7f6be09ca2de190e740b3c52f64a627a882ef3"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4"), (200019, "<u4")])
def test_smallest_dtype_that_holds_the_largest_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_tiktoken_round_trip(local_gpt2: None) -> None:
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("gpt2", 261, 260)
    ids = tokenizer.encode("hello")
    assert ids.tolist() == [258, ord("o")]
    assert ids.dtype == np.uint16
    assert tokenizer.decode(tokenizer.encode("h\u00e9llo".encode())) == "h\u00e9llo"
    assert tokenizer.decode([258, 259, 9999, ord("o")]) == "hello"  # ids without bytes


def test_special_tokens_in_a_document_are_plain_text(local_gpt2: None) -> None:
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_tiktoken_refuses_bytes_that_are_not_utf8(local_gpt2: None) -> None:
    with pytest.raises(DataError, match=r"0xff at offset 2.*UTF-8"):
        load_tokenizer("gpt2").encode(b"ab\xff")


def test_fingerprint_sees_every_part_of_the_vocabulary() -> None:
    def fingerprint(ranks: dict[bytes, int], eot: int) -> str:
        encoding = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot})
        return TiktokenTokenizer("gpt2", encoding).fingerprint

    swapped = RANKS | {b"he": 257, b"ll": 256}
    found = [fingerprint(RANKS, 260), fingerprint(swapped, 260), fingerprint(RANKS, 261)]
    assert len(set(found)) == 3
    assert fingerprint(dict(RANKS), 260) == found[0]


def test_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(DataError, match=r"found 'gpt-2'.*nearest: 'gpt2'"):
        load_tokenizer("gpt-2")
    with pytest.raises(DataError, match="nearest: 'byte'"):
        load_tokenizer("bytes")


def test_offline_names_the_cache_and_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def offline(name: str) -> tiktoken.Encoding:
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match=r"TIKTOKEN_CACHE_DIR.*--tokenizer=byte") as caught:
        load_tokenizer("gpt2")
    assert caught.value.exit_code == 3


def test_damaged_download_and_missing_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> tiktoken.Encoding:
        raise ValueError("Hash mismatch for data downloaded\nmore")

    monkeypatch.setattr(tiktoken, "get_encoding", damaged)
    with pytest.raises(DataError, match=r"Hash mismatch for data downloaded$"):
        load_tokenizer("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: _encoding(name, special={}))
    with pytest.raises(DataError, match=r"no <\|endoftext\|> token"):
        load_tokenizer("gpt2")
