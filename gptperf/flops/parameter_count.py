"""Counts the parameters of a model exactly from its configuration."""

from dataclasses import dataclass

from gptperf import registry
from gptperf.config import ModelConfig
from gptperf.flops.matmuls import biases, uncountable_flops, weights
from gptperf.flops.model_cards import block_of, ffn_of, norm_of, position_of

__all__ = ["ParameterCount", "parameters", "uncountable_parameters"]


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters by part. A tied lm_head is counted as the embedding."""

    embedding: int
    position: int
    attention: int
    ffn: int
    norm: int
    """Norms, including the weights of QK-norm."""
    lm_head: int

    @property
    def total(self) -> int:
        """All parameters; a shared parameter counts once."""
        return self.embedding + self.position + self.attention + self.ffn + self.norm + self.lm_head

    @property
    def non_embedding(self) -> int:
        """All but the position table, as nanoGPT counts (its token embedding is lm_head's weight)."""
        return self.total - self.position


def uncountable_parameters(model: ModelConfig) -> str | None:
    """Returns why `parameters` cannot count this model, or None if it can."""
    components = {"normalization": model.normalization, "position_encoding": model.position_encoding}
    return uncountable_flops(model) or registry.no_card(**components)


def parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model.

    Raises:
        ValueError: a component has no card (see `uncountable_parameters`).
    """
    reason = uncountable_parameters(model)
    if reason is not None:
        raise ValueError(f"the parameters cannot be counted from the configuration: {reason}")
    norm = norm_of(model)
    position = position_of(model)
    block = block_of(model)
    ffn = ffn_of(model)
    n, c = model.n_layer, model.n_embd
    norms = block.norms * n + 1  # the last one is before lm_head, in post-norm too
    qk_norms = 2 * model.head_width * n if model.qk_norm else 0
    embedding = model.padded_vocab_size * c
    return ParameterCount(
        embedding=embedding,
        position=position.parameters(model.block_size, c),
        attention=weights(model, "qkv", "output") + biases(model, "qkv", "output"),
        ffn=n * ffn.parameters(c, model.ffn_width, model.bias),
        norm=norms * norm.parameters(c) + qk_norms,
        lm_head=0 if model.weight_tying else embedding,
    )
