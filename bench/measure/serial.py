"""The serial roofline of a training step: its parts one after another, each at the rate that was measured on this card.

GEMM FLOPs run at the rate of the model's own GEMMs, causal attention at its own rate, and the bytes of the memory-bound
ops and of the optimizer at the rate of a copy. A step can be faster than its roofline only if parts overlap, so the
fraction of the roofline says how well the program uses the card. The bytes are the least possible: every op reads its
inputs and writes its outputs once, and no logits are kept.
"""

from collections.abc import Mapping
from typing import Any

from gptperf import flops
from gptperf.cards import FP32_BYTES, element_bytes
from gptperf.config import Config
from gptperf.flops.matmuls import hidden_matrices
from gptperf.flops.model_cards import optimizer_of
from gptperf.plan.memory import direct_gradients

__all__ = ["optimizer_bytes", "serial_ms"]


def optimizer_bytes(config: Config) -> int:
    """Returns the bytes that the update after one micro-batch moves.

    They are those of the gradient norm and of the optimizer, which read the gradients as backward writes them. In
    float32 the model reads the master weights, so there is no copy.
    """
    size = element_bytes(config.system.weight_copy_dtype)
    gradient = size if direct_gradients(config, 1, "ddp") else FP32_BYTES
    copy = 0 if size == FP32_BYTES else size
    count, hidden = flops.parameters(config.model).total, hidden_matrices(config.model)
    card = optimizer_of(config.optimizer)
    return count * gradient + card.update_bytes(count, hidden.elements, copy, gradient)


def serial_ms(config: Config, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """Returns the milliseconds of a step of one micro-batch on one GPU, by part.

    Args:
        config: the run.
        ceilings: rates, as the fields of `gptperf.hardware.ceilings.Ceilings`.

    Raises:
        ValueError: a component has no card, so that the model's FLOPs or bytes are not known.
    """
    tokens = config.tokens_per_iter
    count = flops.flops_per_token(config.model, "strict")
    scores = count.scores * tokens / count.tokens
    gemm = 3 * (float(count.forward) * tokens / count.tokens - scores)
    size, ffn = element_bytes(config.system.compute_dtype), not config.system.keeps_ffn
    moved = flops.bytes_moved(config.model, size, recompute_ffn=ffn).total * tokens
    seconds = {
        "gemm": gemm / ceilings["gemm_flop_s"],
        "attention": scores / ceilings["attention_forward_flop_s"] + 2 * scores / ceilings["attention_backward_flop_s"],
        "memory_bound": moved / ceilings["copy_byte_s"],
        "optimizer": optimizer_bytes(config) / ceilings["copy_byte_s"],
    }
    return {part: 1e3 * value for part, value in seconds.items()}
