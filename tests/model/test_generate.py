"""Generation with a cache draws the tokens that whole forward passes draw, for every preset and option."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.model import GPT, KVCache
from gptperf.model.generate import generate

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 60}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 1, "qk_norm": True},
    {"window": "3,full,5", "attention_backend": "manual", "bias": True},
    {"window": "4", "n_kv_head": 2, "position_encoding": "rope", "rope_pairs": "interleaved"},
    {"position_encoding": "none", "norm_position": "post", "ffn_type": "swiglu"},
    {"position_encoding": "learned_absolute", "norm_position": "pre", "qk_norm": True},
]
GREEDY: dict[str, Any] = {"vocab_size": 50, "temperature": 0, "top_k": 0, "generator": None}


def small(preset: str, dtype: torch.dtype, **options: Any) -> GPT:
    torch.manual_seed(0)
    model = (
        GPT(ModelConfig(arch_preset=preset, **(SIZES | PRESETS[preset] | options | {"weight_tying": False})))
        .to(dtype)
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of training, and not tied: every part matters
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if parameter.ndim > 1 else 0.1)
    return model


@torch.no_grad()
def whole_passes(model: GPT, prompt: Tensor, tokens: int, temperature: float) -> list[int]:
    """The tokens, each drawn after a forward pass of its whole context without a cache."""
    block, generator = model.config.block_size, torch.Generator().manual_seed(2)
    ids, context, found = prompt.tolist(), prompt.tolist()[-block:], []
    for _ in range(tokens):
        full = len(context) == block
        logits = model(torch.tensor([context]))[0, -1, :50].float()
        weights = ((logits - logits.max()).double() / (temperature or 1)).softmax(-1)
        drawn = torch.multinomial(weights, 1, generator=generator)
        found.append(int(drawn if temperature else logits.argmax()))
        ids.append(found[-1])
        context = ids[-(block // 2) :] if full else [*context, found[-1]]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("team", "custom")])
def test_a_cache_changes_no_token(preset: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Prompts shorter than, as long as and longer than the context, and past the point where the context moves on."""
    model = small(preset, dtype, **options)
    torch.manual_seed(1)
    for temperature, length, tokens in ((0, 3, 12), (8.0, 1, 12), (8.0, 12, 12), (8.0, 20, 4)):
        prompt = torch.randint(0, 50, (length,))
        keys = {"vocab_size": 50, "temperature": temperature, "top_k": 0}
        found = list(generate(model, prompt, tokens, **keys, generator=torch.Generator().manual_seed(2)))
        assert found == whole_passes(model, prompt, tokens, temperature)
        assert temperature == 0 or len(set(found)) > 2, "the tokens say nothing about the cache"


def test_a_token_comes_before_the_next_one_is_computed() -> None:
    model, passes = small("llama", torch.float32), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for i, _ in enumerate(generate(model, torch.tensor([1, 2, 3]), 5, **GREEDY), 1):
        assert len(passes) == i
        assert torch.is_grad_enabled(), "a generator must leave the caller's mode alone between two tokens"


@pytest.mark.parametrize("temperature", [1e-320, 1e-3, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    model, draws = small("llama", torch.float32), torch.Generator().manual_seed(0)
    keys = GREEDY | {"temperature": temperature, "generator": draws, "top_k": 5}
    found = list(generate(model, torch.tensor([1, 2, 3]), 20, **keys))
    likeliest = list(generate(model, torch.tensor([1, 2, 3]), 20, **GREEDY))
    assert (found == likeliest) == (temperature < 1)


def test_a_cache_takes_no_more_than_its_size() -> None:
    cache, k = KVCache(3), torch.ones(1, 2, 1, 4)
    cache.append(k, k)
    with pytest.raises(AssertionError, match="full"):
        cache.append(k, k)
