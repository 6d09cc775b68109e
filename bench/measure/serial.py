"""The serial roofline of a training step: its parts one after another, each at the rate that this card was measured at.

GEMM FLOPs at the rate of the model's own GEMMs, causal attention at its own, the bytes of the memory-bound ops and of
the optimizer at that of a copy. A step cannot be faster but by overlapping parts; how near it comes is the program's.
The bytes are the least ones: every op reads and writes once, no logits are kept. No torch here.
"""

from collections.abc import Mapping
from typing import Any

from gptperf import flops
from gptperf.config import Config
from gptperf.plan.memory import element_bytes

__all__ = ["optimizer_bytes", "serial_ms"]

_FP32 = 4


def optimizer_bytes(config: Config) -> int:
    """Bytes of an update after one micro-batch: gradients into float32, their norm, AdamW, the compute dtype's copy.

    A parameter's gradient is read and written as float32, read for the norm, and read with weight and two moments,
    which are written with the copy. In float32 there is neither the conversion nor the copy.
    """
    size = element_bytes(config.system.weight_copy_dtype)
    low = size < _FP32
    a_parameter = (size + _FP32 if low else 0) + _FP32 + 4 * _FP32 + 3 * _FP32 + (size if low else 0)
    return flops.parameters(config.model).total * a_parameter


def serial_ms(config: Config, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a step of one micro-batch on one GPU, by part.

    Args:
        config: of the step.
        ceilings: rates as `gptperf.hardware.ceilings.Ceilings` names them.

    Raises:
        ValueError: the model's FLOPs or bytes are not known.
    """
    tokens = config.tokens_per_iter
    count = flops.flops_per_token(config.model, "strict")
    scores = count.scores * tokens / count.tokens
    gemm = 3 * (float(count.forward) * tokens / count.tokens - scores)
    moved = flops.bytes_moved(config.model, element_bytes(config.system.compute_dtype)).total * tokens
    seconds = {
        "gemm": gemm / ceilings["gemm_flop_s"],
        "attention": scores / ceilings["attention_forward_flop_s"] + 2 * scores / ceilings["attention_backward_flop_s"],
        "memory_bound": moved / ceilings["copy_byte_s"],
        "optimizer": optimizer_bytes(config) / ceilings["copy_byte_s"],
    }
    return {part: 1e3 * value for part, value in seconds.items()}
