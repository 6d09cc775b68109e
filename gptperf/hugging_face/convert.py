"""Writes the checkpoint of a model of Hugging Face, of nanoGPT, or of a GGUF file."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf import checkpoint
from gptperf.checkpoint import Checkpoint
from gptperf.config import Config, ModelConfig
from gptperf.data.hub import CACHE, by_hand
from gptperf.data.json_tokenizer import TOKENIZER_JSON
from gptperf.errors import CheckpointError, DeviceError
from gptperf.files import replace_text
from gptperf.hugging_face.architecture import model_config
from gptperf.hugging_face.gguf_file import read_gguf
from gptperf.hugging_face.nanogpt import read_nanogpt
from gptperf.hugging_face.own_config import OWN
from gptperf.hugging_face.stored_tensors import INDEX, WEIGHTS, StoredTensors, of_folder
from gptperf.hugging_face.vocabulary import CONFIGS, find_tokenizer
from gptperf.hugging_face.weights import Find, layout, weights
from gptperf.model import GPT
from gptperf.monitor.run_lock import RunLock
from gptperf.training.matching import DERIVED
from gptperf.training.saved_state import VOCABULARY, vocabulary_tensors

__all__ = ["CONFIG", "convert", "downloaded", "read", "read_model"]

CONFIG, _ADAPTER, _HEAD = "config.json", "adapter_config.json", "lm_head.weight"
_FILES = (CONFIG, WEIGHTS, INDEX, TOKENIZER_JSON, *CONFIGS)


def convert(
    source: Path,
    out_dir: Path,
    tokenizer: str = "",
    eot: str = "",
    *,
    vocab_multiple: int = 1,
    nanogpt: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[Path, ModelConfig]:
    """Writes the checkpoint and model.toml of a model that another program stored.

    Args:
        source, tokenizer, eot, vocab_multiple, nanogpt, tell: As for `read`.
        out_dir: Folder for the checkpoint and model.toml.

    Returns:
        Folder of the checkpoint, and the architecture.

    Raises:
        CheckpointError: As for `read`; or `out_dir` has checkpoints.
        DataError, DeviceError: As for `read`.
        DiskError: The checkpoint cannot be written.
    """
    found = read(source, tokenizer, eot, vocab_multiple=vocab_multiple, nanogpt=nanogpt, tell=tell)
    keys = found.state["config"]["model"]
    model = ModelConfig(**keys)
    keys = keys | {"n_kv_head": model.kv_heads, "d_ff": model.ffn_width}
    lines = ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None)]
    with RunLock(out_dir):
        checkpoint.clean(out_dir / "checkpoints")
        if any((out_dir / "checkpoints").glob("step-*")):
            raise CheckpointError(f"{out_dir}: found checkpoints, wanted another --out_dir")
        replace_text(out_dir / "model.toml", "\n".join(lines) + "\n")
        path = checkpoint.save(out_dir / "checkpoints", step=0, tensors=found.tensors, state=found.state)
    return path, model


def read(
    source: Path,
    tokenizer: str = "",
    eot: str = "",
    *,
    vocab_multiple: int = 1,
    nanogpt: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Checkpoint:
    """Reads a model that another program stored into the checkpoint that it would have as a run, in memory.

    Args:
        source: Folder of a Hugging Face model, a GGUF file, or a checkpoint of nanoGPT.
        tokenizer: Name of the tokenizer for `load_tokenizer`, or "unknown". "" means the folder's tokenizer.json;
            without one, gpt2 for a vocabulary of GPT-2's size, and unknown for any other.
        eot: Token that ends a document; "": the one that the tokenizer or the model names.
        vocab_multiple: The embedding and lm_head are padded to a multiple of this number of rows.
        nanogpt: Whether the source is a checkpoint of nanoGPT.
        tell: Called with each line that the user should read.

    Raises:
        CheckpointError: gptperf does not support the model, or its files are corrupt.
        DataError: The tokenizer is unknown, cannot be loaded, or has more ids than the model.
        DeviceError: A package of the tokenizer or of the file is not installed.
    """
    model, stored = _opened(source, nanogpt)
    told_tokenizer, vocabulary = find_tokenizer(source, model, tokenizer, eot, tell)
    model, found = _weights(model, stored, tell)
    model = replace(model, vocab_multiple=vocab_multiple)
    found |= {name: _padded(found[name], model) for name in ("wte.weight", _HEAD) if name in found}
    state: dict[str, Any] = {
        "config": Config(model=model).sections(),
        "model": {name: getattr(model, name) for name in DERIVED},
        "tokenizer": told_tokenizer,
        "source": str(source),
    }
    tensors = {"model": found} | ({VOCABULARY: vocabulary_tensors(vocabulary)} if vocabulary else {})
    return Checkpoint(path=source, step=0, tensors=tensors, state=state, metric=None)


def read_model(
    source: Path, *, nanogpt: bool = False, tell: Callable[[str], object] = lambda line: None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Returns the architecture of a model, and the float32 values of every parameter by its name here.

    The arguments are those of `read`.

    Raises:
        CheckpointError: gptperf does not support the model, or its files are corrupt.
        DeviceError: The package gguf, which the file needs, is not installed.
    """
    return _weights(*_opened(source, nanogpt), tell)


def _opened(source: Path, nanogpt: bool) -> tuple[ModelConfig, StoredTensors]:
    """Returns the architecture and the tensors of a model."""
    if nanogpt:
        return read_nanogpt(source)
    if source.suffix == ".gguf":
        return read_gguf(source)
    if source.is_file():
        hint = "; nearest: --nanogpt" if source.suffix == ".pt" else ""
        raise CheckpointError(f"{source}: found a file, wanted a folder with {CONFIG}, or a file *.gguf{hint}")
    if (source / _ADAPTER).exists():
        raise CheckpointError(
            f"{source}: found {_ADAPTER}, wanted a whole model: merge the adapter into its base first"
        )
    near = next((f"; nearest: {path}" for path in sorted(source.glob("*.gguf"))), "")
    try:
        described = json.loads((source / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source / CONFIG}: cannot be read: {error}{near}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{source / CONFIG}: found JSON that is not an object, wanted the description of a model")
    stored = of_folder(source)
    stored.own = described.get("model_type") == OWN
    return model_config(described), stored


def _tied(model: ModelConfig, stored: StoredTensors, tell: Callable[[str], object]) -> tuple[ModelConfig, Find]:
    """Returns the model and how to find its tensors, where the embedding and a tied lm_head may both be stored.

    The weight of a tied lm_head is stored under one of the two names, or under both. If the two differ, both are kept
    and the model is not tied, as in transformers.
    """
    if not model.weight_tying or _HEAD not in stored:
        return model, stored.find
    (embedding,) = next(iter(layout(model, stored.own))).theirs
    if embedding not in stored:
        return model, lambda name: stored.find(_HEAD if name == embedding else name)
    head, weight = stored.find(_HEAD), stored.find(embedding)
    if torch.equal(head, weight):
        return model, stored.find
    tell(
        f"{_HEAD} is not the embedding although the model says that they are tied: both are kept, weight_tying = false"
    )
    return replace(model, weight_tying=False), stored.find


def _weights(
    model: ModelConfig, stored: StoredTensors, tell: Callable[[str], object]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Returns the model, which may be found not to be tied, and every parameter by its name.

    Raises:
        CheckpointError: A tensor is missing or has another shape, or there is one that the model does not have.
    """
    model, find = _tied(model, stored, tell)
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in GPT(model).named_parameters()}
    found = {name: tensor.contiguous() for name, tensor in weights(model, find, stored.own)}
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{stored.where}: found {tuple(found[name].shape)} for {name}, wanted {tuple(shape)}")
    if stored.unused():
        names = ", ".join(stored.unused()[:5])
        raise CheckpointError(f"{stored.where}: found weights that the model does not have: {names}")
    return model, found


def _padded(matrix: Tensor, model: ModelConfig) -> Tensor:
    """Returns the rows of a vocabulary with the model's padding, each row of which is the mean of the others.

    The ids of the padding then have the mean logit, so that n of them raise the loss by at most log(1 + n / V); rows of
    zeros would be the likeliest ids of a model whose logits are negative.
    """
    rows = model.padded_vocab_size - len(matrix)
    return torch.cat([matrix, matrix.double().mean(0, keepdim=True).float().expand(rows, -1)]) if rows else matrix


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
