"""Models in GGUF files, the format of llama.cpp, read by the package `gguf` (extra gguf).

The metadata of a file is told as a config.json tells it, and its tensors are read by the names of Hugging Face. Its
tokenizer is not read.
"""

import importlib
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.errors import CheckpointError, DeviceError
from gptperf.hugging_face.architecture import model_config
from gptperf.hugging_face.stored_tensors import StoredTensors
from gptperf.model.position import frequencies

__all__ = ["read_gguf"]

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
"""Key of the metadata after the name of the architecture -> its key in a config.json."""
_REQUIRED = tuple(_KEYS)[:5]
_CHECKED = ("vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.finetuned")
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a layer in a GGUF file -> in Hugging Face's LLaMA."""
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read_gguf(path: Path) -> tuple[ModelConfig, StoredTensors]:
    """Returns the architecture and the tensors of a GGUF file.

    Raises:
        CheckpointError: The file is corrupt or a part of several, or has a part that gptperf does not have.
        DeviceError: The package gguf is not installed.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise DeviceError(
            f"{path} needs the package gguf, which is not installed: pip install 'gptperf[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from error
    if facts.get("split.count", 1) > 1:
        raise CheckpointError(f"{path}: found one of {facts['split.count']} files, wanted the model in one file")
    stored = {tensor.name: partial(_dequantized, gguf, path, tensor) for tensor in reader.tensors}
    kind = facts.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in facts.items() if name.startswith(f"{kind}.")}
    described = {"model_type": kind, **_described(path, own, stored)}
    if kind == "llama" and "sliding_window" in described:
        described["model_type"] = "mistral"
    try:
        model = model_config(described)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: its keys, as those of a config.json: {error}") from error
    read = {_name(name): tensor for name, tensor in stored.items() if name != _FREQUENCIES}
    if kind == "llama":
        read |= {name: partial(_unpermuted, tensor, model) for name, tensor in read.items() if _is_permuted(name)}
    return _scaled(path, model, described, stored), StoredTensors(path, read)


def _described(path: Path, own: Mapping[str, Any], stored: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    for name, value in own.items():
        if name not in (*_KEYS, *_CHECKED, *_SCALING):
            raise CheckpointError(f"{path}: {name}: found {value!r}; gptperf does not know this key")
        if isinstance(value, list):
            raise CheckpointError(f"{path}: {name}: found {value[:8]!r}, wanted one number for all layers")
    for name in _REQUIRED:
        if name not in own:
            raise CheckpointError(f"{path}: found no {name}, which every model needs")
        if not isinstance(own[name], int) or own[name] < 1:
            raise CheckpointError(f"{path}: {name}: found {own[name]!r}, wanted a number above 0")
    found = {ours: _shortest(own[name]) for name, ours in _KEYS.items() if name in own}
    head_dim = own.get("attention.key_length", found["hidden_size"] // found["num_attention_heads"])
    for name in ("rope.dimension_count", "attention.value_length"):
        if own.get(name, head_dim) != head_dim:
            raise CheckpointError(f"{path}: {name}: found {own[name]}, wanted {head_dim}, the width of a head")
    scaling = {ours: _shortest(own[name]) for name, ours in _SCALING.items() if name in own}
    if scaling.get("rope_type", "none") != "none":
        found["rope_scaling"] = scaling
    rows = stored["token_embd.weight"]().shape[0] if "token_embd.weight" in stored else 0
    found |= {"vocab_size": own.get("vocab_size", rows), "tie_word_embeddings": "output.weight" not in stored}
    if "blk.0.attn_output.bias" in stored:
        found["attention_bias"] = True
    return found


def _shortest(value: Any) -> Any:
    """Returns the shortest decimal number that float32 stores as this value; the file has 1e-5 as 9.99999974e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _name(name: str) -> str:
    """Returns Hugging Face's name of a tensor, without a prefix; an unknown one has its own."""
    place, _, layer = name.rpartition(".")[0].rpartition(".")
    prefix = place.replace("blk.", "layers.") + "." if place else ""
    return prefix + _NAMES.get(layer, layer) + "." + name.rpartition(".")[2]


def _is_permuted(name: str) -> bool:
    return name.rpartition(".")[0].endswith(("q_proj", "k_proj"))


def _dequantized(gguf: Any, path: Path, tensor: Any) -> Tensor:
    try:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: {tensor.name}: {error}") from error


def _unpermuted(read: Callable[[], Tensor], model: ModelConfig) -> Tensor:
    """Returns a projection of queries or keys whose heads have the order of rows that Hugging Face's RoPE rotates.

    llama.cpp rotates the rows 2i and 2i + 1 of a head of LLaMA, Hugging Face i and i + D/2.
    """
    tensor = read()
    if len(tensor) % model.head_width:
        return tensor  # the shape is refused later
    return tensor.unflatten(0, (-1, model.head_width // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def _scaled(
    path: Path, model: ModelConfig, described: Mapping[str, Any], stored: Mapping[str, Callable[[], Tensor]]
) -> ModelConfig:
    """Returns the model with the scaling of LLaMA 3.1, of which a file has the factor of each wavelength alone.

    Raises:
        CheckpointError: The factors are not those of LLaMA 3.1 with the known limits.
    """
    if _FREQUENCIES not in stored:
        return model
    factors = stored[_FREQUENCIES]().double()
    scaling = _LLAMA3 | {"factor": _shortest(factors.max().item()), "original_max_position_embeddings": 8192}
    found = model_config({**described, "rope_scaling": scaling})
    wanted = frequencies(model) / frequencies(found)
    if factors.shape != wanted.shape or not torch.allclose(factors, wanted, rtol=1e-4):
        raise CheckpointError(f"{path}: {_FREQUENCIES}: found other factors than those of rope_type 'llama3'")
    return found
