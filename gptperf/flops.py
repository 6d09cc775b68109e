"""Parameters and matmul FLOPs of a model, as exact integers. No tensor is seen here.

FLOPs are counted over one sequence of `block_size` tokens, where every count is a whole number, and divided
by the tokens only at the end. A multiply-add is two FLOPs; the backward pass of a matmul is two matmuls of
its size, so training is three times forward. Norms, activations and position encodings are no matmuls and do
not count (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from gptperf.config import ModelConfig

__all__ = [
    "CONVENTIONS",
    "FlopCount",
    "ParameterCount",
    "attention_ffn_ratio",
    "flops_per_token",
    "parameters",
]
__all__ += ["uncountable_flops", "uncountable_parameters"]

_FFN_MATRICES = {"standard": 2, "swiglu": 3}  # up, down; gate, up, down
_NORM_VECTORS = {"layernorm": 2, "layernorm_nobias": 1, "rmsnorm": 1}  # weight and bias, or weight alone
_POSITION_TABLES = {"learned_absolute": 1, "rope": 0, "none": 0}
_BLOCKS = {"pre": 2, "post": 2}  # norms in a block


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


@dataclass(frozen=True)
class FlopCount:
    """Forward matmul FLOPs of one sequence, by part, over all layers."""

    convention: str
    tokens: int
    """Tokens of the sequence."""
    qkv: int
    scores: int
    """Q K^T and the product of the attention weights with V."""
    output: int
    ffn: int
    lm_head: int

    @property
    def forward(self) -> int:
        """Forward FLOPs of the sequence."""
        return self.qkv + self.scores + self.output + self.ffn + self.lm_head

    @property
    def training(self) -> int:
        """Forward and backward FLOPs of the sequence; recomputed activations do not count."""
        return 3 * self.forward

    @property
    def forward_per_token(self) -> int | Fraction:
        """Forward FLOPs of one token, exact."""
        return _exact(self.forward, self.tokens)

    @property
    def training_per_token(self) -> int | Fraction:
        """Forward and backward FLOPs of one token, exact."""
        return _exact(self.training, self.tokens)


def _exact(count: int, tokens: int) -> int | Fraction:
    return Fraction(count, tokens) if count % tokens else count // tokens


def _from_plugin(**components: tuple[str, dict[str, int]]) -> str | None:
    """Names the first component that is not one of the built-in ones, whose sizes nobody knows here."""
    for kind, (name, known) in components.items():
        if name not in known:
            return f"{kind} = {name!r} is a plugin's, and its size is not known; known: {', '.join(known)}"
    return None


def uncountable_parameters(model: ModelConfig) -> str | None:
    """Why `parameters` cannot count this model, or None when it can."""
    norms = (model.normalization, _NORM_VECTORS)
    positions = (model.position_encoding, _POSITION_TABLES)
    return uncountable_flops(model) or _from_plugin(normalization=norms, position_encoding=positions)


def uncountable_flops(model: ModelConfig) -> str | None:
    """Why `flops_per_token` cannot count this model, or None when it can."""
    return _from_plugin(ffn_type=(model.ffn_type, _FFN_MATRICES), norm_position=(model.norm_position, _BLOCKS))


def parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the model that `model` describes.

    Raises:
        ValueError: a component comes from a plugin (see `uncountable_parameters`).
    """
    reason = uncountable_parameters(model)
    if reason is not None:
        raise ValueError(f"the parameters cannot be counted from the configuration: {reason}")
    c, f, kv_width = model.n_embd, model.ffn_width, model.kv_heads * model.head_dim
    matrices = _FFN_MATRICES[model.ffn_type]
    attention = c * (c + 2 * kv_width) + c * c
    ffn = matrices * c * f
    if model.bias:
        attention += (c + 2 * kv_width) + c
        ffn += (matrices - 1) * f + c
    norms = _BLOCKS[model.norm_position] * model.n_layer + 1  # the last one before lm_head, for post-norm too
    qk_norms = 2 * model.head_dim * model.n_layer if model.qk_norm else 0
    return ParameterCount(
        embedding=model.padded_vocab_size * c,
        position=_POSITION_TABLES[model.position_encoding] * model.block_size * c,
        attention=model.n_layer * attention,
        ffn=model.n_layer * ffn,
        norm=norms * _NORM_VECTORS[model.normalization] * c + qk_norms,
        lm_head=0 if model.weight_tying else model.padded_vocab_size * c,
    )


def _strict(model: ModelConfig) -> FlopCount:
    # Token t attends to t tokens, itself among them: T (T + 1) / 2 pairs.
    return _count("strict", model, model.block_size * (model.block_size + 1) // 2)


def _palm(model: ModelConfig) -> FlopCount:
    return _count("palm", model, model.block_size**2)


def _count(convention: str, model: ModelConfig, pairs: int) -> FlopCount:
    """FLOPs of every matmul as it is built, with `pairs` (query, key) pairs a head and sequence."""
    n, t, c, kv_width = model.n_layer, model.block_size, model.n_embd, model.kv_heads * model.head_dim
    return FlopCount(
        convention=convention,
        tokens=t,
        qkv=n * 2 * t * c * (c + 2 * kv_width),
        # Query heads: grouped keys and values save no scores.
        scores=n * 2 * 2 * pairs * model.n_head * model.head_dim,
        output=n * 2 * t * c * c,
        ffn=n * 2 * t * c * model.ffn_width * _FFN_MATRICES[model.ffn_type],
        lm_head=2 * t * c * model.padded_vocab_size,
    )


CONVENTIONS: dict[str, Callable[[ModelConfig], FlopCount]] = {"strict": _strict, "palm": _palm}
"""strict: the causal half of the scores, what has to be computed. palm: their full square (12LCT)."""


def flops_per_token(model: ModelConfig, convention: str = "strict") -> FlopCount:
    """Count the matmul FLOPs of one sequence; the result's `training_per_token` is the numerator of MFU.

    Args:
        convention: one of `CONVENTIONS`.

    Raises:
        ValueError: unknown convention, or a component comes from a plugin (see `uncountable_flops`).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"FLOP convention: found {convention!r}, wanted one of {', '.join(CONVENTIONS)}")
    reason = uncountable_flops(model)
    if reason is not None:
        raise ValueError(f"the FLOPs cannot be counted from the configuration: {reason}")
    return CONVENTIONS[convention](model)


def attention_ffn_ratio(model: ModelConfig) -> float:
    """FLOPs of attention (projections and causal scores) over FLOPs of the FFN."""
    count = flops_per_token(model, "strict")
    return (count.qkv + count.scores + count.output) / count.ffn
