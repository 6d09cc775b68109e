"""Tokenizers: round trips, special tokens as plain text, fingerprints, and errors of names and networks."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_helpers import restored

from gptperf.data.prepare import prepare
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


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "cl100k_base", "o200k_base"])
def test_offline_says_what_to_fetch_and_where_to_put_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import requests
    import tiktoken.load

    asked = []

    def offline(url: str) -> bytes:
        asked.append(url)
        raise requests.exceptions.ConnectionError("no route to host", request=requests.Request("GET", url))

    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(DataError, match=r"By hand: fetch .* TIKTOKEN_CACHE_DIR names$") as caught:
        load_tokenizer(name)  # train and sample have no --tokenizer
    assert caught.value.exit_code == 3
    files = re.findall(r"(https://\S+) as ([0-9a-f]{40})", str(caught.value))
    assert len(files) == (2 if name == "gpt2" else 1)
    for url, file in files:
        (tmp_path / file).write_bytes(url.encode())
        assert tiktoken.load.read_file_cached(url) == url.encode()  # tiktoken finds it there
    assert asked == [files[0][0]]
    with pytest.raises(DataError, match=r"TIKTOKEN_CACHE_DIR names, or use --tokenizer=byte"):
        prepare("python_stdlib", tokenizer="p50k_base", data_dir=tmp_path)


def test_offline_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(name: str) -> tiktoken.Encoding:
        raise PermissionError(13, "Permission denied", "/cache/file")

    monkeypatch.setattr(tiktoken, "get_encoding", unreadable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(DataError, match=r"PermissionError: /cache/file.*set TIKTOKEN_CACHE_DIR to a folder.*now: off"):
        load_tokenizer("gpt2")


def test_tiktoken_comes_back_from_its_files(local_gpt2: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("looked up"))
    again = restored(tokenizer)
    for text in ("hello he ll \u00e9 <|endoftext|>", ""):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert (again.fingerprint, again.vocab_size, again.eot) == (tokenizer.fingerprint, 261, 260)
    assert again.files == tokenizer.files
    files = dict(tokenizer.files)
    lines = files["ranks.tiktoken"].splitlines(keepends=True)
    for bad in (b"".join(lines[1:]), b"".join(lines) + b"aGVsbA== 7\n", b"x", b"\xff \xff\n"):
        with pytest.raises(DataError, match=r"ranks\.tiktoken and tiktoken\.json are not a vocabulary"):
            TiktokenTokenizer.from_files("gpt2", files | {"ranks.tiktoken": bad})
    for bad in (b"[]", b"{", b'{"pattern": "(", "special_tokens": {"<|endoftext|>": 260}, "eot": 260}'):
        with pytest.raises(DataError, match=r"are not a vocabulary"):
            TiktokenTokenizer.from_files("gpt2", files | {"tiktoken.json": bad})


def test_another_end_of_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    special = {"<|endoftext|>": 260, "<|stop|>": 261}
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: _encoding(special=special))
    assert load_tokenizer("gpt2", eot="<|stop|>").eot == 261
    assert restored(load_tokenizer("gpt2", eot="<|stop|>")).eot == 261
    with pytest.raises(DataError, match=r"no <eos> token.*--eot=TOKEN, one of <\|endoftext\|>, <\|stop\|>"):
        load_tokenizer("gpt2", eot="<eos>")
    with pytest.raises(DataError, match="--eot: found '<eos>', wanted none"):
        load_tokenizer("byte", eot="<eos>")


def test_damaged_download_and_missing_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> tiktoken.Encoding:
        raise ValueError("Hash mismatch for data downloaded\nmore")

    monkeypatch.setattr(tiktoken, "get_encoding", damaged)
    with pytest.raises(DataError, match=r"Hash mismatch for data downloaded$"):
        load_tokenizer("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: _encoding(name, special={}))
    with pytest.raises(DataError, match=r"no <\|endoftext\|> token"):
        load_tokenizer("gpt2")
