"""Sizes of a model's parts, and its parameters, as exact integers. No tensor is seen here."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from gptperf.config import ModelConfig

__all__ = ["BLOCK_NORMS", "FFN_MATRICES", "ParameterCount", "Weights", "causal_pairs", "exact", "parameters"]
__all__ += ["uncountable", "uncountable_flops", "uncountable_parameters", "weights"]

FFN_MATRICES = {"standard": 2, "swiglu": 3}
"""up, down; gate, up, down."""
BLOCK_NORMS = {"pre": 2, "post": 2}
"""Norms in a block."""
_NORM_VECTORS = {"layernorm": 2, "layernorm_nobias": 1, "rmsnorm": 1}  # weight and bias, or weight alone
_POSITION_TABLES = {"learned_absolute": 1, "rope": 0, "none": 0}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. A tied lm_head is the embedding and counts there."""

    embedding: int
    position: int
    attention: int
    ffn: int
    norm: int
    lm_head: int

    @property
    def total(self) -> int:
        """All parameters, a shared one once."""
        return self.embedding + self.position + self.attention + self.ffn + self.norm + self.lm_head

    @property
    def non_embedding(self) -> int:
        """All but the position table, as nanoGPT counts (its token embedding is lm_head's weight)."""
        return self.total - self.position


class Weights(NamedTuple):
    """Elements of the matrices that multiply activations, over all layers."""

    qkv: int
    output: int
    ffn: int
    lm_head: int


def exact(count: int | Fraction, tokens: int = 1) -> int | Fraction:
    """count / tokens, an int where it is whole."""
    quotient = Fraction(count) / tokens
    return quotient.numerator if quotient.denominator == 1 else quotient


def uncountable(**components: tuple[str, Mapping[str, int]]) -> str | None:
    """Names the first component (kind -> name, known names) that is none of the built-in ones, or None."""
    for kind, (name, known) in components.items():
        if name not in known:
            return f"{kind} = {name!r} is a plugin's, and what it takes is not known; known: {', '.join(known)}"
    return None


def uncountable_parameters(model: ModelConfig) -> str | None:
    """Why `parameters` cannot count this model, or None when it can."""
    norms = (model.normalization, _NORM_VECTORS)
    positions = (model.position_encoding, _POSITION_TABLES)
    return uncountable_flops(model) or uncountable(normalization=norms, position_encoding=positions)


def uncountable_flops(model: ModelConfig) -> str | None:
    """Why the matmuls of this model cannot be counted, or None when they can."""
    return uncountable(ffn_type=(model.ffn_type, FFN_MATRICES), norm_position=(model.norm_position, BLOCK_NORMS))


def parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the model that `model` describes.

    Raises:
        ValueError: a component comes from a plugin (see `uncountable_parameters`).
    """
    reason = uncountable_parameters(model)
    if reason is not None:
        raise ValueError(f"the parameters cannot be counted from the configuration: {reason}")
    c, f, kv_width = model.n_embd, model.ffn_width, model.kv_heads * model.head_dim
    matrices = FFN_MATRICES[model.ffn_type]
    attention = c * (c + 2 * kv_width) + c * c
    ffn = matrices * c * f
    if model.bias:
        attention += (c + 2 * kv_width) + c
        ffn += (matrices - 1) * f + c
    norms = BLOCK_NORMS[model.norm_position] * model.n_layer + 1  # the last one before lm_head, for post-norm too
    qk_norms = 2 * model.head_dim * model.n_layer if model.qk_norm else 0
    return ParameterCount(
        embedding=model.padded_vocab_size * c,
        position=_POSITION_TABLES[model.position_encoding] * model.block_size * c,
        attention=model.n_layer * attention,
        ffn=model.n_layer * ffn,
        norm=norms * _NORM_VECTORS[model.normalization] * c + qk_norms,
        lm_head=0 if model.weight_tying else model.padded_vocab_size * c,
    )


def weights(model: ModelConfig) -> Weights:
    """The matrices, a tied lm_head among them; the FFN must be a built-in one (see `uncountable_flops`)."""
    n, c, kv_width = model.n_layer, model.n_embd, model.kv_heads * model.head_dim
    return Weights(
        qkv=n * c * (c + 2 * kv_width),
        output=n * c * c,
        ffn=n * c * model.ffn_width * FFN_MATRICES[model.ffn_type],
        lm_head=c * model.padded_vocab_size,
    )


def causal_pairs(model: ModelConfig) -> int:
    """(query, key) pairs of a head and sequence: token t attends to t tokens, itself among them."""
    return model.block_size * (model.block_size + 1) // 2
