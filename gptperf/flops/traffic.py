"""Counts the bytes that the memory-bound ops of a model move at least."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from gptperf.config import ModelConfig
from gptperf.flops.matmuls import biases
from gptperf.flops.model_cards import block_of, ffn_of, position_of
from gptperf.flops.parameter_count import uncountable_parameters

__all__ = ["BytesMoved", "Traffic", "bytes_moved"]


class Traffic(NamedTuple):
    """Bytes that one part of the model moves per token."""

    forward: int
    backward: int


@dataclass(frozen=True)
class BytesMoved:
    """Bytes moved to and from GPU memory per token, by memory-bound part, over all layers.

    Every op reads its operands and writes its results once, as the Triton kernels do. The count leaves out tensors that
    all tokens of a micro-batch share (weights, their gradients, partial sums, tables), single numbers per row, and the
    matmuls and attention, which are bound by their FLOPs.
    """

    element_bytes: int
    embedding: Traffic
    norm: Traffic
    """Norms with their residual adds, and the sums of gradients that meet in the residual stream."""
    position: Traffic
    """Position encoding with the split into heads and QK-norm."""
    activation: Traffic
    bias: Traffic
    """Gradients of the biases; in forward the matmul adds the biases."""
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
        """Bytes of both passes."""
        return self.forward + self.backward


def bytes_moved(
    model: ModelConfig, element_bytes: int = 2, *, logits_kept: bool = False, recompute_ffn: bool = True
) -> BytesMoved:
    """Counts the minimum memory traffic of one token in training.

    Args:
        model: sizes and components.
        element_bytes: bytes of an element of an activation or its gradient.
        logits_kept: whether the loss is a softmax over logits that stay in memory until backward, instead of
            `linear_cross_entropy`, which overwrites them with their gradients in forward.
        recompute_ffn: whether the op of the FFN computes its activation again in backward.

    Raises:
        ValueError: a component has no card (see `uncountable_parameters`), or element_bytes < 1.
    """
    reason = uncountable_parameters(model)
    if reason is not None:
        raise ValueError(f"the bytes moved cannot be counted from the configuration: {reason}")
    if element_bytes < 1:
        raise ValueError(f"element_bytes: found {element_bytes}, wanted a number >= 1; nearest: 1")
    block = block_of(model)
    position = position_of(model)
    ffn = replace(ffn_of(model), recomputes=recompute_ffn)
    n, c, v = model.n_layer, model.n_embd, model.padded_vocab_size

    def traffic(forward: int, backward: int) -> Traffic:
        return Traffic(element_bytes * forward, element_bytes * backward)

    dropped = (2 * n + 1) * c if model.dropout > 0 else 0
    activation = ffn.moved(model.ffn_width)
    return BytesMoved(
        element_bytes=element_bytes,
        embedding=traffic(2 * c, 2 * c),
        norm=traffic(*block.moved(n, c)),
        position=traffic(*position.moved(n, c, model.query_width, model.kv_width, model.qk_norm)),
        activation=traffic(n * activation.forward, n * activation.backward),
        bias=traffic(0, biases(model)),
        dropout=Traffic(*[(2 * element_bytes + 1) * dropped] * 2),  # one element in and out, and a mask of one byte
        # Logits kept: forward reads the logits, and backward reads them again and writes their gradients. With the op,
        # forward overwrites the logits with their gradients, and backward scales dx.
        loss=traffic(v, 2 * v) if logits_kept else traffic(2 * v, 2 * c),
    )
