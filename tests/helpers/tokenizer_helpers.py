"""A small corpus, and a vocabulary that is trained on it, for the tests of tokenizers."""

import json
import random
from pathlib import Path
from typing import Any

from gptperf.data.format import TokenizerInfo
from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.tokenizers import Tokenizer, restore_tokenizer

END = "<|endoftext|>"
AS_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_WORDS = ["the", "tokenizer's", "fingerprint", "covers", "self.name", "=", "'value'", "and", "12345", "ids,"]
_WORDS += ["isn't", "it?", "\n   ", "\n\n", "def f(x):\n"]


def _text(seed: int) -> bytes:
    draw = random.Random(seed)
    words = [[*_WORDS, "".join(draw.choices("abcdefgh", k=5)), str(draw.randrange(100_000))] for _ in range(60)]
    return " ".join(draw.choice(some) for some in words).encode()


CORPUS = [_text(seed) for seed in range(60)]


def described(tokenizer: JsonTokenizer) -> Any:
    return json.loads(tokenizer.files["tokenizer.json"])


def from_json(content: Any, eot: str = END) -> JsonTokenizer:
    return JsonTokenizer("test", json.dumps(content).encode(), eot)


def restored(tokenizer: Tokenizer) -> Tokenizer:
    keys = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "fingerprint", "eot")}
    return restore_tokenizer(TokenizerInfo(**keys), tokenizer.files, Path("set"))
