"""A GPT in plain PyTorch, as a careful user writes it: the rival that torch.compile runs.

It imports nothing of gptperf's model or kernels. Projections are packed, attention is PyTorch's own with cuDNN first,
and the loss is computed from float32 logits. Parameters have the names of gptperf's model, so that a test can compare
both. Shapes: B batch, T tokens, C n_embd, H heads, D head_dim.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptperf.config import ModelConfig

__all__ = ["PlainGPT", "unsupported"]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x) ** 2,
}
_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def unsupported(config: ModelConfig) -> str | None:
    """Returns the part of an architecture that the plain model does not have, or None."""
    wanted = {
        "normalization": ("layernorm", "layernorm_nobias", "rmsnorm"),
        "position_encoding": ("learned_absolute", "rope"),
        "norm_position": ("pre", "post"),
        "ffn_type": ("standard", "swiglu"),
        "rope_pairs": ("half",),
        "window": ("full",),
        "qk_norm": (False,),
    }
    for key, values in wanted.items():
        if getattr(config, key) not in values:
            return f"{key} = {getattr(config, key)!r}"
    if config.ffn_type == "standard" and config.activation not in _ACTIVATIONS:
        return f"activation = {config.activation!r}"
    return "n_kv_head" if config.kv_heads != config.n_head else None


class _Norm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rms, self.eps = config.normalization == "rmsnorm", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.normalization == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if rotation is not None:
            q, k = (_rotated(part, *rotation) for part in (q, k))
        dropout = self.dropout if self.training else 0.0
        with sdpa_kernel(_ORDER, set_priority=True) if x.is_cuda else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class _FFN(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = None if config.ffn_type == "swiglu" else _ACTIVATIONS[config.activation]
        if self.activation is None:
            self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_width, bias=config.bias)
        else:
            self.up = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.out = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            return self.out(self.activation(self.up(x)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.norm1, self.norm2 = _Norm(config), _Norm(config)
        self.attention, self.ffn, self.dropout = _Attention(config), _FFN(config), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.norm1(x), rotation))
            return x + self.dropout(self.ffn(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, rotation)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class PlainGPT(nn.Module):
    """The model; its forward pass returns the mean loss.

    Args:
        config: an architecture for which `unsupported` returns None.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert unsupported(config) is None, unsupported(config)
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.rope = config.position_encoding == "rope"
        if self.rope:
            half = config.head_width // 2
            rates = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
            angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), rates)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)
        else:
            self.position = nn.ModuleDict({"wpe": nn.Embedding(config.block_size, config.n_embd)})
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.norm = _Norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss, a float32 scalar, for tokens and targets `(B, T)` int64."""
        x, T = self.wte(tokens), tokens.shape[1]
        if not self.rope:
            x = x + self.position["wpe"](torch.arange(T, device=tokens.device))
        rotation = (self.get_buffer("cos")[:T], self.get_buffer("sin")[:T]) if self.rope else None
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
