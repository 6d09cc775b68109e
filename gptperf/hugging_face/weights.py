"""Where a parameter of gptperf lies in a model of Hugging Face. Import and export read the same layout."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptperf.config import ModelConfig

__all__ = ["Find", "Stored", "layout", "weights"]

Find = Callable[[str], Tensor]
"""Returns a tensor by its name in Hugging Face's model."""

# Hugging Face's name of a part of a GPT-2 block -> its name here.
_GPT2 = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.out"}
_GPT2 |= {"ln_1": "norm1", "ln_2": "norm2"}
# The same for LLaMA. A packed matrix is several matrices there, one below the other.
_LLAMA = {
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.out": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Stored:
    """How Hugging Face stores one parameter of gptperf."""

    ours: str
    """Name of the parameter here."""
    theirs: tuple[str, ...]
    """Names of the tensors there, without the prefix "transformer." or "model."; they are rows of the parameter."""
    transposed: bool = False
    """Whether the matrix is stored as its transpose."""


def layout(model: ModelConfig) -> Iterator[Stored]:
    """Yields how Hugging Face stores every parameter of a model that `model_config` returned."""
    blocks = range(model.n_layer)
    if model.ffn_type == "swiglu":
        yield Stored("wte.weight", ("embed_tokens.weight",))
        for i in blocks:
            for ours, theirs in _LLAMA.items():
                names = tuple(f"layers.{i}.{name}.weight" for name in theirs)
                yield Stored(f"blocks.{i}.{ours}.weight", names)
        yield Stored("norm.weight", ("norm.weight",))
    else:
        yield Stored("wte.weight", ("wte.weight",))
        yield Stored("position.wpe.weight", ("wpe.weight",))
        for kind in ("weight", "bias"):
            for i in blocks:
                for name, ours in _GPT2.items():
                    yield Stored(f"blocks.{i}.{ours}.{kind}", (f"h.{i}.{name}.{kind}",), transposed=True)
            yield Stored(f"norm.{kind}", (f"ln_f.{kind}",))
    if not model.weight_tying:
        yield Stored("lm_head.weight", ("lm_head.weight",))


def weights(model: ModelConfig, find: Find) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every parameter of gptperf's model, made from the tensors of Hugging Face's model.

    Args:
        model: What `model_config` returned.
        find: Returns a tensor by its name in Hugging Face's model, without the prefix "transformer." or "model.".
    """
    for stored in layout(model):
        parts = [find(name) for name in stored.theirs]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield stored.ours, value.t() if stored.transposed else value  # .t() does not change a vector
