"""Text generation with a key-value cache."""

from collections.abc import Callable

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
    before_token: Callable[[], None] = lambda: None,
) -> Tensor:
    """Continues a prompt.

    When the cache holds `block_size` tokens, it is built anew from the last half of them.

    Args:
        model: the model, in evaluation mode.
        prompt: `(P,)` int64, P >= 1, on the model's device.
        tokens: the number of tokens to generate.
        vocab_size: the size of the tokenizer's vocabulary; ids of the model's padding are never drawn.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of the most likely tokens to draw from; 0 draws from all.
        generator: the source of random numbers, on the model's device.
        before_token: called before each token; what it raises ends the generation.

    Returns:
        The generated tokens `(tokens,)` int64, without the prompt.
    """
    block = model.config.block_size
    ids = prompt
    feed, caches = ids[-block:], [KVCache() for _ in model.blocks]
    for _ in range(tokens):
        before_token()
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
