"""Which class of transformers reads an exported model, and its config.json and generation_config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptperf.config import KEYS, ModelConfig
from gptperf.errors import CheckpointError
from gptperf.hugging_face.architecture import ACTIVATIONS, GPT2_NAMES, LLAMA_NAMES, ROPE_NAMES
from gptperf.hugging_face.own_config import EXPORTED, OWN, own_json
from gptperf.registry import KINDS

__all__ = ["ExportClass", "config_json", "export_class", "generation_json"]

# Class of transformers -> what an architecture may have, by the names of `_parts`. The first that fits is taken.
_LLAMA: dict[str, tuple[object, ...]] = {
    "normalization": ("rmsnorm",),
    "position_encoding": ("rope",),
    "norm_position": ("pre",),
    "ffn_type": ("swiglu",),
    "qk_norm": (False,),
    "bias": (False,),
    "logit_softcap": (0.0,),
}
_WINDOWS = ("full", "one", "one or full")
_CLASSES: dict[str, dict[str, tuple[object, ...]]] = {
    # GPT-2 has biases everywhere; those that the model lacks are stored as zeros.
    "gpt2": {
        "normalization": ("layernorm", "layernorm_nobias"),
        "position_encoding": ("learned_absolute",),
        "norm_position": ("pre",),
        "ffn_type": ("standard",),
        "qk_norm": (False,),
        "window": ("full",),
        "logit_softcap": (0.0,),
        "n_kv_head": ("n_head",),
        "head_dim": ("n_embd / n_head",),
    },
    "llama": _LLAMA | {"bias": (False, True), "attention_bias": ("none", "all"), "window": ("full",)},
    "mistral": _LLAMA | {"attention_bias": ("none",), "window": ("one",)},
    "qwen2": _LLAMA | {"attention_bias": ("qkv",), "window": _WINDOWS},
    "qwen3": _LLAMA | {"qk_norm": (True,), "attention_bias": ("none", "all"), "window": _WINDOWS},
}
_NAMES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    OWN: "GptperfForCausalLM",
}
_WITHOUT_EFFECT = frozenset(("arch_preset", "d_ff_multiple", "vocab_multiple", "attention_backend", "residual_init"))
"""Keys that change neither a parameter's meaning nor a logit, beyond the sizes that follow from them."""


@dataclasses.dataclass(frozen=True)
class ExportClass:
    """A class of transformers that computes what an architecture computes."""

    model_type: str
    """Value of `model_type` in config.json: gpt2, llama, mistral, qwen2, qwen3, or `OWN`."""
    reason: str
    """Why no class of transformers itself reads the model; "" where one does."""

    @property
    def name(self) -> str:
        """Name of the class."""
        return _NAMES[self.model_type]


def export_class(model: ModelConfig) -> ExportClass:
    """Returns the class that reads a model: the first of transformers that has its parts, else gptperf's own.

    Raises:
        CheckpointError: The model has a part that none of them has: a component of a plugin, or a newer key.
    """
    for kind, names in KINDS.items():
        found = getattr(model, kind)
        if found not in names:
            raise CheckpointError(
                f"{kind}: found {found!r} of a plugin, wanted one of {', '.join(names)}: no class of Hugging Face "
                "reads another one"
            )
    for field in dataclasses.fields(ModelConfig):
        value, usual = getattr(model, field.name), KEYS[field.name].default
        if field.name not in EXPORTED | _WITHOUT_EFFECT and value != usual:
            raise CheckpointError(
                f"{field.name}: found {value!r}, wanted {usual!r}: no class of Hugging Face reads another value"
            )
    parts = _parts(model)
    lacks = {
        kind: [f"{name} = {_shown(model, name)}" for name, values in wanted.items() if parts[name] not in values]
        for kind, wanted in _CLASSES.items()
    }
    kind = min(lacks, key=lambda kind: len(lacks[kind]))
    if not lacks[kind]:
        return ExportClass(kind, "")
    return ExportClass(OWN, f"{_NAMES[kind]} has no {', '.join(lacks[kind])}")


def _parts(model: ModelConfig) -> dict[str, object]:
    """Returns the parts of an architecture that decide its class, by key."""
    limits = {window for window in model.windows if window < model.block_size}
    window = "several" if len(limits) > 1 else "full" if not limits else "one or full"
    if len(limits) == 1 and len(set(model.windows)) == 1:
        window = "one"
    return {
        **{name: getattr(model, name) for name in _LLAMA},
        "attention_bias": model.attention_biases,
        "window": window,
        "n_kv_head": "n_head" if model.kv_heads == model.n_head else "fewer",
        "head_dim": "n_embd / n_head" if model.query_width == model.n_embd else "another",
    }


def _shown(model: ModelConfig, name: str) -> str:
    value = model.attention_biases if name == "attention_bias" else getattr(model, name)
    return str(value).lower() if isinstance(value, bool) else str(value)


def config_json(model: ModelConfig, kind: ExportClass, dtype: str, eot: int | None) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
        model: The architecture.
        kind: What `export_class` returned.
        dtype: Dtype of the stored weights.
        eot: Id that ends a document, or None if it is unknown.
    """
    own = kind.model_type == OWN
    keys = own_json(model) if own else _gpt2(model) if kind.model_type == "gpt2" else _llama(model, kind.model_type)
    return {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        **keys,
        "vocab_size": model.padded_vocab_size,
        "tie_word_embeddings": model.weight_tying,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def generation_json(model: ModelConfig, eot: int | None, known: int | None) -> dict[str, Any]:
    """Returns the content of generation_config.json.

    Args:
        model: The architecture.
        eot: Id that ends a document, or None if it is unknown.
        known: Number of ids of the tokenizer, or None. The model's other ids have no text and are never generated.
    """
    without_text = [] if known is None else list(range(known, model.padded_vocab_size))
    ends: Mapping[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
    return {**ends} | ({"suppress_tokens": without_text} if without_text else {})


def _sizes(model: ModelConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the keys of config.json that have a value of the architecture."""
    resolved = {"n_kv_head": model.kv_heads, "head_dim": model.head_width, "d_ff": model.ffn_width}
    return {theirs: resolved.get(ours, getattr(model, ours)) for ours, theirs in names.items()}


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        **_sizes(model, GPT2_NAMES),
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == model.activation),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout),
    }


def _llama(model: ModelConfig, kind: str) -> dict[str, Any]:
    keys = _sizes(model, LLAMA_NAMES)
    keys |= {"hidden_act": "silu", "rope_theta": model.rope_theta, "rope_scaling": _rope_scaling(model)}
    if kind in ("llama", "qwen3"):
        keys["attention_bias"] = model.attention_biases == "all"
    if kind == "llama":
        keys["mlp_bias"] = model.bias
        return keys
    limited = [window < model.block_size for window in model.windows]
    keys["sliding_window"] = min(model.windows) if any(limited) else None
    if kind in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = any(limited)
        # Versions of transformers that do not read layer_types have windows from this layer on.
        keys["max_window_layers"] = limited.index(True) if any(limited) else model.n_layer
        keys["layer_types"] = ["sliding_attention" if limit else "full_attention" for limit in limited]
    return keys


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling == "none":
        return None
    keys = {theirs: getattr(model, ours) for theirs, ours in ROPE_NAMES[model.rope_scaling].items()}
    return {"rope_type": model.rope_scaling, **keys}
