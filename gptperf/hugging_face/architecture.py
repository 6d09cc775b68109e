"""Which architecture of gptperf a config.json of Hugging Face describes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptperf.config import Config, ModelConfig
from gptperf.errors import CheckpointError, ConfigError, GptperfError
from gptperf.hugging_face.described import Described, refused, with_defaults
from gptperf.hugging_face.own_config import OWN, own_model

__all__ = ["ACTIVATIONS", "GPT2_NAMES", "LLAMA_NAMES", "ROPE_NAMES", "Described", "model_config"]

GPT2_NAMES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "d_ff": "n_inner",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}
"""Key here -> the key of a GPT-2's config.json that has the same value."""
LLAMA_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""The same for the config.json of a LLaMA, Mistral or Qwen."""

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
}
"""Name of an activation in a config.json -> its name here."""
ROPE_NAMES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_block_size",
    },
}
"""Kind of RoPE in a config.json -> its keys, and their names here."""


def model_config(described: Described) -> ModelConfig:
    """Returns the architecture that a config.json describes.

    Raises:
        CheckpointError: The model is of another family than `FAMILIES`, or has a part that gptperf does not have.
    """
    if described.get("model_type") == OWN:
        return own_model(described)
    values, kind = with_defaults(described), described["model_type"]
    names = GPT2_NAMES if kind == "gpt2" else LLAMA_NAMES
    keys = {ours: values[theirs] for ours, theirs in names.items()}
    try:
        model = ModelConfig(**keys | (_gpt2_keys(values) if kind == "gpt2" else _llama_keys(values, kind)))
        return Config(model=model).model  # which checks the keys together, too
    except ConfigError as error:
        words = re.findall(r"\w+", str(error))
        there = ", ".join(f"{ours} is {names[ours]}" for ours in names if ours in words and ours != names[ours])
        raise CheckpointError(f"config.json: {error}{f' ({there} there)' * bool(there)}") from error
    except GptperfError:
        raise
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: does not describe a {kind}: {error}") from error


def _gpt2_keys(described: Described) -> dict[str, Any]:
    name = described["activation_function"]
    if name not in ACTIVATIONS:
        raise refused("activation_function", name, f"wanted one of {', '.join(ACTIVATIONS)}")
    return {
        "arch_preset": "gpt2_openai",
        "normalization": "layernorm",
        "activation": ACTIVATIONS[name],
        "position_encoding": "learned_absolute",
        "norm_position": "pre",
        "ffn_type": "standard",
        "bias": True,
    }


def _llama_keys(described: Described, kind: str) -> dict[str, Any]:
    """Returns the keys of a LLaMA, Mistral or Qwen, whose blocks are alike."""
    if described["hidden_act"] not in ("silu", "swish"):
        raise refused("hidden_act", described["hidden_act"], "wanted silu")
    biased, ffn_biased = described.get("attention_bias", kind == "qwen2"), described.get("mlp_bias", False)
    if not isinstance(biased, bool):
        raise refused("attention_bias", biased, "wanted true or false")
    biases = "none" if not biased else "qkv" if kind == "qwen2" else "all"
    head_dim, heads = described["head_dim"], described["num_attention_heads"]
    return {
        "arch_preset": "llama",
        "head_dim": None if head_dim is None or head_dim * heads == described["hidden_size"] else head_dim,
        "normalization": "rmsnorm",
        "position_encoding": "rope",
        "window": _window(described),
        "norm_position": "pre",
        "ffn_type": "swiglu",
        "bias": ffn_biased,
        "attention_bias": None if biases == ("all" if ffn_biased else "none") else biases,
        "qk_norm": kind == "qwen3",
        **_rope(described),
    }


def _window(described: Described) -> str:
    """Returns the window of each layer, as the key `window` has it; transformers counts the query itself, too."""
    size = described.get("sliding_window")
    if not described.get("use_sliding_window", True):
        size = None
    layers, kinds = described["num_hidden_layers"], described.get("layer_types")
    if kinds is None and size is None:
        return "full"
    if kinds is None:
        first, layers = described.get("max_window_layers", 0), min(layers, 10_000)  # more are refused below
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise refused("layer_types", kinds, f"wanted {layers} of {' or '.join(known)}")
    if size is None and "sliding_attention" in kinds:
        raise refused("layer_types", kinds, "wanted full_attention alone, because no window is set and in use")
    if not isinstance(size, int | None) or (size is not None and size < 1):
        raise refused("sliding_window", size, "wanted a number of tokens above 0")
    return _pattern(["full" if kind == known[0] else str(size) for kind in kinds])


def _pattern(windows: Sequence[str]) -> str:
    """Returns the shortest list that gives the windows of all layers when it is repeated."""
    for count in range(1, len(windows)):
        if all(window == windows[i % count] for i, window in enumerate(windows)):
            return ",".join(windows[:count])
    return ",".join(windows)


def _rope(described: Described) -> dict[str, Any]:
    """Returns the keys of RoPE, which transformers 4 has in rope_theta and rope_scaling, and 5 in rope_parameters."""
    where = "rope_scaling" if described["rope_scaling"] else "rope_parameters"
    given = described[where] or {}
    if not isinstance(given, Mapping):
        raise refused(where, given, "wanted a table of keys")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NAMES:
        raise refused(f"{where}.rope_type", kind, f"wanted one of {', '.join(ROPE_NAMES)}")
    partial = given.get("partial_rotary_factor", described["partial_rotary_factor"])
    if partial not in (None, 1):
        raise refused("partial_rotary_factor", partial, "wanted 1: RoPE rotates whole heads")
    keys = ROPE_NAMES[kind]
    for key, value in given.items():
        if key not in (*keys, "rope_type", "type", "rope_theta", "partial_rotary_factor") and value is not None:
            raise refused(f"{where}.{key}", value, f"wanted no such key beside rope_type {kind!r}")
    if kind == "llama3":
        given = {"original_max_position_embeddings": described["max_position_embeddings"], **given}
    missing = [key for key in keys if given.get(key) is None]
    if missing:
        raise refused(f"{where}.{missing[0]}", None, f"wanted a number, which rope_type {kind!r} has")
    scaling = {} if kind == "default" else {"rope_scaling": kind}
    theta = given.get("rope_theta", described["rope_theta"])
    return {"rope_theta": theta, **scaling, **{ours: given[key] for key, ours in keys.items()}}
