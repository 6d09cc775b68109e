"""Exports for transformers: equal logits and tokens of every architecture, weights bit for bit, and what is refused."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import SIZES, greedy, loaded, saved
from torch import Tensor

from gptperf.config import Config, ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.errors import GptperfError
from gptperf.hugging_face import export, read_model
from gptperf.hugging_face.exported_config import export_class
from gptperf.registry import KINDS

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

VALUES: dict[str, tuple[Any, ...]] = {
    **{kind: names for kind, names in KINDS.items() if kind != "attention_backend"},
    "bias": (False, True),
    "attention_bias": (None, "none", "qkv", "all"),
    "weight_tying": (False, True),
    "qk_norm": (False, True),
    "window": ("full", "8", "8,full", "full,8,8", "4,8"),
    "n_kv_head": (None, 2),
    "head_dim": (None, 12),
    "rope_pairs": ("half", "interleaved"),
    "rope_scaling": ("none", "linear", "llama3"),
}
SCALED = {"rope_theta": 100.0, "rope_factor": 4.0, "rope_original_block_size": 16}
LLAMA, GPT2 = PRESETS["llama"], PRESETS["gpt2_openai"]


def architectures(count: int) -> Iterator[dict[str, Any]]:
    """Yields random architectures: any, and in turn those with the parts of LLaMA, Qwen3 or GPT-2."""
    draw = random.Random(0)
    llama = {key: LLAMA[key] for key in ("normalization", "position_encoding", "norm_position", "ffn_type")}
    gpt2 = {key: GPT2[key] for key in llama if key != "normalization"} | {"window": "full", "head_dim": None}
    fixed: list[dict[str, Any]] = [{}, llama | {"qk_norm": False}, llama | {"qk_norm": True}, gpt2 | {"qk_norm": False}]
    for i in range(count):
        keys = {key: draw.choice(values) for key, values in VALUES.items()} | fixed[i % len(fixed)]
        try:
            Config(model=ModelConfig(**SIZES | SCALED | keys))
        except GptperfError:  # such as the scaling of RoPE without RoPE
            continue
        yield keys


def covering(count: int) -> Iterator[dict[str, Any]]:
    """Yields, for each class, architectures that have together every value of every key that the class reads."""
    pools: dict[str, list[dict[str, Any]]] = {}
    for keys in architectures(count):
        pools.setdefault(export_class(ModelConfig(**SIZES | SCALED | keys)).name, []).append(keys)
    assert len(pools) == 6
    for pool in pools.values():
        left = {item for keys in pool for item in keys.items()}
        while left:
            best = max(pool, key=lambda keys: len(left & set(keys.items())))
            left -= set(best.items())
            yield best


def interleaved(name: str, rows: Tensor, model: ModelConfig) -> Tensor:
    """The rows of queries and keys in the order of a model that rotates the elements 2i and 2i + 1."""
    D = model.head_width
    rotated = (model.n_head + model.kv_heads) * D if "qkv" in name else D if name.endswith(("q_norm", "k_norm")) else 0
    order = [i - i % D + (i % D) // 2 + (i % 2) * D // 2 for i in range(rotated)]
    return rows[[*order, *range(rotated, len(rows))]]


@pytest.mark.parametrize("keys", list(covering(1000)), ids=lambda keys: "-".join(map(str, keys.values())))
def test_any_architecture_is_the_same_model_in_transformers(keys: dict[str, Any], tmp_path: Path) -> None:
    """The logits, the likeliest tokens with transformers' own cache, and the weights after an import."""
    model = ModelConfig(**SIZES | SCALED | keys)
    ours, path = saved(model, tmp_path)
    done = export(path, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf")
    assert type(theirs).__name__ == done.kind.name
    tokens = torch.randint(0, 257, (2, model.block_size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = ours(tokens), theirs(tokens).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        prompt = tokens[:1, :5]
        options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
        new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert new[0, 5:].tolist() == greedy(ours, prompt[0], 14)

    again, weights = read_model(tmp_path / "hf")
    assert (export_class(again).name, again.padded_vocab_size) == (done.kind.name, model.padded_vocab_size)
    if again.position_encoding == "rope" and again.rope_pairs != model.rope_pairs:
        weights = {name: interleaved(name, tensor, model) for name, tensor in weights.items()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(weights.pop(name), parameter), name
    # GPT-2 has biases everywhere.
    assert all(done.kind.model_type == "gpt2" and "bias" in name and not weights[name].any() for name in weights)
