"""The architecture presets: the component keys of `[model]` that `arch_preset = NAME` sets.

A preset is expanded where it is named: keys in the same file or on the same command line override it, and so does every
later file. A preset sets no sizes.
"""

__all__ = ["PRESETS"]

_GPT2: dict[str, str | bool] = {
    "normalization": "layernorm_nobias",
    "activation": "gelu",
    "position_encoding": "learned_absolute",
    "norm_position": "post",
    "ffn_type": "standard",
    "bias": False,
    "weight_tying": True,
}
_LLAMA: dict[str, str | bool] = {
    "normalization": "rmsnorm",
    "activation": "gelu",  # no effect: SwiGLU always uses SiLU
    "position_encoding": "rope",
    "norm_position": "pre",
    "ffn_type": "swiglu",
    "bias": False,
    "weight_tying": False,
}

PRESETS: dict[str, dict[str, str | bool]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "team": _LLAMA,
    "hybrid": _GPT2 | {"position_encoding": "rope", "norm_position": "pre"},
    # The released GPT-2: pre-norm, biases in every linear layer and norm, the tanh approximation of GELU.
    "gpt2_openai": _GPT2
    | {"normalization": "layernorm", "activation": "gelu_tanh", "norm_position": "pre", "bias": True},
    "custom": {},
}
