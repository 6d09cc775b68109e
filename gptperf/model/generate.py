"""Text generation with a key-value cache."""

import torch
from torch import Tensor

from gptperf.model.attention import KVCache
from gptperf.model.gpt import GPT

__all__ = ["generate"]


def generate(
    model: GPT,
    prompt: Tensor,
    tokens: int,
    *,
    vocab_size: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Tensor:
    """Continue a prompt, with a key-value cache; past `block_size` the cache starts again from the last half block.

    Args:
        model: in evaluation mode.
        prompt: `(P,)` int64, P >= 1, on the model's device.
        tokens: how many to add.
        vocab_size: ids that the tokenizer knows; the model's padding is never drawn.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: likeliest tokens to draw among; 0: all.
        generator: of the draws, on the model's device.

    Returns:
        `(tokens,)` int64, without the prompt.
    """
    block = model.config.block_size
    ids = prompt
    feed, caches = ids[-block:], [KVCache() for _ in model.blocks]
    for _ in range(tokens):
        logits = model(feed[None], caches=caches)[0, -1, :vocab_size].float()
        if temperature == 0:
            chosen = logits.argmax(keepdim=True)
        else:
            if 0 < top_k < vocab_size:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids, feed = torch.cat([ids, chosen]), chosen
        if caches[0].length == block:
            feed, caches = ids[-(block // 2 or 1) :], [KVCache() for _ in model.blocks]
    return ids[-tokens:]
