"""Lists the linear layers of a model from the cards of its components."""

from typing import NamedTuple

from gptperf import registry
from gptperf.cards import Matmul, projections
from gptperf.config import ModelConfig
from gptperf.flops.model_cards import ffn_of

__all__ = ["Linear", "biases", "linears", "uncountable_flops", "weights"]


class Linear(NamedTuple):
    """A linear layer, and the number of times that a model has it."""

    part: str
    """The part of the model: qkv, output, ffn or lm_head."""
    matmul: Matmul
    times: int


def uncountable_flops(model: ModelConfig) -> str | None:
    """Returns why the matmuls of this model cannot be counted, or None if they can."""
    return registry.no_card(ffn_type=model.ffn_type, norm_position=model.norm_position)


def linears(model: ModelConfig) -> tuple[Linear, ...]:
    """Returns every linear layer, including a tied lm_head, in the order of the forward pass.

    The FFN must have a card (see `uncountable_flops`).
    """
    ffn = ffn_of(model)
    qkv, out = projections(model.n_embd, model.query_width, model.kv_width)
    return (
        Linear("qkv", qkv, model.n_layer),
        Linear("output", out, model.n_layer),
        *(Linear("ffn", matmul, model.n_layer) for matmul in ffn.matmuls(model.n_embd, model.ffn_width)),
        Linear("lm_head", Matmul("lm_head", model.padded_vocab_size, model.n_embd), 1),
    )


def weights(model: ModelConfig, *parts: str) -> int:
    """Returns the elements of the matrices that multiply activations, over all layers, for all or only these parts."""
    return sum(x.times * x.matmul.weight for x in linears(model) if not parts or x.part in parts)


def biases(model: ModelConfig, *parts: str) -> int:
    """Returns the elements of the linear layers' biases, over all layers, for all or only these parts."""
    attention = {"none": (), "qkv": ("qkv",), "all": ("qkv", "output")}[model.attention_biases]
    biased = (*attention, "ffn") if model.bias else attention  # lm_head never has a bias
    return sum(x.times * x.matmul.out for x in linears(model) if x.part in biased and (not parts or x.part in parts))
