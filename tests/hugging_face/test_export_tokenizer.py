"""The tokenizers of exports: AutoTokenizer gives the ids of gptperf's tokenizer, and knows the special tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from export_helpers import SIZES, saved
from tokenizer_helpers import CORPUS

from gptperf.config import ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.tokenizers import ByteTokenizer, TiktokenTokenizer, Tokenizer
from gptperf.data.train_tokenizer import train_tokenizer
from gptperf.errors import DataError
from gptperf.hugging_face import export, exported_tokenizer
from gptperf.hugging_face.exported_tokenizer import tokenizer_files

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

END = "<|endoftext|>"
# The patterns of tiktoken's gpt2, cl100k_base and o200k_base: possessive counts, "$", and ends of words in any case.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PIECES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "a",
    "the",
    " tokenizer's",
    "'LL",
    "'S",
    "IT'S",
    "0",
    "12345678",
    "-",
    "==",
]
PIECES += [
    "self.name",
    "\u00e9",
    "e\u0301",
    "\u4e2d\u6587",
    "\U0001f44d\U0001f3fd",
    "\u200d",
    "\u3000",
    "\u00a0",
    "\x85",
]
PIECES += [
    "\u2028",
    "\u017f",
    "\u212a",
    "\u0130",
    "\x00",
    "\x7f",
    "\u0661",
    "\u2167",
    "/",
    "<|",
    "\ufeff",
    "\U0010ffff",
]


def hard_texts() -> list[str]:
    """Texts of pieces on which tokenizers differ, repeated, and every character below U+3000 after others."""
    draw = random.Random(0)
    texts = ["".join(draw.choice(PIECES) * draw.choice([1, 1, 2, 3, 17]) for _ in range(12)) for _ in range(400)]
    texts += ["".join(f"{before}{chr(i)}" for i in range(0x3000)) for before in ("a", " ", "1", "\n", "'")]
    return [*texts, "", " " * 100, "ab" * 50, "-" * 33]


def of_tiktoken(pattern: str) -> TiktokenTokenizer:
    """A trained vocabulary as tiktoken has them, with holes between its special tokens."""
    trained = train_tokenizer("train:400", CORPUS)
    characters = {character: byte for byte, character in enumerate(exported_tokenizer._characters())}
    vocab = trained._library.get_vocab(with_added_tokens=False)
    ranks = {bytes(characters[c] for c in token): i for token, i in vocab.items() if token != END}
    # As in p50k_base, a special token has an id between those of others.
    ranks = {token: rank + (rank >= 300) for token, rank in ranks.items()}
    special = {END: 300, "<|more|>": len(ranks) + 5}
    return TiktokenTokenizer(
        "any", tiktoken.Encoding("any", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )


@pytest.fixture(params=["byte", *PATTERNS, "json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in PATTERNS:
        return of_tiktoken(PATTERNS[request.param])
    return ByteTokenizer() if request.param == "byte" else train_tokenizer("train:400", CORPUS)


def test_transformers_gives_the_ids_of_the_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # transformers treats the tokenizers of some classes, such as Mistral, in ways of their own.
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size + 2}
    model = ModelConfig(**sizes | (PRESETS["llama"] | {"window": "8"} if tokenizer.name != "any" else {}))
    _, path = saved(model, tmp_path, tokenizer)
    assert export(path, tmp_path / "hf").tokenizer == tokenizer.name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = hard_texts()
    for text, found in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert found == tokenizer.encode(text).tolist(), text[:50]
        assert theirs.decode(found) == tokenizer.decode(found), text[:50]
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token, theirs.eos_token_id) == (END, tokenizer.eot)
    assert theirs(f"a{END}")["input_ids"][-1] == tokenizer.eot  # in transformers its text is the token
    assert theirs.model_max_length == model.block_size
    described = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert described.eos_token_id == tokenizer.eot
    assert described.suppress_tokens == list(range(tokenizer.vocab_size, model.padded_vocab_size))


def test_every_byte_is_its_id(tmp_path: Path) -> None:
    """Also those that no UTF-8 text has."""
    _, path = saved(ModelConfig(**SIZES), tmp_path)
    export(path, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    character = exported_tokenizer._characters()
    assert sorted(character) == sorted(exported_tokenizer.tokenizers_library("").pre_tokenizers.ByteLevel.alphabet())
    assert [theirs.convert_tokens_to_ids(character[byte]) for byte in range(256)] == list(range(256))
    pairs = [chr(byte) for byte in range(128)]
    assert [theirs.decode([byte]) for byte in range(128)] == pairs


def test_a_tokenizer_json_travels_unchanged() -> None:
    trained = train_tokenizer("train:300", CORPUS)
    assert tokenizer_files(trained, 32)["tokenizer.json"] == trained.files["tokenizer.json"]


def test_an_end_that_is_a_word_of_the_model(tmp_path: Path) -> None:
    """As `</s>` of some vocabularies, which is not among the added tokens."""
    vocab: dict[str, Any] = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    content = {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "added_tokens": [],
        "version": "1.0",
    }
    tokenizer = JsonTokenizer("words", json.dumps(content).encode(), "</s>")
    _, path = saved(ModelConfig(**SIZES), tmp_path, tokenizer)
    export(path, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", 1)


def test_a_conversion_with_other_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_tokenizer, "_pattern", lambda pattern: r"\s+|\S+")
    with pytest.raises(DataError, match=r"tokenizer 'any': its tokenizer.json has other ids for"):
        tokenizer_files(of_tiktoken(PATTERNS["cl100k"]), 32)
