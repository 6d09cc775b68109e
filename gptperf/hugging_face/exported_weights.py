"""The weights of an exported model: under Hugging Face's names, in one file or in several with an index."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptperf.checkpoint.tensor_file import header, write_tensors
from gptperf.config import ModelConfig
from gptperf.files import write_file
from gptperf.hugging_face.own_config import OWN
from gptperf.hugging_face.stored_tensors import INDEX
from gptperf.hugging_face.weights import layout

__all__ = ["SHARD_BYTES", "exported_weights", "write_weights"]

SHARD_BYTES = 5_000_000_000
"""Bytes of weights in one file, as transformers 4 has them; a larger tensor has a file of its own."""


def exported_weights(model: ModelConfig, model_type: str, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value, a view where possible, of every tensor of the Hugging Face model.

    Args:
        model: The architecture.
        model_type: What `export_class` returned.
        named: The parameters by their names here.
    """
    # The class of GPT-2 has biases that the model may lack.
    whole = model
    if model_type == "gpt2":
        whole = dataclasses.replace(model, normalization="layernorm", bias=True, attention_bias=None)
    turned = model_type not in (OWN, "gpt2") and model.rope_pairs == "interleaved"
    prefix = {"gpt2": "transformer.", OWN: ""}.get(model_type, "model.")
    for stored in layout(whole, own=model_type == OWN):
        value = named.get(stored.ours)
        if value is None:
            weight = named[stored.ours.removesuffix("bias") + "weight"]
            value = torch.zeros(len(weight), dtype=weight.dtype)
        sizes = _rows(model, stored.ours, len(value), len(stored.theirs))
        for name, part in zip(stored.theirs, value.split(sizes), strict=True):
            if turned and name.partition("self_attn.")[2].startswith(("q_", "k_")):
                part = _halves(part, model.head_width)
            yield name if name.startswith("lm_head") else prefix + name, part.t() if stored.transposed else part


def _rows(model: ModelConfig, ours: str, rows: int, parts: int) -> list[int]:
    """Returns the rows of each of the matrices there that are one parameter here."""
    if parts == 3:
        return [model.query_width, model.kv_width, model.kv_width]
    return [rows // parts] * parts


def _halves(rows: Tensor, D: int) -> Tensor:
    """Returns the rows of heads of width D, `(heads D, ...)`, in the order in which RoPE rotates i and i + D/2.

    The rows 2i and 2i + 1 of a head, which are rotated together here, become i and i + D/2.
    """
    return rows.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, most: int = SHARD_BYTES) -> None:
    """Writes tensors in a dtype to model.safetensors, or to numbered files with an index if they exceed `most` bytes.

    Raises:
        OSError: A file cannot be written.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * dtype.itemsize
        if shards[-1] and size + count > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + count, total + count
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        named = {name: tensors[name].to(dtype) for name in names}
        write_tensors(folder / file, named, header("model", named))
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2).encode() + b"\n"
        write_file(folder / INDEX, [text], len(text))
