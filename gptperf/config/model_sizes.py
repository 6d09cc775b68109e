"""The sizes of a model that follow from several of its keys. This module loads no torch."""

from gptperf import registry
from gptperf.cards import FFN

__all__ = ["ModelSizes"]


class ModelSizes:
    """Base class of `ModelConfig`: what follows from its keys."""

    n_layer: int
    n_head: int
    n_kv_head: int | None
    n_embd: int
    head_dim: int | None
    d_ff: int | None
    d_ff_multiple: int
    block_size: int
    vocab_size: int
    vocab_multiple: int
    activation: str
    window: str
    ffn_type: str
    bias: bool
    attention_bias: str | None

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that a query attends to in each layer; `block_size` where nothing limits it."""
        parts = self.window.split(",")
        pattern = [self.block_size if part == "full" else min(int(part), self.block_size) for part in parts]
        return tuple(pattern[i % len(pattern)] for i in range(self.n_layer))

    @property
    def head_width(self) -> int:
        """Width D of one head: `head_dim`, or its default."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def query_width(self) -> int:
        """Width H D of the queries of all heads, and of the output of attention before its projection."""
        return self.n_head * self.head_width

    @property
    def kv_width(self) -> int:
        """Width K D of the keys of all heads, and of the values."""
        return self.kv_heads * self.head_width

    @property
    def attention_biases(self) -> str:
        """The biases of attention: "none", "qkv" or "all"."""
        return self.attention_bias or ("all" if self.bias else "none")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def ffn_width(self) -> int:
        """Width of the FFN: `d_ff`, or the default for the FFN type."""
        if self.d_ff is not None:
            return self.d_ff
        ffn: FFN | None = registry.card("ffn_type", self.ffn_type)
        return 4 * self.n_embd if ffn is None else ffn.default_width(self.n_embd, self.d_ff_multiple)

    @property
    def applied_activation(self) -> str:
        """The activation that the FFN applies: its own if it has one, as SwiGLU has SiLU, else `activation`."""
        return self.own_activation or self.activation

    @property
    def own_activation(self) -> str | None:
        """The FFN's own activation, which replaces `activation`; None if the FFN applies `activation`."""
        ffn: FFN | None = registry.card("ffn_type", self.ffn_type)
        return None if ffn is None else ffn.activation

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and of lm_head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
