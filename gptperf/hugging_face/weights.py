"""Where a parameter of gptperf lies in a model of Hugging Face. Import and export read the same layout."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.errors import CheckpointError

__all__ = ["Find", "Stored", "layout", "weights"]

Find = Callable[[str], Tensor]
"""Returns a tensor by its name in Hugging Face's model."""

# The name of a part of a block here -> its names in a block of GPT-2, and of LLaMA, Mistral and Qwen. A packed matrix
# is several matrices there, one below the other.
_GPT2 = {
    "norm1": ("ln_1",),
    "norm2": ("ln_2",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "ffn.up": ("mlp.c_fc",),
    "ffn.out": ("mlp.c_proj",),
}
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


def layout(model: ModelConfig, own: bool = False) -> Iterator[Stored]:
    """Yields how Hugging Face stores every parameter of a model.

    A model with SwiGLU has the names of LLaMA, any other model those of GPT-2; with `own` both have the names here, as
    in `gptperf.hugging_face.modeling_gptperf`.
    """
    if own:
        yield from (Stored(stored.ours, (stored.ours,)) for stored in layout(model))
        return
    llama = model.ffn_type == "swiglu"
    blocks, parts, last = ("layers", _LLAMA, "norm") if llama else ("h", _GPT2, "ln_f")
    yield Stored("wte.weight", ("embed_tokens.weight" if llama else "wte.weight",))
    if model.position_encoding == "learned_absolute":
        yield Stored("position.wpe.weight", ("wpe.weight",))
    for i in range(model.n_layer):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias") if _has_bias(model, ours) else ("weight",):
                names = tuple(f"{blocks}.{i}.{name}.{kind}" for name in theirs)
                yield Stored(f"blocks.{i}.{ours}.{kind}", names, transposed=not llama and not ours.startswith("norm"))
        for name in ("q_norm", "k_norm") if model.qk_norm else ():
            yield Stored(f"blocks.{i}.attention.{name}", (f"{blocks}.{i}.self_attn.{name}.weight",))
    for kind in ("weight", "bias") if _has_bias(model, "norm") else ("weight",):
        yield Stored(f"norm.{kind}", (f"{last}.{kind}",))
    if not model.weight_tying:
        yield Stored("lm_head.weight", ("lm_head.weight",))


def _has_bias(model: ModelConfig, part: str) -> bool:
    if part.startswith("norm"):
        return model.normalization == "layernorm"
    if part.startswith("attention"):
        return model.attention_biases in (("qkv", "all") if part == "attention.qkv" else ("all",))
    return model.bias


def weights(model: ModelConfig, find: Find, own: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every parameter of gptperf's model, made from the tensors of Hugging Face's model.

    Args:
        model: What `model_config` returned.
        find: Returns a tensor by its name in Hugging Face's model, without the prefix "transformer." or "model.".
        own: As in `layout`.

    Raises:
        CheckpointError: Tensors that are one parameter have different columns.
    """
    for stored in layout(model, own):
        parts = [find(name) for name in stored.theirs]
        if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
            found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(stored.theirs, parts, strict=True))
            raise CheckpointError(f"found {found}, wanted matrices or vectors with the same columns")
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield stored.ours, value.t() if stored.transposed else value  # .t() does not change a vector
