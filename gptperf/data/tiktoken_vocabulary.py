"""The vocabularies of tiktoken: by name from tiktoken itself, or from the two files that travel with a data set."""

import base64
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gptperf.data.vocabulary import (
    NoVocabularyError,
    RefusedError,
    Tokens,
    as_array,
    as_text,
    encode_in_pieces,
    token_dtype,
)
from gptperf.errors import DataError

if TYPE_CHECKING:
    import tiktoken

__all__ = ["RANKS", "TiktokenTokenizer", "vocabulary_fingerprint"]

RANKS = "ranks.tiktoken"
"""File of the vocabulary in tiktoken's own format: a line for each token, its bytes in base64 and its rank."""
_RULES = "tiktoken.json"
"""File of the pattern that splits a text, the special tokens and the id that ends a document."""
_END_OF_TEXT = "<|endoftext|>"


class TiktokenTokenizer:
    """A vocabulary of tiktoken.

    Args:
        name: Name of the tokenizer.
        encoding: The encoding of tiktoken.
        eot: The special token that ends a document.

    Raises:
        DataError: The vocabulary does not have this special token.
    """

    def __init__(self, name: str, encoding: "tiktoken.Encoding", eot: str = _END_OF_TEXT) -> None:
        self.name = name
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        if eot not in encoding.special_tokens_set:
            known = ", ".join(sorted(encoding.special_tokens_set)[:10]) or "none"
            raise DataError(
                f"tokenizer {name!r}: found no {eot} token to end a document; wanted --eot=TOKEN, one of {known}"
            )
        self.eot = encoding.encode_single_token(eot)
        self._dtype = token_dtype(self.vocab_size)

    @classmethod
    def download(cls, name: str, eot: str | None = None, instead: str = "") -> "TiktokenTokenizer":
        """Returns a vocabulary by its name ("gpt2", "cl100k_base", ...), from tiktoken's cache or the network.

        Args:
            name: The name.
            eot: The special token that ends a document; None: <|endoftext|>.
            instead: What else the user can do if the vocabulary is not available, for the end of the message.

        Raises:
            DataError: The vocabulary is neither in the cache nor can it be downloaded, or it has no token `eot`.
        """
        return cls(name, _get_encoding(name, instead), eot or _END_OF_TEXT)

    @classmethod
    def from_files(cls, name: str, files: Mapping[str, bytes]) -> "TiktokenTokenizer":
        """Returns the vocabulary of the files that `files` returned; needs no network and no cache.

        Raises:
            DataError: A file is missing or is not what `files` returns.
        """
        import tiktoken

        try:
            ranks = {}
            for line in files[RANKS].splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            rules = json.loads(files[_RULES])
            special = {str(text): int(token) for text, token in rules["special_tokens"].items()}
            # tiktoken ends the process's thread with a panic if a byte has no rank or a rank has two tokens.
            if len({*ranks.values(), *special.values()}) != len(ranks) + len(special):
                raise ValueError("two tokens have the same id")
            if not all(bytes([byte]) in ranks for byte in range(256)):
                raise ValueError("a byte has no token")
            encoding = tiktoken.Encoding(
                name, pat_str=str(rules["pattern"]), mergeable_ranks=ranks, special_tokens=special
            )
            return cls(name, encoding, next(text for text, token in special.items() if token == rules["eot"]))
        except (LookupError, ValueError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"tokenizer {name!r}: {RANKS} and {_RULES} are not a vocabulary: {error!r}") from error

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """The files that define the vocabulary."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        rules = {
            "pattern": self.encoding._pat_str,
            "special_tokens": dict(sorted(self.encoding._special_tokens.items(), key=lambda item: item[1])),
            "eot": self.eot,
        }
        return {
            RANKS: b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks),
            _RULES: json.dumps(rules, indent=1).encode() + b"\n",
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary; an id without bytes has an entry of its own."""
        return vocabulary_fingerprint((self._token_bytes(i) for i in range(self.vocab_size)), self.eot)

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the ids of `text`, (n,) uint16 or uint32.

        The text of a special token is encoded as ordinary text, and a lone surrogate as "?".

        Raises:
            DataError: `text` is bytes and not UTF-8, or tiktoken cannot encode a part of it.
        """
        return encode_in_pieces(self.name, as_text(self.name, text), self._encode)

    def _encode(self, text: str) -> Tokens:
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except ValueError as error:  # the regular expression gives up, as on a million spaces
            raise RefusedError(str(error)) from error
        return ids.astype(self._dtype)

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; ids without bytes (padding of the vocabulary) are dropped."""
        found = (self._token_bytes(int(i)) for i in as_array(ids))
        return b"".join(piece for piece in found if piece is not None).decode("utf-8", errors="replace")

    def _token_bytes(self, token: int) -> bytes | None:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return None


def vocabulary_fingerprint(vocabulary: Iterable[bytes | None], eot: int) -> str:
    """Returns the SHA-256 (hex) over the bytes of every id, and `eot`; None stands for an id without bytes."""
    digest = hashlib.sha256(b"gptperf vocabulary 1\n")
    for piece in vocabulary:
        # The length before the bytes makes the streams of two vocabularies differ; -1 stands for an id without bytes.
        size = -1 if piece is None else len(piece)
        digest.update(size.to_bytes(4, "little", signed=True) + (piece or b""))
    digest.update(eot.to_bytes(8, "little"))
    return digest.hexdigest()


def _get_encoding(name: str, instead: str) -> "tiktoken.Encoding":
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # every error of requests is an OSError, and so is an unreadable cache
        where = f": {error.filename}" if error.filename else ""
        raise NoVocabularyError(
            f"tokenizer {name!r}: its vocabulary is not in tiktoken's cache and cannot be downloaded "
            f"({type(error).__name__}{where}). {_by_hand(error)}{instead}"
        ) from error
    except ValueError as error:  # an unknown name, or a download whose checksum is not the one that tiktoken expects
        raise NoVocabularyError(f"tokenizer {name!r}: tiktoken cannot load it: {str(error).splitlines()[0]}") from error


def _by_hand(error: OSError) -> str:
    """Returns what to fetch elsewhere, and under which name tiktoken finds it."""
    # tiktoken's own rule for the folder; set to "", its cache is off.
    variables = (os.environ.get(name) for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    folder = next((value for value in variables if value is not None), None)
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
    request: Any = getattr(error, "request", None)
    url = str(getattr(request, "url", None) or "")
    urls = [url] if url else []
    if url.endswith("/vocab.bpe"):  # GPT-2's vocabulary has two files
        urls.append(url.removesuffix("vocab.bpe") + "encoder.json")
    names = [f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in urls]
    where = (
        f"{folder}, or any folder that TIKTOKEN_CACHE_DIR names" if folder else "a folder; TIKTOKEN_CACHE_DIR names it"
    )
    if not names:
        return f"Run once with a network, or set TIKTOKEN_CACHE_DIR to a folder that holds it (now: {folder or 'off'})"
    return f"By hand: fetch {' and '.join(names)} into {where}"
