"""A decoder-only transformer of gptperf for Hugging Face, with the parts that no class of transformers combines.

`python -m gptperf.hugging_face export` copies this file beside the weights of such a model, and this reads it:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The file needs torch and transformers alone. Shapes: B batch, T tokens, S cached and new tokens, C width, H query heads,
K key and value heads, D width of a head, F width of the FFN, V rows of the vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["GptperfConfig", "GptperfForCausalLM"]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
"""Name of the cache of keys and values in this version of transformers."""


class GptperfConfig(PretrainedConfig):
    """The sizes and parts of a model, under the names of gptperf's configuration.

    Args:
        n_layer: Number of blocks.
        n_head: Number of query heads.
        n_kv_head: Number of key and value heads.
        n_embd: Width of the residual stream.
        head_dim: Width of one head; default: n_embd / n_head.
        d_ff: Width of the FFN.
        block_size: Longest sequence that the model was trained on; with learned positions, the longest at all.
        vocab_size: Rows of the embedding and of lm_head.
        normalization: layernorm, layernorm_nobias or rmsnorm.
        activation: Activation of the standard FFN; SwiGLU has SiLU.
        position_encoding: learned_absolute, rope or none.
        window: Tokens that a query attends to, itself included: a number or full; with commas for the layers in turn.
        norm_position: pre, or post: norm after each residual addition.
        ffn_type: standard or swiglu.
        bias: Whether the linear layers of the FFN have a bias.
        attention_bias: Biases of attention: none; qkv: of queries, keys and values; all: of the output too.
        dropout: Dropout after the embedding, the attention weights, attention and FFN, in training.
        qk_norm: Whether query and key heads are RMS-normalised before the position encoding.
        norm_eps: Epsilon of every norm.
        rope: The keys of RoPE without their prefix "rope_", such as theta, pairs and scaling.
        tie_word_embeddings: Whether lm_head is the embedding.
    """

    model_type = "gptperf"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 - as in every configuration of transformers
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        n_layer: int = 12,
        n_head: int = 12,
        n_kv_head: int = 12,
        n_embd: int = 768,
        head_dim: int | None = None,
        d_ff: int = 3072,
        block_size: int = 1024,
        vocab_size: int = 50304,
        normalization: str = "layernorm_nobias",
        activation: str = "gelu",
        position_encoding: str = "learned_absolute",
        window: str = "full",
        norm_position: str = "post",
        ffn_type: str = "standard",
        bias: bool = False,
        attention_bias: str = "none",
        dropout: float = 0.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        rope: dict[str, Any] | None = None,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head
        self.n_embd, self.head_dim = n_embd, head_dim or n_embd // n_head
        self.d_ff, self.block_size, self.vocab_size = d_ff, block_size, vocab_size
        self.normalization, self.activation, self.position_encoding = normalization, activation, position_encoding
        self.window, self.norm_position, self.ffn_type = window, norm_position, ffn_type
        self.bias, self.attention_bias, self.dropout = bias, attention_bias, dropout
        self.qk_norm, self.norm_eps, self.rope = qk_norm, norm_eps, rope or {}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32."""

    def __init__(self, config: GptperfConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.normalization == "layernorm" else None
        self.is_rms, self.eps = config.normalization == "rmsnorm", config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x `(..., C)`."""
        if self.is_rms:
            return rms_norm(x, self.weight, self.eps)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight, computed in float32, for x `(..., N)` and the weight `(N,)`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rope_tables(config: GptperfConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the angles of RoPE at positions `(B, T)`, each `(B, 1, T, D/2)` float32."""
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # mps has no float64
    angle = positions[:, None, :, None].to(exact) * frequencies(config.rope, config.head_dim).to(
        positions.device, exact
    )
    return angle.cos().float(), angle.sin().float()


def frequencies(rope: dict[str, Any], D: int) -> Tensor:
    """Returns the angles of RoPE from one position to the next, `(D/2,)` float64.

    With linear scaling all are divided by a factor. With that of LLaMA 3.1 only those of long wavelengths are: those of
    which the original block has fewer waves than the low factor, none of which it has more than the high factor, and
    between the two a mean of both.
    """
    found = rope.get("theta", 1e4) ** -(torch.arange(0, D, 2, dtype=torch.float64, device="cpu") / D)
    scaling = rope.get("scaling", "none")
    if scaling == "none":
        return found
    scaled = found / rope["factor"]
    if scaling == "linear":
        return scaled
    waves = rope["original_block_size"] * found / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return kept * found + (1 - kept) * scaled


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotates the pairs of elements of x `(B, heads, T, D)` by the angles of `rope_tables`."""
    cos, sin = tables
    one, two = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)
    rotated = (one * cos - two * sin, one * sin + two * cos)
    return torch.stack(rotated, -1 if interleaved else -2).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with packed projections, grouped heads and an optional window."""

    def __init__(self, config: GptperfConfig, layer: int) -> None:
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.heads, self.layer = (config.n_head, config.n_kv_head, config.n_kv_head), layer
        self.qkv = nn.Linear(C, sum(self.heads) * D, bias=config.attention_bias != "none")
        self.out = nn.Linear(config.n_head * D, C, bias=config.attention_bias == "all")
        self.q_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.eps, self.dropout = config.norm_eps, config.dropout
        self.interleaved = config.rope.get("pairs", "half") == "interleaved"

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, seen: Tensor, cache: Any) -> Tensor:
        """Returns the output `(B, T, C)`.

        Args:
            x: `(B, T, C)`.
            tables: What `rope_tables` returned, or None without RoPE.
            seen: `(B, 1, T, S)`, true where a query attends to a key.
            cache: Cache of transformers, or None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2).split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        if tables is not None:
            q, k = rotate(q, tables, self.interleaved), rotate(k, tables, self.interleaved)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        groups = self.heads[0] // self.heads[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The FFN of GPT-2, or SwiGLU, whose gate and up projections are one."""

    def __init__(self, config: GptperfConfig) -> None:
        super().__init__()
        self.is_swiglu, self.activation = config.ffn_type == "swiglu", _ACTIVATIONS[config.activation]
        if self.is_swiglu:
            self.gate_up = nn.Linear(config.n_embd, 2 * config.d_ff, bias=config.bias)
        else:
            self.up = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.out = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output `(B, T, C)` for x `(B, T, C)`."""
        if self.is_swiglu:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.out(F.silu(gate) * up)
        return self.out(self.activation(self.up(x)))


class GptperfBlock(nn.Module):
    """A block: attention and FFN, each with a norm before it (pre) or after the residual addition (post)."""

    def __init__(self, config: GptperfConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.attention = Norm(config), Attention(config, layer)
        self.norm2, self.ffn = Norm(config), FeedForward(config)
        self.dropout, self.is_pre = nn.Dropout(config.dropout), config.norm_position == "pre"

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, seen: Tensor, cache: Any) -> Tensor:
        """Returns the output of the block `(B, T, C)`; the arguments are those of `Attention`."""
        if self.is_pre:
            x = x + self.dropout(self.attention(self.norm1(x), tables, seen, cache))
            return x + self.dropout(self.ffn(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, tables, seen, cache)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class LearnedPositions(nn.Module):
    """A learned vector for each position."""

    def __init__(self, config: GptperfConfig) -> None:
        super().__init__()
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the vectors `(B, T, C)` of positions `(B, T)`."""
        return self.wpe(positions)


class GptperfForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Its parameters have the names that they have in gptperf."""

    config_class = GptperfConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012
    _no_split_modules = ["GptperfBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: GptperfConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = LearnedPositions(config) if config.position_encoding == "learned_absolute" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(GptperfBlock(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns lm_head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces lm_head."""
        self.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Draws the weights of a new module from N(0, 0.02); biases are zero."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _masks(self, start: int, T: int, given: Tensor | None, device: torch.device) -> list[Tensor]:
        """Returns for each layer `(B or 1, 1, T, S)`, true where one of the T tokens from `start` on attends to a key.

        `given` is `(B, S)`, 0 at keys that are padding, or with a cache of fixed size `(B, 1, T, S)`, true or 0.0 at
        keys that may be attended to. A query of padding attends to itself, so that it has a value.
        """
        S = start + T if given is None else given.shape[-1]
        query, key = torch.arange(T, device=device)[:, None] + start, torch.arange(S, device=device)
        if given is not None and given.ndim == 2:
            given = given[:, None, None, :].bool()
        elif given is not None and given.dtype != torch.bool:
            given = given == 0
        pattern = self.config.window.split(",")
        masks: dict[str, Tensor] = {}
        for window in pattern:
            mask = ((key <= query) if window == "full" else (key <= query) & (key > query - int(window)))[None, None]
            if given is not None:
                mask = (mask & given) | (key == query)
            masks[window] = mask
        return [masks[pattern[layer % len(pattern)]] for layer in range(self.config.n_layer)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits `(B, T, V)`, and with labels `(B, T)` the mean loss of the next tokens.

        Args:
            input_ids: `(B, T)`, the tokens after the cached ones.
            attention_mask: `(B, S)`, 0 at padding; or a mask as `_masks` takes it.
            position_ids: `(B, T)`; default: the place after the cached tokens.
            past_key_values: The cache of keys and values, which the latest versions of transformers call `cache`.
            cache: The same.
            inputs_embeds: `(B, T, C)` in place of tokens.
            labels: `(B, T)`, the tokens themselves; -100 is left out.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of the last tokens whose logits are returned; 0: all.
        """
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        T, start = x.shape[1], 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=x.device)[None]
        if self.position is not None:
            x = x + self.position(position_ids)
        tables = rope_tables(self.config, position_ids) if self.config.position_encoding == "rope" else None
        x = self.dropout(x)
        for block, seen in zip(self.blocks, self._masks(start, T, attention_mask, x.device), strict=True):
            x = block(x, tables, seen, cache)
        logits = self.lm_head(self.norm(x[:, -logits_to_keep:]))  # -0 is all
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
