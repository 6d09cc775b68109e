"""Writes a checkpoint of gptperf as a folder that `from_pretrained` of transformers reads; needs no transformers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from gptperf.api import checkpoint_path, saved_tokenizer
from gptperf.checkpoint import Checkpoint, load
from gptperf.config import ModelConfig
from gptperf.data.tokenizers import Tokenizer, load_tokenizer
from gptperf.data.vocabulary import IDS
from gptperf.errors import CheckpointError, DataError, DiskError
from gptperf.files import free_bytes, new_folder, write_file
from gptperf.formats import byte_text
from gptperf.hugging_face.exported_config import ExportClass, config_json, export_class, generation_json
from gptperf.hugging_face.exported_tokenizer import tokenizer_files
from gptperf.hugging_face.exported_weights import SHARD_BYTES, exported_weights, write_weights
from gptperf.hugging_face.model_card import TRAIN_TOML, model_card, run_of, train_toml
from gptperf.hugging_face.own_config import MODELING, OWN
from gptperf.model import GPT
from gptperf.training.build import DTYPES
from gptperf.training.saved_state import VOCABULARY

__all__ = ["Exported", "export"]


class Exported(NamedTuple):
    """A model that was exported."""

    checkpoint: Path
    """Directory of the checkpoint."""
    kind: ExportClass
    """Class that reads the model."""
    tokenizer: str
    """Name of the tokenizer, or "" where there is none."""


def export(
    run: Path,
    folder: Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes the weights, configuration, tokenizer and model card of a checkpoint for transformers.

    Rows of the embedding beyond the vocabulary are kept, so that the logits do not change; the generation
    configuration excludes the ids that the tokenizer lacks.

    Args:
        run: Directory of a run, of its checkpoints, or of one checkpoint.
        folder: Folder to make; it may exist and be empty.
        checkpoint: Which checkpoint of a run: the newest one, or the one with the lowest validation loss.
        step: Iteration of the checkpoint of a run; None: `checkpoint` decides.
        dtype: Dtype of the stored weights. The master weights are float32, so float32 loses nothing.
        tokenizer: Name of the tokenizer for `load_tokenizer`, or "unknown" to leave it out; "": the checkpoint's.
        shard_bytes: Bytes of weights in one file.

    Raises:
        CheckpointError: There is no checkpoint, it is corrupt, it has a part that cannot be exported, or `folder` has
            files.
        DataError: The tokenizer is unknown, or has more ids than the model.
        DeviceError: A package of the tokenizer is not installed.
        DiskError: The folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    _check_empty(folder)
    found = load(checkpoint_path(Path(run), checkpoint, step), only=("model", "buffers", VOCABULARY))
    if step is not None and found.step != step:
        raise CheckpointError(f"{run}: found the checkpoint of step {found.step}, wanted --step={found.step}")
    model = ModelConfig(**found.state["config"]["model"])
    kind = export_class(model)
    _check_weights(found, model)
    known = None if tokenizer == "unknown" else _tokenizer(found, model, tokenizer)
    eot = None if known is None else known.eot
    texts = {} if known is None else tokenizer_files(known, model.block_size)
    texts |= {
        "config.json": _json(config_json(model, kind, dtype, eot)),
        "generation_config.json": _json(generation_json(model, eot, None if known is None else known.vocab_size)),
        "README.md": model_card(folder.name, model, kind, dtype, found, run_of(found)).encode(),
    }
    if found.state.get("train_state"):
        texts[TRAIN_TOML] = train_toml(found.state["config"]).encode()
    if kind.model_type == OWN:
        texts[MODELING] = Path(__file__).with_name(MODELING).read_bytes()
    tensors = dict(exported_weights(model, kind.model_type, found.tensors["model"]))
    needed = sum(tensor.numel() for tensor in tensors.values()) * DTYPES[dtype].itemsize
    if (free := free_bytes(folder)) < needed:
        raise DiskError(f"{folder}: {byte_text(free)} free, the model needs {byte_text(needed)}", full=True)
    with new_folder(folder) as temporary:
        write_weights(temporary, tensors, DTYPES[dtype], shard_bytes)
        for name, text in texts.items():
            write_file(temporary / name, [text], len(text))
    return Exported(found.path, kind, "" if known is None else known.name)


def _check_empty(folder: Path) -> None:
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()) or folder == Path.cwd()):
        what = "a file" if not folder.is_dir() else "files" if any(folder.iterdir()) else "the working directory"
        raise CheckpointError(f"{folder}: found {what}, wanted a folder that does not exist or is empty")


def _check_weights(found: Checkpoint, model: ModelConfig) -> None:
    """Checks that a checkpoint has exactly the parameters of its architecture.

    Raises:
        CheckpointError: A parameter is missing, has another shape, or is not one of the model.
    """
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in GPT(model).named_parameters()}
    there = {name: tuple(tensor.shape) for name, tensor in found.tensors["model"].items()}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise CheckpointError(
                f"{found.path}: found {there.get(name, 'nothing')} for {name}, wanted {wanted.get(name, 'nothing')}"
            )
    if found.tensors.get("buffers"):
        names = ", ".join(sorted(found.tensors["buffers"])[:5])
        raise CheckpointError(
            f"{found.path}: found buffers of a plugin ({names}), which no class of Hugging Face reads"
        )


def _tokenizer(found: Checkpoint, model: ModelConfig, name: str) -> Tokenizer:
    """Returns the tokenizer of a checkpoint, or the one called `name`."""
    saved = found.state["tokenizer"]
    if not name and (saved["name"] == "unknown" or saved["name"].startswith(IDS)):
        raise DataError(
            f"{found.path}: found tokenizer {saved['name']!r}, which has no vocabulary; wanted --tokenizer=NAME of the "
            "model's own, or --tokenizer=unknown to export the model without one"
        )
    if not name:
        return saved_tokenizer(found)
    tokenizer = load_tokenizer(name)
    if saved.get("fingerprint") and tokenizer.fingerprint != saved["fingerprint"]:
        raise DataError(
            f"--tokenizer: found {name!r}, wanted {saved['name']!r}, the tokenizer that the model was trained with; "
            "leave the flag out"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"--tokenizer: found {name!r} with {tokenizer.vocab_size:,} ids, and vocab_size = {model.vocab_size:,}; "
            "wanted at most as many ids as the model has"
        )
    return tokenizer


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
