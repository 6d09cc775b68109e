"""Looks up the cards of a model's components, and of its optimizer.

The caller makes sure that each component has a card (`registry.no_card`).
"""

from dataclasses import replace

from gptperf import registry
from gptperf.cards import (
    FFN,
    OPTIMIZERS,
    Activation,
    AttentionBackend,
    Block,
    Norm,
    Optimizer,
    PositionEncoding,
    element_bytes,
)
from gptperf.config import ModelConfig, OptimizerConfig

__all__ = ["attention_of", "block_of", "ffn_of", "norm_of", "optimizer_of", "position_of"]


def norm_of(model: ModelConfig) -> Norm:
    """Returns the card of the model's norm."""
    card: Norm = registry.card("normalization", model.normalization)
    return card


def position_of(model: ModelConfig) -> PositionEncoding:
    """Returns the card of the model's position encoding."""
    card: PositionEncoding = registry.card("position_encoding", model.position_encoding)
    return card


def attention_of(model: ModelConfig) -> AttentionBackend:
    """Returns the card of the model's attention backend."""
    card: AttentionBackend = registry.card("attention_backend", model.attention_backend)
    return card


def block_of(model: ModelConfig) -> Block:
    """Returns the card of the model's block."""
    card: Block = registry.card("norm_position", model.norm_position)
    return card


def ffn_of(model: ModelConfig) -> FFN:
    """Returns the card of the model's FFN, with the op that runs it with the configured activation."""
    ffn: FFN = registry.card("ffn_type", model.ffn_type)
    activation: Activation | None = registry.card("activation", model.activation)
    if ffn.cost is not None or (activation is not None and activation.op == ffn.op):
        return ffn
    return replace(ffn, op=None)


def optimizer_of(optimizer: OptimizerConfig) -> Optimizer:
    """Returns the card of the optimizer, with the size of its moments."""
    card = OPTIMIZERS["normuon" if optimizer.normuon else optimizer.optimizer]
    return replace(card, element_bytes=element_bytes(optimizer.optimizer_state_dtype))
