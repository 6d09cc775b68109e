"""The tokenizers of exports: AutoTokenizer gives the ids of gptperf's tokenizer, and knows the special tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from export_helpers import SIZES, saved
from tiktoken_ext import openai_public
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
NAMES = ("gpt2", "cl100k_base", "o200k_base")
"""Encodings of tiktoken with patterns that differ."""
PIECES = [
    " qzj",
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


def of_tiktoken(name: str) -> TiktokenTokenizer:
    """A trained vocabulary with the pattern of an encoding of tiktoken, and holes between its special tokens."""
    with pytest.MonkeyPatch.context() as offline:
        for read in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            offline.setattr(openai_public, read, lambda *files, **options: {})
        pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    trained = train_tokenizer("train:400", CORPUS)
    characters = {character: byte for byte, character in enumerate(exported_tokenizer._characters())}
    vocab = trained._library.get_vocab(with_added_tokens=False)
    ranks = {bytes(characters[c] for c in token): i for token, i in vocab.items() if token != END}
    # As in p50k_base, a special token has an id between those of others.
    ranks = {token: rank + (rank >= 300) for token, rank in ranks.items()}
    ranks[b" qzj"] = len(ranks) + 1  # no merges lead to it
    special = {END: 300, "<|more|>": len(ranks) + 5}
    return TiktokenTokenizer(
        "any", tiktoken.Encoding("any", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )


@pytest.fixture(params=["byte", *NAMES, "json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in NAMES:
        return of_tiktoken(request.param)
    return ByteTokenizer() if request.param == "byte" else train_tokenizer("train:400", CORPUS)


def test_transformers_gives_the_ids_of_the_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # transformers treats the tokenizers of some classes, such as Mistral, in ways of their own.
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size + 2}
    model = ModelConfig(**sizes | (PRESETS["llama"] | {"window": "8"} if tokenizer.name != "any" else {}))
    _, path = saved(model, tmp_path, tokenizer)
    assert export(path, tmp_path / "hf").tokenizer == tokenizer.name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
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
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
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
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", 1)


def test_a_conversion_with_other_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_tokenizer, "_pattern", lambda pattern: r"\s+|\S+")
    with pytest.raises(
        DataError, match=r"tokenizer 'any': its tokenizer.json encodes .* to other ids than the tokenizer itself"
    ):
        tokenizer_files(of_tiktoken("cl100k_base"), 32)
