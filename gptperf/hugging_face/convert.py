"""Writes the checkpoint of a Hugging Face model."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf import checkpoint
from gptperf.config import Config, ModelConfig
from gptperf.data.hub import CACHE, by_hand
from gptperf.data.json_tokenizer import TOKENIZER_JSON
from gptperf.data.tokenizers import load_tokenizer
from gptperf.errors import CheckpointError, DataError, DeviceError
from gptperf.files import replace_text
from gptperf.hugging_face.architecture import model_config
from gptperf.hugging_face.stored_tensors import INDEX, WEIGHTS, StoredTensors
from gptperf.hugging_face.weights import weights
from gptperf.model import GPT
from gptperf.monitor.run_lock import RunLock
from gptperf.training.saved_state import VOCABULARY, vocabulary_tensors

__all__ = ["CONFIG", "convert", "downloaded", "read_model"]

CONFIG = "config.json"
_FILES = (CONFIG, WEIGHTS, INDEX, TOKENIZER_JSON, "tokenizer_config.json")


def convert(folder: Path, out_dir: Path, tokenizer: str = "", eot: str = "") -> tuple[Path, ModelConfig]:
    """Writes the checkpoint and model.toml of a Hugging Face model.

    Args:
        folder: Folder of the Hugging Face model.
        out_dir: Folder for the checkpoint and model.toml.
        tokenizer: Name of the tokenizer for `load_tokenizer`, or "unknown". "" means the folder's tokenizer.json;
            without one, gpt2 for a vocabulary of 50257, and unknown for any other.
        eot: Token that ends a document; "": the one that the tokenizer names.

    Returns:
        Folder of the checkpoint, and the architecture.

    Raises:
        CheckpointError: gptperf does not support the model, its files are corrupt, or `out_dir` has checkpoints.
        DataError: The tokenizer is unknown, cannot be loaded, or has more ids than the model.
        DeviceError: A package of the tokenizer is not installed.
        DiskError: The checkpoint cannot be written.
    """
    model, found = read_model(folder)
    described_tokenizer, vocabulary = _tokenizer(folder, model, tokenizer, eot)
    config = Config(model=model)
    state: dict[str, Any] = {
        "config": config.sections(),
        "model": {name: getattr(model, name) for name in ("kv_heads", "ffn_width", "padded_vocab_size")},
        "tokenizer": described_tokenizer,
        "source": str(folder),
    }
    with RunLock(out_dir):
        checkpoint.clean(out_dir / "checkpoints")
        if any((out_dir / "checkpoints").glob("step-*")):
            raise CheckpointError(f"{out_dir}: found checkpoints, wanted another --out_dir")
        keys = config.sections()["model"] | {"n_kv_head": model.kv_heads, "d_ff": model.ffn_width}
        lines = ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        replace_text(out_dir / "model.toml", "\n".join(lines) + "\n")
        tensors = {"model": found} | ({VOCABULARY: vocabulary_tensors(vocabulary)} if vocabulary else {})
        return checkpoint.save(out_dir / "checkpoints", step=0, tensors=tensors, state=state), model


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Reads a Hugging Face model.

    Args:
        folder: Folder of the model.

    Returns:
        The architecture, and the float32 values of every parameter by its name here.

    Raises:
        CheckpointError: gptperf does not support the model, or its files are corrupt.
    """
    try:
        described = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{folder / CONFIG}: found no object, wanted the description of a model")
    model = model_config(described)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(model).named_parameters()}
    stored = StoredTensors(folder)
    found = {name: tensor.contiguous() for name, tensor in weights(model, stored.find)}
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{folder}: found {tuple(found[name].shape)} for {name}, wanted {tuple(shape)}")
    if stored.unused():
        raise CheckpointError(f"{folder}: found weights that the model does not have: {', '.join(stored.unused()[:5])}")
    return model, found


def _tokenizer(
    folder: Path, model: ModelConfig, name: str, eot: str
) -> tuple[dict[str, str | int], Mapping[str, bytes]]:
    """Returns what a checkpoint's state tells about the tokenizer, and the files of the tokenizer; see `convert`."""
    if not name:
        inside = folder / TOKENIZER_JSON
        name = str(inside) if inside.exists() else "gpt2" if model.vocab_size == 50257 else "unknown"
    if name == "unknown":
        return {"name": name, "fingerprint": ""}, {}
    tokenizer = load_tokenizer(name, eot=eot or None)
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{folder}: found tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, and vocab_size = "
            f"{model.vocab_size:,} in config.json; wanted --tokenizer=PATH of the model's own, or --tokenizer=unknown"
        )
    described: dict[str, str | int] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    return described | {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}, tokenizer.files


def downloaded(name: str) -> Path:
    """Downloads a model from the Hugging Face hub and returns its folder."""
    repo = name.removeprefix("hf:")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DeviceError(f"{name} needs the package huggingface_hub: pip install 'gptperf[hf]'") from error
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=list(_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        remedy = by_hand(", ".join(_FILES), f"{repo}/tree/main", "give FOLDER in place of the name")
        raise CheckpointError(
            f"{name}: cannot be downloaded ({type(error).__name__}: {line}). {remedy}, {CACHE}"
        ) from error
