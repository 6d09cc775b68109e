"""Hugging Face tokenizers: a `tokenizer.json` with any model, read by the `tokenizers` library (extra hf).

Of the file counts what decides ids: normalizer, pre-tokenizer, model and added tokens, and the decoder for text.
Templates, truncation, padding and the dropout of merges are removed, so that a text always has the same ids, all of
them, and no other ones.
"""

import array
import contextlib
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptperf.data.hub import CACHE, by_hand
from gptperf.data.vocabulary import (
    TRAINED_PATTERN,
    NoVocabularyError,
    RefusedError,
    Tokens,
    as_array,
    as_text,
    encode_in_pieces,
    short_pieces,
    token_dtype,
)
from gptperf.errors import DataError, DeviceError

__all__ = ["TOKENIZER_JSON", "JsonTokenizer", "tokenizers_library"]

TOKENIZER_JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_DECIDES = ("normalizer", "pre_tokenizer", "model", "added_tokens")
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|eot_id|>", "<|im_end|>")
"""Tokens that end a document in known vocabularies, for a tokenizer without a configuration."""
_MOST_BYTES = 1 << 28


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        name: Name of the tokenizer.
        content: Content of a `tokenizer.json`.
        eot: The token that ends a document, or its id.

    Raises:
        DataError: The content is not a tokenizer, gives a token another id than it states, or has no token `eot`.
        DeviceError: The package `tokenizers` is not installed.
    """

    def __init__(self, name: str, content: bytes, eot: str | int) -> None:
        self.name = name
        self._described = described = _cleaned(content, name)
        self._library = _load(described, name)
        text = self._library.id_to_token(eot) if isinstance(eot, int) else eot
        found = None if text is None else self._library.token_to_id(text)
        if found is None:
            raise DataError(
                f"tokenizer {name!r}: found no token {eot!r}, wanted --eot=TOKEN, one of {_candidates(described)}"
            )
        self.eot: int = found
        self._eot_text: str = text
        ordinary = [t for t in described["added_tokens"] if t["content"] == text and not t["special"]]
        if ordinary:
            ordinary[0]["special"] = True  # so that its text in a document is ordinary text
            self._library = _load(described, name)
        self._library.encode_special_tokens = True  # encodes the text of every special token as ordinary text
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self._dtype = token_dtype(self.vocab_size)
        # Only the words of a known pattern are sure to be the same in short pieces, which take little memory.
        split = _canonical({"Regex": TRAINED_PATTERN}) in _canonical(described.get("pre_tokenizer"))
        self._words_are_known = split and described.get("normalizer") is None

    @classmethod
    def find(cls, name: str, eot: str | None = None) -> "JsonTokenizer":
        """Returns the tokenizer of a file, of a folder with a tokenizer.json, or of "hf:REPO".

        Args:
            name: Path or "hf:REPO".
            eot: The token that ends a document; None: the one of tokenizer_config.json beside it, else a known one.

        Raises:
            DataError: There is no such file, it cannot be read or downloaded, or no token is known to end a document.
            DeviceError: A package is not installed.
        """
        config: Path | None
        if name.startswith("hf:"):
            path, config = _download(name, TOKENIZER_JSON), None
            if path is None:
                raise DataError(f"tokenizer {name!r}: found no {TOKENIZER_JSON}, wanted a repository that has one")
            if eot is None:
                config = _download(name, _CONFIG)
        else:
            path = Path(name, TOKENIZER_JSON) if os.path.isdir(name) else Path(name)
            config = path.parent / _CONFIG
            name = path.resolve().parent.name if path.name == TOKENIZER_JSON else path.stem
        content = _read(path)
        if eot is None:
            eot = _end_of_text(name, _cleaned(content, name), config)
        return cls(name, content, eot)

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """The file that defines the vocabulary."""
        return {TOKENIZER_JSON: _canonical(self._described) + b"\n"}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the parts of the file that decide ids, and `eot`."""
        decides = {key: self._described.get(key) for key in _DECIDES} | {"eot": self.eot}
        return hashlib.sha256(b"gptperf tokenizer.json 1\n" + _canonical(decides)).hexdigest()

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the ids of `text`, (n,) uint16 or uint32.

        The text of a special token is encoded as ordinary text, and a lone surrogate as "?".

        Raises:
            DataError: `text` is bytes and not UTF-8, or the library cannot encode a part of it.
        """
        text = as_text(self.name, text)
        ids = encode_in_pieces(self.name, text, self._encode)
        if (ids == self.eot).any():
            # The model itself has the token as a word: its text is cut after the first character, so that no piece
            # contains it.
            first, rest = self._eot_text[:1], self._eot_text[1:]
            parts = text.split(self._eot_text)
            parts = [(rest if i else "") + part + (first if i < len(parts) - 1 else "") for i, part in enumerate(parts)]
            ids = np.concatenate([encode_in_pieces(self.name, part, self._encode) for part in parts])
            if (ids == self.eot).any():
                raise DataError(
                    f"tokenizer {self.name!r}: found {self._eot_text!r}, which ends a document, as a token of ordinary "
                    "text; wanted another --eot"
                )
        return ids

    def _encode(self, text: str) -> Tokens:
        with _library_errors() as failed:
            parts = [self._ids(part) for part in (short_pieces(text) if self._words_are_known else (text,))]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        raise RefusedError(failed[0])

    def _ids(self, text: str) -> Tokens:
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=False)
        # Only one thread at a time makes a list and an array of it, and an `array` takes half the time of NumPy.
        return np.frombuffer(array.array("I", encoding.ids), np.uint32).astype(self._dtype)

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; ids without a token (padding of the vocabulary) are dropped."""
        known = [i for i in as_array(ids).tolist() if 0 <= i < self.vocab_size]
        text: str = self._library.decode(known, skip_special_tokens=False)
        return text


def tokenizers_library(name: str) -> Any:
    """Returns the package `tokenizers`, which the tokenizer `name` needs.

    Raises:
        DeviceError: The package is not installed.
    """
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DeviceError(
            f"tokenizer {name!r} needs the package tokenizers, which is not installed: pip install 'gptperf[hf]'"
        ) from error


def _cleaned(content: bytes, name: str) -> dict[str, Any]:
    """Returns a tokenizer.json without the parts that change ids at random, add ids or leave some out.

    Merges are pairs, and an id between added tokens that has no token gets one, because the library would number the
    tokens after it differently.
    """
    try:
        described = json.loads(content.decode("utf-8-sig"))
        model = described["model"]
        described |= {"truncation": None, "padding": None, "post_processor": None}
        if "dropout" in model:
            model["dropout"] = None
        if "merges" in model:
            model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added = sorted(described.get("added_tokens") or [], key=lambda token: token["id"])
        for token in added:
            if not isinstance(token["content"], str) or not isinstance(token["id"], int):
                raise ValueError(f"the added token {token}")
            token["special"] = bool(token.get("special", False))
        vocab = model["vocab"]
        own = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
        taken = own | {token["id"] for token in added}
        last = max((token["id"] for token in added), default=-1)
        holes = [i for i in range(max(own, default=-1) + 1, last) if i not in taken]
        if len(holes) > 1 << 16:
            raise ValueError(f"{len(holes)} ids have no token")
        added += [_unused(i) for i in holes]
        described["added_tokens"] = sorted(added, key=lambda token: token["id"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"tokenizer {name!r}: not a {TOKENIZER_JSON} of the tokenizers library ({type(error).__name__}: {error})"
        ) from error
    return described


def _unused(token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": f"<|unused {token}|>", "special": True} | flags


def _load(described: Mapping[str, Any], name: str) -> Any:
    library = tokenizers_library(name)
    with _library_errors() as failed:
        loaded = library.Tokenizer.from_str(json.dumps(described))
        for token in described["added_tokens"]:
            found = loaded.token_to_id(token["content"])
            if found != token["id"]:
                raise DataError(
                    f"tokenizer {name!r}: the tokenizers library gives {token['content']!r} the id {found}, the file "
                    f"states {token['id']}; wanted the ids of the model without gaps"
                )
        return loaded
    raise DataError(f"tokenizer {name!r}: the tokenizers library cannot read it: {failed[0]}")


@contextlib.contextmanager
def _library_errors() -> Iterator[list[str]]:
    """Catches the errors of the `tokenizers` library; the yielded list then has the message."""
    failed: list[str] = []
    try:
        yield failed
    except Exception as error:  # the library raises Exception itself; every subclass passes on
        if type(error) is not Exception:
            raise
        failed.append((str(error).splitlines() or ["no reason given"])[0][:200])


def _end_of_text(name: str, described: Mapping[str, Any], config: Path | None) -> str:
    """Returns the token that ends a document: the configuration's if it has one, else the first known name.

    Raises:
        DataError: There is neither; the message names candidates.
    """
    tokens = {token["content"] for token in described["added_tokens"]}
    vocab = described["model"]["vocab"]
    tokens |= set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    named: object = None
    if config is not None and config.is_file():
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            named = json.loads(_read(config)).get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    for candidate in (named, *_ENDS):
        if isinstance(candidate, str) and candidate in tokens:
            return candidate
    raise DataError(
        f"tokenizer {name!r}: found no token that ends a document, neither as eos_token of {_CONFIG} nor by its name; "
        f"wanted --eot=TOKEN, one of {_candidates(described)}"
    )


def _candidates(described: Mapping[str, Any]) -> str:
    names = [token["content"] for token in described["added_tokens"]]
    special = [token["content"] for token in described["added_tokens"] if token["special"]]
    return ", ".join((special or names)[:10]) or "its tokens"


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: found {path.stat().st_size:,} bytes, wanted a {TOKENIZER_JSON}")
        return path.read_bytes()
    except OSError as error:
        hint = "; wanted a tokenizer.json, a folder that has one, or hf:REPO" if not path.exists() else ""
        raise DataError(f"{path}: cannot be read: {error.strerror}{hint}") from error


def _download(name: str, file: str) -> Path | None:
    """Returns the path of a file of the repository "hf:REPO", or None if the repository has no such file.

    The cache comes first, so that a file that was downloaded once needs no network.
    """
    repo = name.removeprefix("hf:")
    if not repo:
        raise DataError(f"tokenizer: found {name!r}, wanted hf:REPO, e.g. hf:openai-community/gpt2")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DeviceError(
            f"tokenizer {name!r} needs the package huggingface_hub, which is not installed: pip install 'gptperf[hf]'"
        ) from error
    try:
        with contextlib.suppress(OSError, ValueError):
            return Path(hub.hf_hub_download(repo, file, local_files_only=True))
        return Path(hub.hf_hub_download(repo, file))
    except (OSError, ValueError, RuntimeError) as error:
        # Without an answer of the hub the error is a FileNotFoundError too.
        if isinstance(error, hub.errors.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            return None
        line = (str(error).splitlines() or [""])[0]
        remedy = by_hand(f"{TOKENIZER_JSON} and {_CONFIG}", f"{repo}/tree/main", "use --tokenizer=FOLDER")
        raise NoVocabularyError(
            f"tokenizer {name!r}: {file} cannot be downloaded ({type(error).__name__}: {line}). {remedy}, {CACHE}"
        ) from error


def _canonical(value: object) -> bytes:
    """Returns JSON whose bytes do not depend on the order of keys, spaces or escapes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
