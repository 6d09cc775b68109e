"""The parameters of a model, counted exactly from its configuration."""

from dataclasses import dataclass

from gptperf import registry
from gptperf.config import ModelConfig
from gptperf.flops.matmuls import biases, uncountable_flops, weights
from gptperf.flops.model_cards import block_of, ffn_of, norm_of, position_of

__all__ = ["ParameterCount", "parameters", "uncountable_parameters"]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. A tied lm_head is the embedding and counts there."""

    embedding: int
    position: int
    attention: int
    ffn: int
    norm: int
    """With the vectors of QK-norm."""
    lm_head: int

    @property
    def total(self) -> int:
        """All parameters, a shared one once."""
        return self.embedding + self.position + self.attention + self.ffn + self.norm + self.lm_head

    @property
    def non_embedding(self) -> int:
        """All but the position table, as nanoGPT counts (its token embedding is lm_head's weight)."""
        return self.total - self.position


def uncountable_parameters(model: ModelConfig) -> str | None:
    """Why `parameters` cannot count this model, or None when it can."""
    components = {"normalization": model.normalization, "position_encoding": model.position_encoding}
    return uncountable_flops(model) or registry.no_card(**components)


def parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the model that `model` describes.

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
    norms = block.norms * n + 1  # the last one before lm_head, for post-norm too
    qk_norms = 2 * model.head_dim * n if model.qk_norm else 0
    embedding = model.padded_vocab_size * c
    return ParameterCount(
        embedding=embedding,
        position=position.parameters(model.block_size, c),
        attention=weights(model, "qkv", "output") + biases(model, "qkv", "output"),
        ffn=n * ffn.parameters(c, model.ffn_width, model.bias),
        norm=norms * norm.parameters(c) + qk_norms,
        lm_head=0 if model.weight_tying else embedding,
    )
