"""The tokenizer files of an exported model: any tokenizer as a tokenizer.json of the `tokenizers` library."""

import json
import re
from collections.abc import Mapping
from typing import Any

from gptperf.data.json_tokenizer import TOKENIZER_JSON, JsonTokenizer, tokenizers_library
from gptperf.data.tokenizers import ByteTokenizer, TiktokenTokenizer, Tokenizer
from gptperf.errors import DataError

__all__ = ["tokenizer_files"]

_END_OF_TEXT = "<|endoftext|>"
_SAMPLE = (
    "The tokenizer's   ids,\n\n\n  of 1234567 'words' isn't  \t ALL'LL \r\n end  ",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # ----====____  \n \n\n   ",
    "\u00c4rger na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627",
    "\U0001f44d\U0001f3fd e\u0301 \u2028\u00a0\u3000x",
    *(text * count for text in (" ", "\n", "a", "0", "-", "\u00e9", " \n") for count in (7, 31, 130)),
)
"""Texts on which a converted tokenizer is compared with the original."""


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Returns file name -> content of the files from which AutoTokenizer loads a tokenizer.

    Args:
        tokenizer: The tokenizer of the model. The file of a `JsonTokenizer` is taken as it is, others are converted.
        block_size: Longest sequence of the model.

    Raises:
        DataError: The vocabulary cannot be converted with the same ids.
        DeviceError: The package `tokenizers` is not installed.
    """
    if isinstance(tokenizer, JsonTokenizer):
        content = tokenizer.files[TOKENIZER_JSON]
    elif isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        tokens = encoding._mergeable_ranks
        content = _converted(tokenizer, tokens, encoding._special_tokens, _merges(tokens), _pattern(encoding._pat_str))
    else:
        assert isinstance(tokenizer, ByteTokenizer), type(tokenizer)
        content = _converted(tokenizer, {bytes([i]): i for i in range(256)}, {_END_OF_TEXT: tokenizer.eot})
    end = _text_of(content, tokenizer.eot)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # A document starts after the end of the one before, and padding is never read.
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER_JSON: content, "tokenizer_config.json": json.dumps(described, indent=2).encode() + b"\n"}


def _text_of(content: bytes, token: int) -> str:
    """Returns the text of an id, which may be a special token or a word of the model."""
    described = json.loads(content)
    for added in described["added_tokens"]:
        if added["id"] == token:
            return str(added["content"])
    vocab = described["model"]["vocab"]
    return str(next(text for text, i in vocab.items() if i == token) if isinstance(vocab, dict) else vocab[token][0])


def _converted(
    tokenizer: Tokenizer,
    tokens: Mapping[bytes, int],
    special: Mapping[str, int],
    merges: list[tuple[bytes, bytes]] | None = None,
    pattern: str = "",
) -> bytes:
    """Returns the tokenizer.json of a vocabulary of bytes.

    Args:
        tokenizer: The original, with which the result is compared.
        tokens: Bytes -> id.
        special: Text of a special token -> id.
        merges: Pairs of tokens in the order in which they are merged.
        pattern: Regular expression of the pieces that are encoded one by one; "": a text is one piece.
    """
    library = tokenizers_library(tokenizer.name)
    characters = _characters()
    texts = {token: "".join(characters[byte] for byte in token) for token in tokens}
    added = {i: text for text, i in special.items()}
    for hole in set(range(tokenizer.vocab_size)) - set(tokens.values()) - added.keys():
        added[hole] = f"<|unused {hole}|>"
    vocab = {texts[token]: i for token, i in tokens.items()} | {text: i for i, text in added.items()}
    pairs = [(texts[left], texts[right]) for left, right in merges or ()]
    # ignore_merges: a piece that is a token is that token, as in tiktoken, even if no merges lead to it.
    made: Any = library.Tokenizer(library.models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    steps = [library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern:
        steps.insert(0, library.pre_tokenizers.Split(library.Regex(pattern), "isolated"))
    made.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([library.AddedToken(added[i], normalized=False, special=True) for i in sorted(added)])
    content = json.dumps(json.loads(made.to_str()), separators=(",", ":")).encode() + b"\n"
    again = JsonTokenizer(tokenizer.name, content, tokenizer.eot)
    for text in _SAMPLE:
        if again.vocab_size != tokenizer.vocab_size or again.encode(text).tolist() != tokenizer.encode(text).tolist():
            raise DataError(
                f"tokenizer {tokenizer.name!r}: its {TOKENIZER_JSON} encodes {text[:30]!r} to other ids than the "
                "tokenizer itself; --tokenizer=unknown exports the model without a tokenizer"
            )
    return content


def _characters() -> list[str]:
    """Returns the character that stands for each byte in a byte-level vocabulary, as GPT-2 has them.

    A printable byte of Latin-1 is its own character; the others are the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(i) for i in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _merges(tokens: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the pairs of tokens that tiktoken merges, in the order in which it prefers them.

    tiktoken merges the pair whose bytes together have the lowest rank, whatever its cut is.
    """
    found = []
    for token, rank in tokens.items():
        for cut in range(1, len(token)):
            left, right = tokens.get(token[:cut]), tokens.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, token[:cut], token[cut:]))
    return [pair[3:] for pair in sorted(found)]


def _pattern(pattern: str) -> str:
    """Returns a regular expression of tiktoken in the syntax of the `tokenizers` library, which is Oniguruma's.

    There `{1,3}+` repeats the repetition, and is not a possessive one as in tiktoken. A greedy one is the same where
    nothing follows it that could take a character back.
    """
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
