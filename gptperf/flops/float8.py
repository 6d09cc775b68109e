"""What fp8 changes: the matmul FLOPs that run in 8 bits, the bytes that quantisation moves. Loads no torch."""

from collections.abc import Iterator

from gptperf.config import Config
from gptperf.flops.matmuls import Linear, linears
from gptperf.flops.model_cards import ffn_of

__all__ = ["WRITES_FLOAT8", "float8_activation_bytes", "float8_bytes", "float8_flops", "float8_layers", "skips"]

WRITES_FLOAT8 = ("swiglu",)
"""Ops of an FFN that write the input of the down projection in 8 bits; another op runs without that projection."""

_MATMULS = {"forward": 1, "forward+dgrad": 2, "full": 3}
"""Level -> how many of the three matmuls of a linear layer run in 8 bits."""
_NAMES = {"qkv": "attention.qkv", "out": "attention.out"}


def skips(fp8_skip: str, layer: str, n_layer: int) -> bool:
    """Returns whether the key `fp8_skip` names a layer.

    Args:
        fp8_skip: value of the key.
        layer: name of the layer, such as blocks.3.attention.qkv.
        n_layer: number of blocks.
    """
    _, block, rest = layer.split(".", 2)
    words = {block, rest.partition(".")[0]}
    words |= {word for word, index in (("first", 0), ("last", n_layer - 1)) if int(block) == index}
    return any(part in words or f"{layer}.".startswith(f"{part}.") for part in filter(None, fp8_skip.split(",")))


def float8_layers(config: Config) -> Iterator[tuple[Linear, int]]:
    """Yields the linear layers of a block, each with the number of blocks in which it runs in 8 bits.

    A layer of an FFN is known here by the name in the card: ffn_gate_up is blocks.N.ffn.gate_up.
    """
    if config.system.matmul_dtype != "fp8":
        return
    model = config.model
    for linear in linears(model):
        if linear.part != "lm_head":
            name = _NAMES.get(linear.matmul.name, f"ffn.{linear.matmul.name.removeprefix('ffn_')}")
            layers = (f"blocks.{i}.{name}" for i in range(model.n_layer))
            yield linear, sum(not skips(config.system.fp8_skip, layer, model.n_layer) for layer in layers)


def float8_flops(config: Config, again: int = 0) -> int:
    """Returns the FLOPs per trained token that run in 8 bits; `again` is how often backward runs the forward pass."""
    forward = sum(2 * linear.matmul.weight * blocks for linear, blocks in float8_layers(config))
    return forward * (_MATMULS[config.system.fp8_level] + again)


def float8_activation_bytes(config: Config, moved: float) -> float:
    """Returns how many bytes of those that the activations move are moved by an op that also quantises."""
    if ffn_of(config.model).op not in WRITES_FLOAT8:
        return 0.0
    fused = sum(blocks for linear, blocks in float8_layers(config) if linear.matmul.name == "ffn_out")
    return moved * fused / config.model.n_layer


def float8_bytes(config: Config) -> tuple[int, int]:
    """Returns the bytes that quantisation moves besides what is moved in 16 bits: per token, and per micro-batch.

    An input is read, and written in 8 bits; with level full it is also written transposed. The same holds for a
    gradient. Where an op of the FFN writes 8 bits itself, they replace its 16 bits; another op is not computed again in
    backward. A weight is read and written twice.
    """
    per_token = per_micro_batch = 0
    level, op = config.system.fp8_level, ffn_of(config.model).op
    cast = 4 if level == "full" else 3
    for linear, blocks in float8_layers(config):
        into, out = cast * linear.matmul.into, 0 if level == "forward" else cast * linear.matmul.out
        fused, down = linear.part == "ffn" and op in WRITES_FLOAT8, linear.matmul.name == "ffn_out"
        if fused and down:
            into = -linear.matmul.into * (2 if level == "full" else 1)
        elif fused and level == "full":
            out = 0
        elif op is not None and down:
            into -= 2 * linear.matmul.into
        per_token += blocks * (into + out)
        per_micro_batch += blocks * linear.matmul.weight * (3 if level == "forward" else 6)
    return per_token, per_micro_batch
