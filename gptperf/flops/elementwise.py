"""What a model does besides its matmuls: vector FLOPs and memory traffic, exact. No tensor is seen here.

Neither enters MFU, which counts matmuls alone; a roofline needs both. `COSTS` says what an element costs and why.
"""

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple

from gptperf.config import ModelConfig
from gptperf.flops.parameter_count import (
    BLOCK_NORMS,
    FFN_MATRICES,
    causal_pairs,
    exact,
    uncountable,
    uncountable_parameters,
)

__all__ = ["COSTS", "BytesMoved", "Cost", "Traffic", "VectorCount", "bytes_moved"]
__all__ += ["uncountable_vector_flops", "vector_flops"]


class Cost(NamedTuple):
    """Forward FLOPs of one element, and what they are."""

    flops: int
    why: str


COSTS: dict[str, Cost] = {
    "layernorm": Cost(7, "sum, minus mean, square, sum, times 1 / std, times weight, plus bias"),
    "layernorm_nobias": Cost(6, "as layernorm, without the bias"),
    "rmsnorm": Cost(4, "square, sum, times 1 / rms, times weight; QK-norm too"),
    "residual": Cost(1, "plus"),
    "learned_absolute": Cost(1, "plus, of an embedding"),
    "rope": Cost(3, "four products and two sums for two elements of a query or key"),
    "none": Cost(0, "no position encoding"),
    "gelu": Cost(5, "over sqrt 2, erf, plus 1, times x, over 2"),
    "gelu_tanh": Cost(9, "square, times a, plus 1, times x, times b, tanh, plus 1, times x, over 2"),
    "silu": Cost(4, "minus, exp, plus 1, x over that"),
    "relu": Cost(1, "compare"),
    "leaky_relu": Cost(2, "compare, times slope"),
    "relu_squared": Cost(2, "compare, square"),
    "swiglu": Cost(5, "silu of gate, times up"),
    "bias": Cost(1, "plus, of a linear output"),
    "softmax": Cost(6, "of a causal pair: times 1 / sqrt(D), maximum, minus, exp, sum, over sum"),
    "loss": Cost(4, "of a logit: maximum, minus, exp, sum"),
    "dropout": Cost(2, "times mask, times scale"),
}
"""Every operation on an element is one, exp, erf and tanh too. What happens once a row does not count."""

_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "relu_squared")


@dataclass(frozen=True)
class VectorCount:
    """Forward FLOPs of one sequence that are no matmul's, by part, over all layers.

    The optimizer, the embedding look-up and the making of random numbers are not among them.
    """

    tokens: int
    """Tokens of the sequence."""
    norm: int
    """Norms, QK-norm among them."""
    residual: int
    position: int
    activation: int
    bias: int
    softmax: int
    """Of the attention, over the causal pairs."""
    loss: int
    dropout: int

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokens"}

    @property
    def forward(self) -> int:
        """Forward vector FLOPs of the sequence."""
        return sum(self.parts.values())

    @property
    def forward_per_token(self) -> int | Fraction:
        """Forward vector FLOPs of one token, exact."""
        return exact(self.forward, self.tokens)


def uncountable_vector_flops(model: ModelConfig) -> str | None:
    """Why `vector_flops` cannot count this model, or None when it can."""
    known = dict.fromkeys(_ACTIVATIONS, 1)
    plugin = uncountable(activation=(model.activation, known)) if model.ffn_type == "standard" else None
    return uncountable_parameters(model) or plugin


def vector_flops(model: ModelConfig) -> VectorCount:
    """Count the forward FLOPs of everything that is no matmul, with `COSTS`.

    Raises:
        ValueError: a component comes from a plugin (see `uncountable_vector_flops`).
    """
    reason = uncountable_vector_flops(model)
    if reason is not None:
        raise ValueError(f"the vector FLOPs cannot be counted from the configuration: {reason}")
    n, t, c = model.n_layer, model.block_size, model.n_embd
    queries_keys = c + model.kv_heads * model.head_dim
    pairs = n * model.n_head * causal_pairs(model)
    elements = {
        "norm": {model.normalization: (BLOCK_NORMS[model.norm_position] * n + 1) * t * c},
        "residual": {"residual": 2 * n * t * c},
        "position": {model.position_encoding: t * (n * queries_keys if model.position_encoding == "rope" else c)},
        "activation": {
            model.activation if model.ffn_type == "standard" else "swiglu": n * t * model.ffn_width,
        },
        "bias": {"bias": n * t * _bias_width(model)},
        "softmax": {"softmax": pairs},
        "loss": {"loss": t * model.padded_vocab_size},
        "dropout": {"dropout": (2 * n + 1) * t * c + pairs if model.dropout > 0 else 0},
    }
    if model.qk_norm:
        heads = n * t * queries_keys
        elements["norm"]["rmsnorm"] = elements["norm"].get("rmsnorm", 0) + heads
    parts = {part: sum(COSTS[name].flops * count for name, count in named.items()) for part, named in elements.items()}
    return VectorCount(tokens=t, **parts)


def _bias_width(model: ModelConfig) -> int:
    """Elements of a layer's linear outputs that a bias is added to."""
    c, kv_width = model.n_embd, model.kv_heads * model.head_dim
    return (c + 2 * kv_width) + c + (FFN_MATRICES[model.ffn_type] - 1) * model.ffn_width + c if model.bias else 0


class Traffic(NamedTuple):
    """Bytes that a part moves for one token."""

    forward: int
    backward: int


@dataclass(frozen=True)
class BytesMoved:
    """Bytes to and from the GPU's memory for one token, by memory-bound part, over all layers.

    Every op reads what it is given and writes what it returns once, as the Triton kernels do. Not here is what all
    tokens of a micro-batch share (weights, their gradients, partial sums, tables), what is one number a row, and the
    matmuls and the attention, which are bound by their FLOPs.
    """

    element_bytes: int
    embedding: Traffic
    norm: Traffic
    """With the residual adds, and the sums of gradients that meet in the residual stream."""
    position: Traffic
    """With the split into heads and QK-norm."""
    activation: Traffic
    bias: Traffic
    """Their gradients; forward, the matmul adds them."""
    dropout: Traffic
    loss: Traffic

    @property
    def parts(self) -> dict[str, Traffic]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "element_bytes"}

    @property
    def forward(self) -> int:
        """Bytes of the forward pass."""
        return sum(part.forward for part in self.parts.values())

    @property
    def backward(self) -> int:
        """Bytes of the backward pass."""
        return sum(part.backward for part in self.parts.values())

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.forward + self.backward


def bytes_moved(model: ModelConfig, element_bytes: int = 2, *, logits_kept: bool = False) -> BytesMoved:
    """Count the least traffic of one token in training.

    Args:
        element_bytes: of an element of an activation or its gradient.
        logits_kept: the loss is a softmax over logits that stay in memory until backward, rather than
            `linear_cross_entropy`, which in forward puts their gradient in their place.

    Raises:
        ValueError: a component comes from a plugin (see `uncountable_parameters`), or element_bytes < 1.
    """
    reason = uncountable_parameters(model)
    if reason is not None:
        raise ValueError(f"the bytes moved cannot be counted from the configuration: {reason}")
    if element_bytes < 1:
        raise ValueError(f"element_bytes: found {element_bytes}, wanted a number >= 1; nearest: 1")
    n, c, f, v = model.n_layer, model.n_embd, model.ffn_width, model.padded_vocab_size

    def traffic(forward: int, backward: int) -> Traffic:
        return Traffic(element_bytes * forward, element_bytes * backward)

    dropped = (2 * n + 1) * c if model.dropout > 0 else 0
    gated = model.ffn_type == "swiglu"  # its backward writes the product again, for the gradient of the projection
    return BytesMoved(
        element_bytes=element_bytes,
        embedding=traffic(2 * c, 2 * c),
        norm=traffic(*_norm_elements(model)),
        position=traffic(*_position_elements(model)),
        activation=traffic(n * f * (3 if gated else 2), n * f * (6 if gated else 3)),
        bias=traffic(0, n * _bias_width(model)),
        dropout=Traffic(*[(2 * element_bytes + 1) * dropped] * 2),  # and a mask of one byte
        # Kept: the logits are read, then read again and d written. The op: d in their place, then dx is scaled.
        loss=traffic(v, 2 * v) if logits_kept else traffic(2 * v, 2 * c),
    )


def _norm_elements(model: ModelConfig) -> tuple[int, int]:
    """Elements that the norms move for one token, forward and backward.

    2 L norms add a residual (4 C forward), one does not (2 C). Backward, a norm that gets the gradient of its sum too
    moves 4 C, another one 3 C, and adding two gradients that meet at a tensor 3 C. Pre-norm: all but the first and the
    last norm get it, and two gradients meet at the first block's input. Post-norm: none gets it, and two meet at the
    input of every attention and every FFN.
    """
    n, c = model.n_layer, model.n_embd
    pre = 4 * (2 * n - 1) + 3 * 2 + 3
    post = 3 * (2 * n + 1) + 3 * 2 * n
    return (4 * 2 * n + 2) * c, (pre if model.norm_position == "pre" else post) * c


def _position_elements(model: ModelConfig) -> tuple[int, int]:
    """Elements that position encoding, split into heads and QK-norm move for one token, forward and backward."""
    n, c, kv_width = model.n_layer, model.n_embd, model.kv_heads * model.head_dim
    packed, queries_keys = c + 2 * kv_width, c + kv_width
    if model.position_encoding == "rope":  # one op; with QK-norm its backward reads queries and keys again
        return n * 2 * packed, n * (2 * packed + (queries_keys if model.qk_norm else 0))
    # The split is a view; backward puts the three gradients together.
    forward, backward = 0, n * 2 * packed
    if model.qk_norm:
        forward, backward = forward + n * 2 * queries_keys, backward + n * 3 * queries_keys
    if model.position_encoding == "learned_absolute":  # added to the embedding; backward sums it over the batch
        forward, backward = forward + 2 * c, backward + c
    return forward, backward
