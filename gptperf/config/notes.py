"""Lines about choices that are valid but may surprise."""

from typing import Any

from gptperf import registry

__all__ = ["notes_of"]


def notes_of(config: Any) -> list[str]:
    """Returns a line for each choice that is valid but may surprise."""
    lines = []
    end = config.optimizer.lr_decay_iters or config.train.max_iters
    if config.optimizer.warmup_iters >= end:
        lines.append(
            f"warmup_iters = {config.optimizer.warmup_iters} is not shorter than the schedule ({end} iterations), so "
            "the learning rate never reaches its peak"
        )
    model = config.model
    if model.own_activation is not None and model.activation != type(model).activation:
        applied = f"ffn_type = {model.ffn_type!r} applies {model.own_activation}"
        lines.append(f"activation = {model.activation!r} has no effect: {applied}")
    if model.arch_preset == "gpt2" and model.norm_position == "post":
        lines.append("preset gpt2 is post-norm without biases; the released GPT-2 is preset gpt2_openai")
    if config.system.matmul_dtype == "fp8":
        lines.append(
            "fp8: the MFU is relative to the bfloat16 peak (bf16-equivalent); blended_mfu_percent counts each matmul "
            "relative to the peak of its own dtype"
        )
    if config.data.document_mask:
        lines.append(
            "document_mask = true: the plan and the FLOPs before the first iteration assume that a sequence is one "
            "document; a log line counts those of its batches"
        )
    masked = config.data.document_mask or min(model.windows) < model.block_size
    card = registry.card("attention_backend", model.attention_backend)
    dense = card is not None and card.kept_mask(model.block_size, model.dropout > 0) > 0
    if masked and dense and config.system.device != "cpu":
        why = "dropout > 0" if model.dropout else f"block_size = {model.block_size} is not a multiple of 128"
        lines.append(f"{why}: masks have block_size x block_size elements, because FlexAttention does not run")
    return lines
