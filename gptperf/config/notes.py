"""Lines about choices that are valid but may surprise. This module loads no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptperf import registry
from gptperf.cards import FFN
from gptperf.formats import counted

__all__ = ["notes_on"]

_OF_LLAMA3 = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_block_size")
_UNREAD = {"none": ("rope_factor", *_OF_LLAMA3), "linear": _OF_LLAMA3}
"""Value of rope_scaling -> keys that it does not read."""


def notes_on(c: Mapping[str, Any], windows: Sequence[int], usual: Mapping[str, Any]) -> list[str]:
    """Returns a line for each choice that is valid but may surprise.

    Args:
        c: key -> value.
        windows: tokens that a query attends to in each layer.
        usual: key -> default.
    """
    lines = []
    end = c["lr_decay_iters"] or c["max_iters"]
    if c["warmup_iters"] >= end:
        lines.append(
            f"warmup_iters = {c['warmup_iters']} is not shorter than the schedule ({counted(end, 'iteration')}), so "
            "the learning rate never reaches its peak"
        )
    ffn: FFN | None = registry.card("ffn_type", c["ffn_type"])
    if ffn is not None and ffn.activation is not None and c["activation"] != usual["activation"]:
        applied = f"ffn_type = {c['ffn_type']!r} applies {ffn.activation}"
        lines.append(f"activation = {c['activation']!r} has no effect: {applied}")
    unread = _UNREAD.get(c["rope_scaling"], ())
    lines += [
        f"{name} = {c[name]} has no effect: rope_scaling = {c['rope_scaling']!r}"
        for name in unread
        if c[name] != usual[name]
    ]
    if c["arch_preset"] == "gpt2" and c["norm_position"] == "post":
        lines.append("preset gpt2 is post-norm without biases; the released GPT-2 is preset gpt2_openai")
    if c["matmul_dtype"] == "fp8":
        lines.append(
            "fp8: the MFU is relative to the bfloat16 peak (bf16-equivalent); blended_mfu_percent counts each matmul "
            "relative to the peak of its own dtype"
        )
    if c["document_mask"]:
        lines.append(
            "document_mask = true: the plan and the FLOPs before the first iteration assume that a sequence is one "
            "document; a log line counts those of its batches"
        )
    masked = c["document_mask"] or min(windows) < c["block_size"]
    card = registry.card("attention_backend", c["attention_backend"])
    dense = card is not None and card.kept_mask(c["block_size"], c["dropout"] > 0) > 0
    if masked and dense and c["device"] != "cpu":
        why = "dropout > 0" if c["dropout"] else f"block_size = {c['block_size']} is not a multiple of 128"
        lines.append(f"{why}: masks have block_size x block_size elements, because FlexAttention does not run")
    return lines
