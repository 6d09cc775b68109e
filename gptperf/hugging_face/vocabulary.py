"""The tokenizer of a model that another program stored, which goes into its checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptperf.config import ModelConfig
from gptperf.data.json_tokenizer import TOKENIZER_JSON
from gptperf.data.tokenizers import load_tokenizer
from gptperf.errors import DataError

__all__ = ["CONFIGS", "find_tokenizer"]

CONFIGS = ("tokenizer_config.json", "generation_config.json")
"""Files of a model that name the token that ends a document, besides config.json."""
_GPT2_SIZES = (50257, 50304)
"""Sizes of the vocabulary of GPT-2: its own, and nanoGPT's, which is padded."""


def find_tokenizer(
    source: Path, model: ModelConfig, name: str, eot: str, tell: Callable[[str], object]
) -> tuple[dict[str, str | int], Mapping[str, bytes]]:
    """Returns what a checkpoint's state tells about the tokenizer, and the files of the tokenizer.

    Args:
        source: Folder or file of the model.
        model: Its architecture.
        name, eot, tell: As in `gptperf.hugging_face.convert`.

    Raises:
        DataError: The tokenizer is unknown, cannot be loaded, or has more ids than the model.
        DeviceError: A package is not installed.
    """
    inside = source / TOKENIZER_JSON
    if not name:
        name = str(inside) if inside.exists() else "gpt2" if model.vocab_size in _GPT2_SIZES else "unknown"
        if name == "unknown":
            tell(f"tokenizer: found no {TOKENIZER_JSON}, so that sample needs one; --tokenizer=NAME gives it")
    if name == "unknown":
        return {"name": name, "fingerprint": ""}, {}
    end = eot or (_named_by_id(source) if name == str(inside) else None)
    tokenizer = load_tokenizer(name, eot=end, instead=", or give --tokenizer=unknown")
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{source}: found tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, and a model with "
            f"vocab_size = {model.vocab_size:,}; wanted --tokenizer=PATH of the model's own, or --tokenizer=unknown"
        )
    ids = f"{tokenizer.vocab_size:,} ids" + (f" of {model.vocab_size:,}" * (tokenizer.vocab_size < model.vocab_size))
    tell(f"tokenizer: {tokenizer.name} with {ids}; {tokenizer.eot} ends a document")
    described: dict[str, str | int] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    return described | {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}, tokenizer.files


def _named_by_id(folder: Path) -> str | None:
    """Returns the special token whose id the model's configuration names as the end, or None.

    None too if tokenizer_config.json names one, which `load_tokenizer` reads.
    """
    if _content(folder / CONFIGS[0]).get("eos_token"):
        return None
    added = _content(folder / TOKENIZER_JSON).get("added_tokens")
    special = {
        token["id"]: token["content"]
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and token.get("special") and {"id", "content"} <= token.keys()
    }
    for name in (CONFIGS[1], "config.json"):
        found = _content(folder / name).get("eos_token_id")
        for token in found if isinstance(found, list) else [found]:
            if isinstance(token, int) and token in special:
                return str(special[token])
    return None


def _content(path: Path) -> Mapping[str, Any]:
    """Returns the object in a JSON file, or an empty one if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
