"""Text generation with a key-value cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptperf.model.attention import KVCache
from gptperf.model.gpt import GPT

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    tokens: int,
    *,
    vocab_size: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yields the tokens that continue a prompt, each as soon as it is drawn.

    Only the last `block_size` tokens of a prompt are read. When the cache holds `block_size` tokens, it is built anew
    from the last half of them, so every token but the first ones sees at least half a context.

    Args:
        model: the model, in evaluation mode.
        prompt: `(P,)` int64, P >= 1, on the model's device.
        tokens: the number of tokens to generate.
        vocab_size: the size of the tokenizer's vocabulary; ids of the model's padding are never drawn.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of the most likely tokens to draw from; 0 draws from all.
        generator: the source of random numbers, on the model's device.
    """
    block = model.config.block_size
    size = min(block, len(prompt) + tokens)
    ids = prompt
    feed, caches = ids[-block:], [KVCache(size) for _ in model.blocks]
    for _ in range(tokens):
        logits = model(feed[None], caches=caches, last_only=True)[0, -1, :vocab_size].float()
        if temperature == 0:
            chosen = logits.argmax(keepdim=True)
        else:
            if 0 < top_k < vocab_size:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            # In float64, and with the maximum at 0, no temperature overflows.
            weights = ((logits - logits.max()).double() / temperature).softmax(-1)
            chosen = torch.multinomial(weights, 1, generator=generator)
        yield int(chosen)
        ids, feed = torch.cat([ids, chosen]), chosen
        if caches[0].length == block:
            feed, caches = ids[-(block // 2 or 1) :], [KVCache(size) for _ in model.blocks]
