"""Counts exactly the forward FLOPs that do not belong to matmuls. MFU does not include them; a roofline needs them."""

from dataclasses import dataclass, fields
from fractions import Fraction

from gptperf import registry
from gptperf.cards import COMMON_COSTS, FFN, RMSNORM, Cost
from gptperf.config import ModelConfig
from gptperf.flops.count import attended_pairs, exact
from gptperf.flops.matmuls import biases
from gptperf.flops.model_cards import block_of, ffn_of, position_of
from gptperf.flops.parameter_count import uncountable_parameters

__all__ = ["VectorCount", "part_costs", "uncountable_vector_flops", "vector_flops"]


@dataclass(frozen=True)
class VectorCount:
    """Forward FLOPs of one sequence that do not belong to matmuls, by part, over all layers.

    The optimizer, the embedding look-up and random numbers are not counted.
    """

    tokens: int
    """Tokens of the sequence."""
    norm: int
    """Norms, QK-norm included."""
    residual: int
    position: int
    activation: int
    bias: int
    softmax: int
    """Softmax of the attention, over the causal pairs."""
    loss: int
    dropout: int

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokens"}

    @property
    def forward(self) -> int:
        """Forward element-wise FLOPs of the sequence."""
        return sum(self.parts.values())

    @property
    def forward_per_token(self) -> int | Fraction:
        """Forward element-wise FLOPs of one token, exact."""
        return exact(self.forward, self.tokens)


def uncountable_vector_flops(model: ModelConfig) -> str | None:
    """Returns why `vector_flops` cannot count this model, or None if it can."""
    reason = uncountable_parameters(model)
    if reason is not None:
        return reason
    ffn = ffn_of(model)
    return registry.no_card(activation=model.activation) if ffn.cost is None else None


def part_costs(
    normalization: str, position_encoding: str, ffn_type: str, activation: str
) -> dict[str, tuple[str, Cost]]:
    """Returns, by part, the cost of one element and the name of what causes it: a component or the part itself.

    Every component must have a card (see `uncountable_vector_flops`).
    """
    ffn: FFN = registry.card("ffn_type", ffn_type)
    applied = (activation, registry.card("activation", activation).cost) if ffn.cost is None else (ffn_type, ffn.cost)
    return {
        "norm": (normalization, registry.card("normalization", normalization).cost),
        "position": (position_encoding, registry.card("position_encoding", position_encoding).cost),
        "activation": applied,
        **{part: (part, cost) for part, cost in COMMON_COSTS.items()},
    }


def vector_flops(model: ModelConfig) -> VectorCount:
    """Counts the forward FLOPs that do not belong to matmuls.

    Raises:
        ValueError: a component has no card (see `uncountable_vector_flops`).
    """
    reason = uncountable_vector_flops(model)
    if reason is not None:
        raise ValueError(f"the vector FLOPs cannot be counted from the configuration: {reason}")
    block = block_of(model)
    position = position_of(model)
    ffn = ffn_of(model)
    n, t, c = model.n_layer, model.block_size, model.n_embd
    pairs = model.n_head * attended_pairs(model)
    elements = {
        "norm": (block.norms * n + 1) * t * c,
        "residual": 2 * n * t * c,
        "position": t * position.elements(n, c, model.query_width, model.kv_width),
        "activation": n * t * ffn.elements(model.ffn_width),
        "bias": t * biases(model),
        "softmax": pairs,
        "loss": t * model.padded_vocab_size,
        "dropout": (2 * n + 1) * t * c + pairs if model.dropout > 0 else 0,
    }
    costs = part_costs(model.normalization, model.position_encoding, model.ffn_type, model.activation)
    parts = {part: costs[part][1].flops * count for part, count in elements.items()}
    if model.qk_norm:
        parts["norm"] += RMSNORM.cost.flops * n * t * (model.query_width + model.kv_width)
    return VectorCount(tokens=t, **parts)
