"""Which architecture of gptperf a config.json of Hugging Face describes."""

import json
from collections.abc import Mapping
from typing import Any

from gptperf.config import ModelConfig
from gptperf.errors import CheckpointError, GptperfError

__all__ = ["Described", "model_config"]

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}

Described = Mapping[str, Any]
"""Content of a config.json."""


def model_config(described: Described) -> ModelConfig:
    """Returns the architecture that a config.json describes.

    Raises:
        CheckpointError: The model is neither a GPT-2 nor a LLaMA, or has a part that gptperf does not have.
    """
    kind = described.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"config.json: model_type: found {kind!r}, wanted gpt2 or llama")
    try:
        return ModelConfig(**(_gpt2_keys if kind == "gpt2" else _llama_keys)(described))
    except GptperfError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json: found no {error}, which a {kind} has") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: does not describe a {kind}: {error}") from error


def _gpt2_keys(described: Described) -> dict[str, Any]:
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _want(described, key, wanted)
    name = described.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation_function: found {name!r}, wanted one of {', '.join(_ACTIVATIONS)}"
        )
    return {
        "arch_preset": "gpt2_openai",
        "n_layer": described["n_layer"],
        "n_head": described["n_head"],
        "n_embd": described["n_embd"],
        "d_ff": described.get("n_inner"),
        "block_size": described["n_positions"],
        "vocab_size": described["vocab_size"],
        "normalization": "layernorm",
        "activation": _ACTIVATIONS[name],
        "position_encoding": "learned_absolute",
        "norm_position": "pre",
        "ffn_type": "standard",
        "bias": True,
        "weight_tying": described.get("tie_word_embeddings", True),
        "norm_eps": described.get("layer_norm_epsilon", 1e-5),
    }


def _llama_keys(described: Described) -> dict[str, Any]:
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        _want(described, key, wanted)
    rope = described.get("rope_scaling") or described.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or "factor" in rope:
        raise CheckpointError(f"config.json: RoPE: found {kind!r}, wanted no scaling of the positions")
    width, heads = described["hidden_size"], described["num_attention_heads"]
    head_dim = described.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise CheckpointError(
            f"config.json: head_dim: found {head_dim}, wanted hidden_size / heads = {width / heads:g}"
        )
    return {
        "arch_preset": "llama",
        "n_layer": described["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": described.get("num_key_value_heads"),
        "n_embd": width,
        "d_ff": described["intermediate_size"],
        "block_size": described["max_position_embeddings"],
        "vocab_size": described["vocab_size"],
        "normalization": "rmsnorm",
        "position_encoding": "rope",
        "norm_position": "pre",
        "ffn_type": "swiglu",
        "bias": False,
        "weight_tying": described.get("tie_word_embeddings", False),
        "norm_eps": described["rms_norm_eps"],
        "rope_theta": float(described.get("rope_theta") or rope.get("rope_theta", 1e4)),
    }


def _want(described: Described, key: str, wanted: object) -> None:
    """Checks that a key has the only value that gptperf supports; a missing key counts as that value.

    Raises:
        CheckpointError: The key has another value.
    """
    found = described.get(key, wanted)
    if found != wanted:
        raise CheckpointError(f"config.json: {key}: found {json.dumps(found)}, wanted {json.dumps(wanted)}")
