"""The model: norm, position encoding, attention, FFN, block, GPT. Importing it registers the built-in components."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from gptperf.model.attention import SDPA, Attention, FlashAttention, KVCache, ManualAttention, prefers_cudnn
from gptperf.model.block import PostNormBlock, PreNormBlock
from gptperf.model.ffn import StandardFFN, SwiGLU
from gptperf.model.gpt import GPT, Units
from gptperf.model.norm import LayerNorm, LayerNormNoBias, RMSNorm
from gptperf.model.position import LearnedAbsolute, NoPosition, RoPE
from gptperf.registry import register_built_in

__all__ = [
    "GPT",
    "SDPA",
    "Attention",
    "FlashAttention",
    "KVCache",
    "LayerNorm",
    "LayerNormNoBias",
    "LearnedAbsolute",
    "ManualAttention",
    "NoPosition",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "RoPE",
    "StandardFFN",
    "SwiGLU",
    "Units",
    "prefers_cudnn",
]

_BUILT_IN: dict[str, dict[str, type[nn.Module] | Callable[[Tensor], Tensor]]] = {
    "normalization": {"layernorm": LayerNorm, "layernorm_nobias": LayerNormNoBias, "rmsnorm": RMSNorm},
    "activation": {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "relu_squared": lambda x: F.relu(x).square(),
    },
    "position_encoding": {"learned_absolute": LearnedAbsolute, "rope": RoPE, "none": NoPosition},
    "attention_backend": {"sdpa": SDPA, "manual": ManualAttention, "flash_attn": FlashAttention},
    "norm_position": {"pre": PreNormBlock, "post": PostNormBlock},
    "ffn_type": {"standard": StandardFFN, "swiglu": SwiGLU},
}
register_built_in(_BUILT_IN)
