"""Counts the matmul FLOPs of a model exactly, under every convention in use.

FLOPs are counted over one sequence of `block_size` tokens, where every count of a matmul is a whole number, and divided
by the tokens only at the end. A multiply-add is two FLOPs. The backward pass of a matmul is two matmuls of its size, so
training is three times forward. Norms, activations and position encodings are not matmuls and do not count in MFU
(PaLM, https://arxiv.org/abs/2204.02311, appendix B); `gptperf.flops.elementwise` counts them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from gptperf.cards import causal_pairs
from gptperf.config import ModelConfig
from gptperf.flops.matmuls import uncountable_flops, weights
from gptperf.flops.parameter_count import parameters, uncountable_parameters

__all__ = ["CONVENTIONS", "RECOMPUTE", "Convention", "FlopCount", "attended_pairs", "attention_ffn_ratio", "exact"]
__all__ += ["flops_per_token"]


def exact(count: int | Fraction, tokens: int = 1) -> int | Fraction:
    """Returns count / tokens as an int if it is a whole number, else as a fraction."""
    quotient = Fraction(count) / tokens
    return quotient.numerator if quotient.denominator == 1 else quotient


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one sequence by part, over all layers. All parts except `recomputed` are forward FLOPs.

    A convention that has one formula for the whole model is split into the same parts.
    """

    convention: str
    tokens: int
    """Tokens of the sequence."""
    qkv: int
    scores: int | Fraction
    """Q K^T and the product of the attention weights with V."""
    output: int
    ffn: int
    lm_head: int
    other: int | Fraction = 0
    """FLOPs that a convention counts for something other than a matmul."""
    recomputed: int | Fraction = 0
    """FLOPs of the forward matmuls that backward repeats."""

    @property
    def parts(self) -> dict[str, int | Fraction]:
        """The forward parts by name."""
        names = ("qkv", "scores", "output", "ffn", "lm_head", "other")
        return {name: getattr(self, name) for name in names}

    @property
    def forward(self) -> int | Fraction:
        """Forward FLOPs of the sequence."""
        return sum(self.parts.values())

    @property
    def training(self) -> int | Fraction:
        """Forward and backward FLOPs of the sequence, with recomputed ones if the convention counts them."""
        return 3 * self.forward + self.recomputed

    @property
    def forward_per_token(self) -> int | Fraction:
        """Forward FLOPs of one token, exact."""
        return exact(self.forward, self.tokens)

    @property
    def training_per_token(self) -> int | Fraction:
        """Forward and backward FLOPs of one token, exact."""
        return exact(self.training, self.tokens)


def attended_pairs(model: ModelConfig) -> int:
    """Returns the (query, key) pairs of a sequence that is one document, of one head and over all layers."""
    return sum(causal_pairs(model.block_size, window) for window in model.windows)


def _score_flops(model: ModelConfig, pairs: int | Fraction) -> int | Fraction:
    # The number of query heads counts: grouped keys and values do not reduce the scores.
    return exact(2 * 2 * pairs * model.query_width)


def _count(convention: str, model: ModelConfig, pairs: int) -> FlopCount:
    """Counts every matmul that the model runs; `pairs` are those of `attended_pairs`."""
    t = model.block_size
    return FlopCount(
        convention=convention,
        tokens=t,
        qkv=2 * t * weights(model, "qkv"),
        scores=_score_flops(model, pairs),
        output=2 * t * weights(model, "output"),
        ffn=2 * t * weights(model, "ffn"),
        lm_head=2 * t * weights(model, "lm_head"),
    )


def _strict(model: ModelConfig) -> FlopCount:
    return _count("strict", model, attended_pairs(model))


def _palm(model: ModelConfig) -> FlopCount:
    return _count("palm", model, model.n_layer * model.block_size**2)


def _nanogpt(model: ModelConfig) -> FlopCount:
    """Counts 6 N + 12 L H Q T per token, with N = `non_embedding` and Q = head_dim; the second term is that of palm."""
    other = parameters(model).non_embedding - weights(model)
    return replace(_palm(model), convention="nanogpt", other=2 * model.block_size * other)


def _six_n(model: ModelConfig) -> FlopCount:
    """Counts 6 N per token, where N is all parameters, both embeddings included.

    Kaplan et al. leave out both embeddings and the head.
    """
    other = parameters(model).total - weights(model)
    return replace(_palm(model), convention="6n", scores=0, other=2 * model.block_size * other)


def _hfu(model: ModelConfig) -> FlopCount:
    return replace(_strict(model), convention="hfu")


_DESCRIBED_ENCODINGS = {"rope": 4}
_DESCRIBED_NORMS = {"rmsnorm": Fraction(3, 2)}


def _description(model: ModelConfig) -> FlopCount:
    """Counts L (6 S H^2 + 2 a S^2 H + 2 m S H F + rope + norm) per sequence, with a heads, width H and m FFN matrices.

    The formula counts one norm per layer, 1.5 S H for RMSNorm and 2 S H for any other, and 4 S H for RoPE.
    """
    n, t, c = model.n_layer, model.block_size, model.n_embd
    elementwise = _DESCRIBED_ENCODINGS.get(model.position_encoding, 0) + _DESCRIBED_NORMS.get(model.normalization, 2)
    return FlopCount(
        convention="description",
        tokens=t,
        qkv=n * 6 * t * c * c,
        scores=n * 2 * model.n_head * t * t * c,
        output=0,
        ffn=2 * t * weights(model, "ffn"),
        lm_head=0,
        other=exact(n * t * c * elementwise),
    )


def _12sbh2(model: ModelConfig) -> FlopCount:
    """Counts L (12 S B H^2 + 2 a S^2 B H) with B = 1.

    A multiply-add is one FLOP here, and the weights are 3 H^2 (QKV), H^2 (output) and 8 H^2 (any FFN).
    """
    n, t, c = model.n_layer, model.block_size, model.n_embd
    square, scores = n * t * c * c, n * 2 * model.n_head * t * t * c
    return FlopCount("12sbh2", t, qkv=3 * square, scores=scores, output=square, ffn=8 * square, lm_head=0)


@dataclass(frozen=True)
class Convention:
    """A way to count the FLOPs of a trained token; `source` names the paper or program that uses it."""

    count: Callable[[ModelConfig], FlopCount]
    summary: str
    source: str
    uncountable: Callable[[ModelConfig], str | None] = uncountable_flops
    """Returns why this convention cannot count a model, or None if it can."""


CONVENTIONS: dict[str, Convention] = {
    "strict": Convention(_strict, "matmuls, causal scores; every MFU uses it", "PaLM's rule, exact"),
    "palm": Convention(_palm, "matmuls, all T x T scores: 12LHDT", "Chowdhery et al. 2022, app. B"),
    "nanogpt": Convention(
        _nanogpt, "6N + 12LHDT, N all but the position table", "nanoGPT, estimate_mfu", uncountable_parameters
    ),
    "6n": Convention(_six_n, "6N, N all parameters; no scores", "Hoffmann et al. 2022", uncountable_parameters),
    "hfu": Convention(_hfu, "strict, and matmuls that backward repeats", "Korthikanti et al. 2022"),
    "description": Convention(
        _description,
        "scores H/2 times palm's; no output projection, no head",
        "in circulation, with errors",
        uncountable_parameters,
    ),
    "12sbh2": Convention(_12sbh2, "matrices half, scores H/2 times palm's; no head", "in circulation, with errors"),
}
"""Name -> convention. The last two are there for comparison; configs/PARAMETER_FORMULAS.md lists their errors."""

RECOMPUTE: dict[str, dict[str, Fraction]] = {
    "none": {},
    "selective": {},
    "flash": {"scores": Fraction(1, 2)},
    "attention": {"scores": Fraction(1)},
    "full": dict.fromkeys(("qkv", "scores", "output", "ffn"), Fraction(1)),
}
"""Kind of recomputation -> the share of each part's forward matmuls that backward repeats.

selective: norms and activations, no matmul, as with the configuration's `recompute`. flash: Q K^T, which the backward
of flash attention repeats because it keeps no score matrix; no other value counts that. attention: both attention
matmuls, which Korthikanti et al. (2022, section 5) call selective. full: every block, but not the head.
"""


def flops_per_token(
    model: ModelConfig, convention: str = "strict", *, recompute: str = "none", pairs: int | Fraction | None = None
) -> FlopCount:
    """Counts the FLOPs of one sequence; `training_per_token` of the result is the numerator of MFU, or of HFU.

    Args:
        convention: one of `CONVENTIONS`.
        recompute: one of `RECOMPUTE`; only "hfu" counts it.
        pairs: (query, key) pairs of a sequence as in `attended_pairs`, where they depend on the documents in it; a mean
            over sequences is a fraction. Only "strict" and "hfu" count them. None: a sequence is one document.

    Raises:
        ValueError: the convention or recompute is unknown, the convention does not count recompute, or a component
            that the convention needs has no card (see `Convention.uncountable`).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"FLOP convention: found {convention!r}, wanted one of {', '.join(CONVENTIONS)}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: found {recompute!r}, wanted one of {', '.join(RECOMPUTE)}")
    if recompute != "none" and convention != "hfu":
        wanted = "wanted 'none', or the convention 'hfu', which counts recomputed matmuls"
        raise ValueError(f"recompute: found {recompute!r} with the convention {convention!r}, {wanted}")
    reason = CONVENTIONS[convention].uncountable(model)
    if reason is not None:
        raise ValueError(f"the FLOPs cannot be counted from the configuration: {reason}")
    count = CONVENTIONS[convention].count(model)
    if pairs is not None:
        assert convention in ("strict", "hfu"), f"{convention} does not count the pairs of the documents"
        count = replace(count, scores=_score_flops(model, pairs))
    again = sum(share * count.parts[part] for part, share in RECOMPUTE[recompute].items())
    return replace(count, recomputed=exact(again))


def attention_ffn_ratio(model: ModelConfig) -> float:
    """Returns the FLOPs of attention (projections and causal scores) divided by those of the FFN."""
    count = flops_per_token(model, "strict")
    return float((count.qkv + count.scores + count.output) / count.ffn)
