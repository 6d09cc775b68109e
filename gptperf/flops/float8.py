"""How many of a model's matmul FLOPs run in 8 bits. Loads no torch."""

from fractions import Fraction

from gptperf.config import Config
from gptperf.flops.count import flops_per_token
from gptperf.flops.matmuls import linears

__all__ = ["float8_share", "skips"]

_MATMULS = {"forward": 1, "forward+dgrad": 2, "full": 3}
"""Level -> how many of the three matmuls of a linear layer run in 8 bits."""
_LAYER_OF = {"qkv": "attention.qkv", "out": "attention.out"}


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


def float8_share(config: Config) -> Fraction:
    """Returns the share of the strict training FLOPs whose matmuls run in 8 bits, 0..1.

    The layers of an FFN have the names of its card here, so a skipped part blocks.N.ffn.NAME counts only by that name.
    """
    if config.system.matmul_dtype != "fp8":
        return Fraction(0)
    model, forward = config.model, 0
    for linear in linears(model):
        if linear.part == "lm_head":
            continue
        name = _LAYER_OF.get(linear.matmul.name, f"ffn.{linear.matmul.name.removeprefix('ffn_')}")
        blocks = range(linear.times)
        run = sum(not skips(config.system.fp8_skip, f"blocks.{i}.{name}", model.n_layer) for i in blocks)
        forward += 2 * linear.matmul.weight * run
    per_token = forward * _MATMULS[config.system.fp8_level]
    return Fraction(per_token) / Fraction(flops_per_token(model, "strict").training_per_token)
