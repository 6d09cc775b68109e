"""The text of tokens as they arrive: the whole text, in whole characters, up to a stop string."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_helpers import CORPUS, END, from_json

from gptperf.data.text_stream import before_stop, new_text
from gptperf.data.tokenizers import ByteTokenizer, TiktokenTokenizer, Tokenizer
from gptperf.data.train_tokenizer import train_tokenizer

EURO = "\u20ac"  # three bytes
FACE = "\U0001f600"  # four


def ranks() -> Tokenizer:
    """A vocabulary of tiktoken whose tokens end inside characters."""
    pieces = [bytes([i]) for i in range(256)] + [b" \xe2\x82", b"\xac \xf0\x9f", b"END", b"\n\n"]
    lines = b"".join(b"%s %d\n" % (base64.b64encode(piece), i) for i, piece in enumerate(pieces))
    rules = {"pattern": r"\w+|\W", "special_tokens": {END: 260}, "eot": 260}
    return TiktokenTokenizer.from_files("test", {"ranks.tiktoken": lines, "tiktoken.json": json.dumps(rules).encode()})


def of_the_library(kind: str) -> Tokenizer:
    """A tokenizer that puts a space between tokens or drops the one at the start of a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    if kind == "trained":
        return train_tokenizer("train:300", CORPUS)
    words = {word: i for i, word in enumerate(["[UNK]", "the", "##t", "s", "##,", "##\u20ac", "ids", END])}
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
        made.decoder = tokenizers.decoders.WordPiece()
    else:
        pieces = ["<unk>", END, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "\u2581the", "s", "\u2581\u20ac"]
        scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=0, byte_fallback=True))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        decoders = tokenizers.decoders
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return from_json(json.loads(made.to_str()))


def added(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    return tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt))


@pytest.mark.parametrize("kind", ["byte", "tiktoken", "trained", "wordpiece", "sentencepiece"])
def test_the_pieces_are_the_text_in_whole_characters(kind: str) -> None:
    made: dict[str, Any] = {"byte": ByteTokenizer, "tiktoken": ranks}
    tokenizer = made[kind]() if kind in made else of_the_library(kind)
    starts = ([tokenizer.eot], tokenizer.encode("the s").tolist() or [tokenizer.eot])
    units = [[i] for i in range(tokenizer.vocab_size)]
    if kind == "sentencepiece":  # one wrong byte makes this library change the text of the right bytes before it
        units = [[0], [1], *([i] for i in range(258, 262)), *(tokenizer.encode(c).tolist() for c in ("x", EURO, FACE))]

    @given(st.lists(st.sampled_from(units), max_size=30), st.sampled_from(starts))
    def whole(drawn: list[list[int]], prompt: list[int]) -> None:
        ids = [i for unit in drawn for i in unit]
        pieces, given_so_far = [], []
        fed: list[int] = []
        for piece in new_text(tokenizer, prompt, (fed.append(i) or i for i in ids)):
            pieces.append(piece)
            given_so_far.append(list(fed))
        assert "".join(pieces) == added(tokenizer, prompt, ids)
        for i, so_far in enumerate(given_so_far[:-1]):  # what came out is what the tokens so far decode to
            assert "".join(pieces[: i + 1]) == added(tokenizer, prompt, so_far)

    whole()


def test_a_character_comes_with_its_last_byte() -> None:
    text = f"a{EURO}b{FACE}"
    arrived = []
    for i, byte in enumerate(text.encode()):
        arrived.append(byte)
        pieces = list(new_text(ByteTokenizer(), [10], arrived))
        whole = bytes(arrived).decode(errors="ignore")
        assert "".join(pieces).rstrip("\ufffd") == whole, i
    assert list(new_text(ByteTokenizer(), [10], arrived)) == ["a", EURO, "b", FACE]


def test_a_space_between_words_stays() -> None:
    tokenizer = of_the_library("sentencepiece")
    the = tokenizer.encode("the").tolist()
    assert "".join(new_text(tokenizer, the, the * 3)) == " the the the"


def one_by_one(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first; of two, the longer one."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


few = st.text("ab" + EURO, max_size=12)


@given(st.lists(few), st.lists(st.text("ab" + EURO, min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    assert "".join(before_stop(pieces, stops)) == one_by_one("".join(pieces), stops)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    assert list(before_stop(["ab", "c", "E", "x", "E", "N", "D", "more"], ["END"])) == ["ab", "c", "", "Ex", *[""] * 3]
    assert list(before_stop(["ab", "EN"], ["END"])) == ["ab", "", "EN"]


def test_nothing_is_drawn_after_a_stop_string() -> None:
    drawn = iter(f"x{EURO}yz".encode())
    assert "".join(before_stop(new_text(ByteTokenizer(), [10], drawn), [EURO])) == "x"
    assert list(drawn) == list(b"yz")
