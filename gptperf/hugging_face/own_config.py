"""The config.json of `gptperf.hugging_face.modeling_gptperf`, whose keys are those of the architecture."""

from collections.abc import Mapping
from typing import Any

from gptperf.config import Config, ModelConfig
from gptperf.errors import CheckpointError, ConfigError

__all__ = ["EXPORTED", "MODELING", "OWN", "own_json", "own_model"]

OWN = "gptperf"
"""Model type of these models."""
MODELING = "modeling_gptperf.py"
"""File with their class."""
_KEYS: tuple[str, ...] = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "normalization",
    "activation",
    "position_encoding",
    "window",
)
_KEYS += ("norm_position", "ffn_type", "bias", "dropout", "qk_norm", "norm_eps")
_ROPE: tuple[str, ...] = ("rope_theta", "rope_pairs", "rope_scaling", "rope_factor", "rope_low_freq_factor")
_ROPE += ("rope_high_freq_factor", "rope_original_block_size")
_SIZES = {"n_kv_head": "kv_heads", "head_dim": "head_width", "d_ff": "ffn_width", "attention_bias": "attention_biases"}
"""Key of an architecture that may be left out -> the property with its value."""
EXPORTED = frozenset((*_KEYS, *_ROPE, *_SIZES, "vocab_size", "weight_tying"))
"""The keys of an architecture that change a logit or a size, and that the class knows."""


def own_json(model: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json that describe an architecture."""
    module = MODELING.removesuffix(".py")
    classes = {"AutoConfig": f"{module}.GptperfConfig", "AutoModelForCausalLM": f"{module}.GptperfForCausalLM"}
    return {
        "auto_map": classes,
        **{name: getattr(model, name) for name in _KEYS},
        **{name: getattr(model, resolved) for name, resolved in _SIZES.items()},
        "rope": {name.removeprefix("rope_"): getattr(model, name) for name in _ROPE},
    }


def own_model(described: Mapping[str, Any]) -> ModelConfig:
    """Returns the architecture that a config.json with the keys of `own_json` describes.

    Raises:
        CheckpointError: A key is missing, or has a value that gptperf does not have.
    """
    try:
        keys = {name: described[name] for name in (*_KEYS, *_SIZES, "vocab_size")}
        keys |= {name: described["rope"][name.removeprefix("rope_")] for name in _ROPE}
        model = ModelConfig(arch_preset="custom", weight_tying=described["tie_word_embeddings"], **keys)
        return Config(model=model).model  # which checks the keys together, too
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json: found no key {error}, wanted those of {MODELING}") from error
