"""The model: norms, position encodings, attention, FFNs, blocks and the GPT. The import registers these components."""

from gptperf.model import activation
from gptperf.model.attention import SDPA, Attention, FlashAttention, KVCache, ManualAttention, prefers_cudnn
from gptperf.model.block import PostNormBlock, PreNormBlock
from gptperf.model.ffn import StandardFFN, SwiGLU
from gptperf.model.gpt import GPT, Units
from gptperf.model.norm import LayerNorm, LayerNormNoBias, RMSNorm
from gptperf.model.position import LearnedAbsolute, NoPosition, RoPE

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
    "activation",
    "prefers_cudnn",
]
