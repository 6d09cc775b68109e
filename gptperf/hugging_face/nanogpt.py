"""Checkpoints of nanoGPT: its names and sizes, read without running code from the file."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf.config import Config, ModelConfig
from gptperf.errors import CheckpointError, ConfigError
from gptperf.hugging_face.stored_tensors import StoredTensors, bare

__all__ = ["read_nanogpt"]

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_ARGUMENTS = {"bias": True, "dropout": 0.0}
"""Further keys of model_args, and their defaults."""


def read_nanogpt(path: Path) -> tuple[ModelConfig, StoredTensors]:
    """Returns the architecture and the tensors of a checkpoint of nanoGPT, a dictionary with model and model_args.

    The file is a pickle. PyTorch reads tensors and plain values from it and refuses everything else.

    Raises:
        CheckpointError: The file cannot be read, or is no checkpoint of nanoGPT.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path}: cannot be read as tensors and plain values: {reason}") from error
    arguments, state = (saved.get(key) if isinstance(saved, dict) else None for key in ("model_args", "model"))
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: found no model and model_args, wanted a checkpoint of nanoGPT")
    tensors = {
        bare(str(name).removeprefix("_orig_mod.")): value for name, value in state.items() if isinstance(value, Tensor)
    }
    return _model(path, arguments), StoredTensors(path, {n: partial(_as_gpt2, n, t) for n, t in tensors.items()})


def _model(path: Path, arguments: Mapping[str, Any]) -> ModelConfig:
    missing = [name for name in _SIZES if name not in arguments]
    unknown = [name for name in arguments if name not in (*_SIZES, *_ARGUMENTS)]
    if missing or unknown:
        found = f"found no {missing[0]}" if missing else f"found {unknown[0]} = {arguments[unknown[0]]!r}"
        raise CheckpointError(f"{path}: model_args: {found}, wanted {', '.join((*_SIZES, *_ARGUMENTS))}")
    values = _ARGUMENTS | dict(arguments)
    try:
        model = ModelConfig(
            arch_preset="custom",
            normalization="layernorm" if values["bias"] else "layernorm_nobias",
            activation="gelu",
            position_encoding="learned_absolute",
            norm_position="pre",
            ffn_type="standard",
            weight_tying=True,
            norm_eps=1e-5,
            **values,
        )
        return Config(model=model).model  # which checks the keys together, too
    except ConfigError as error:
        raise CheckpointError(f"{path}: model_args: {error}") from error


def _as_gpt2(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor as GPT-2 of Hugging Face stores it, which keeps the transpose of a linear layer's matrix."""
    linear = ".attn." in name or ".mlp." in name
    return tensor.t() if linear and tensor.ndim == 2 else tensor
