"""The keys of a config.json of Hugging Face: their defaults, and which of them do not change what a model computes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptperf.errors import CheckpointError

__all__ = ["FAMILIES", "Described", "refused", "with_defaults"]

Described = Mapping[str, Any]
"""Content of a config.json."""

# Defaults of the keys that are read, by family, as in the configuration classes of transformers: a config.json may lack
# a key that has its default.
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA: dict[str, Any] = _SIZES | {
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "tie_word_embeddings": False,
    "layer_types": None,
    "attention_bias": False,
    "mlp_bias": False,
}
_WITHOUT_BIAS = {key: value for key, value in _LLAMA.items() if not key.endswith(("bias", "layer_types"))}
_QWEN = _WITHOUT_BIAS | {
    "layer_types": None,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama": _LLAMA,
    "mistral": _WITHOUT_BIAS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
}
"""Model type -> key that gptperf reads -> its default."""

_ONLY: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "use_qk_norm": False,
    # Of families that do not read them.
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
"""Key -> the only value with which it changes nothing."""

# What a config.json says of training, generation, classification heads, and the programs that wrote it.
_HARMLESS = frozenset(
    """
    model_type architectures transformers_version dtype torch_dtype tokenizer_class prefix use_cache initializer_range
    attn_implementation gradient_checkpointing reorder_and_upcast_attn pretraining_tp is_decoder is_llama_config n_ctx
    attention_dropout resid_pdrop embd_pdrop attn_pdrop chunk_size_feed_forward torchscript use_bfloat16 return_dict
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    output_attentions output_hidden_states output_past finetuning_task problem_type id2label label2id num_labels
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    max_sequence_length neftune_noise_alpha predict_special_tokens cache_implementation task_specific_params
    transformers.js_config unsloth_version unsloth_fixed
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences
    temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty output_scores return_dict_in_generate
    """.split()  # noqa: SIM905 - a list of one word a line would hide them
)


def with_defaults(described: Described) -> dict[str, Any]:
    """Returns the keys of a config.json that gptperf reads, with the defaults of those that it leaves out.

    Raises:
        CheckpointError: gptperf has no such model, or a key that it does not read may change what the model computes.
    """
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise refused("model_type", kind, f"wanted one of {', '.join(FAMILIES)}")
    for error in _unread(described, FAMILIES[kind]):
        raise error
    return FAMILIES[kind] | {key: value for key, value in described.items() if key in FAMILIES[kind]}


def _unread(described: Described, read: Mapping[str, Any]) -> Iterator[CheckpointError]:
    for key, value in described.items():
        if key in read or key in _HARMLESS or key.startswith("_") or value is None or value in ("", [], {}):
            continue
        if key not in _ONLY:
            wanted = "wanted a key that gptperf reads, because this one may change what the model computes"
            yield refused(key, value, f"{wanted}; remove it from config.json if it does not")
        elif value != _ONLY[key]:
            yield refused(key, value, f"wanted {json.dumps(_ONLY[key])}")


def refused(key: str, value: object, wanted: str) -> CheckpointError:
    """Returns the error of a key whose value gptperf cannot express."""
    found = json.dumps(value, default=str)
    return CheckpointError(f"config.json: {key}: found {found[:120]}{'...' * (len(found) > 120)}, {wanted}")
