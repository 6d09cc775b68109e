"""The card of each component of a model, and of its optimizer.

The caller makes sure that a component has a card (`registry.no_card`).
"""

from gptperf import registry
from gptperf.cards import FFN, OPTIMIZERS, AttentionBackend, Block, Norm, Optimizer, PositionEncoding
from gptperf.config import ModelConfig, OptimizerConfig

__all__ = ["attention_of", "block_of", "ffn_of", "norm_of", "optimizer_of", "position_of"]


def norm_of(model: ModelConfig) -> Norm:
    """The card of the norm."""
    card: Norm = registry.card("normalization", model.normalization)
    return card


def position_of(model: ModelConfig) -> PositionEncoding:
    """The card of the position encoding."""
    card: PositionEncoding = registry.card("position_encoding", model.position_encoding)
    return card


def attention_of(model: ModelConfig) -> AttentionBackend:
    """The card of the attention backend."""
    card: AttentionBackend = registry.card("attention_backend", model.attention_backend)
    return card


def block_of(model: ModelConfig) -> Block:
    """The card of the block."""
    card: Block = registry.card("norm_position", model.norm_position)
    return card


def ffn_of(model: ModelConfig) -> FFN:
    """The card of the FFN."""
    card: FFN = registry.card("ffn_type", model.ffn_type)
    return card


def optimizer_of(optimizer: OptimizerConfig) -> Optimizer:
    """The card of the optimizer. There is one so far; a choice in the configuration is looked up here."""
    return OPTIMIZERS["adamw"]
