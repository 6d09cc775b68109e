"""Parameters and FLOPs against published counts and against a count that multiplies shapes one by one."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from golden import PARAMETERS

from gptperf import flops
from gptperf.config import ModelConfig
from gptperf.presets import PRESETS

Shapes = list[tuple[int, ...]]


def build(preset: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(**{"arch_preset": preset} | PRESETS[preset] | sizes)


def sized(preset: str, numbers: str, **more: Any) -> ModelConfig:
    names = ("n_layer", "n_head", "n_embd", "d_ff", "block_size", "vocab_size")
    return build(preset, **dict(zip(names, map(int, numbers.split("/")), strict=True)), **more)


EXPERIMENT_1 = {"normalization": "rmsnorm", "position_encoding": "rope", "norm_position": "pre"}
MODELS = {
    "gpt2_124m": sized("gpt2", "12/12/768/3072/1024/50304"),
    "llama_124m": sized("llama", "12/12/768/2048/1024/50304"),
    "team_124m": sized("team", "12/12/768/2048/1024/50304"),
    "hybrid_124m": sized("hybrid", "12/12/768/3072/1024/50304"),
    "custom": sized("custom", "12/12/768/3072/1024/50304", **EXPERIMENT_1),
    "gpt2_openai_124m": sized("gpt2_openai", "12/12/768/3072/1024/50257"),
    "quick_test": sized("gpt2", "6/6/384/1536/256/50304"),
    "llama_1.36b": sized("llama", "24/16/2048/5632/2048/32000"),
    "gpt2_1.36b": sized("gpt2", "25/16/2048/8192/2048/50304"),
}
GOLDEN_FLOPS = [
    ("gpt2_124m", "strict", 798_087_168),
    ("gpt2_124m", "palm", 854_654_976),
    ("llama_124m", "strict", 798_087_168),
    ("llama_124m", "palm", 854_654_976),
    ("llama_1.36b", "strict", 8_396_242_944),
    ("llama_1.36b", "palm", 8_999_927_808),
]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_golden(name: str) -> None:
    assert flops.parameters(MODELS[name]).total == PARAMETERS[name]


def test_non_embedding_is_nanogpts() -> None:
    assert flops.parameters(MODELS["gpt2_124m"]).non_embedding == 123_587_328
    llama = flops.parameters(MODELS["llama_124m"])
    assert llama.non_embedding == llama.total


@pytest.mark.parametrize(("name", "convention", "golden"), GOLDEN_FLOPS)
def test_training_flops_golden(name: str, convention: str, golden: int) -> None:
    per_token = flops.flops_per_token(MODELS[name], convention).training_per_token
    assert isinstance(per_token, int)
    assert per_token == golden


def parameter_shapes(m: ModelConfig) -> Shapes:
    """Every parameter's shape, written out as a state dict lists them."""
    c, f, v, d = m.n_embd, m.ffn_width, m.padded_vocab_size, m.head_dim
    norm: Shapes = [(c,), (c,)] if m.normalization == "layernorm" else [(c,)]
    up = 2 * f if m.ffn_type == "swiglu" else f
    qkv = m.n_head * d + m.kv_heads * d + m.kv_heads * d
    linears = [(qkv, c), (c, m.n_head * d), (up, c), (c, f)]
    layer: Shapes = [*linears, *norm, *norm]
    layer += [(out,) for out, _ in linears] if m.bias else []
    layer += [(d,), (d,)] if m.qk_norm else []
    shapes: Shapes = [(v, c), *norm, *layer * m.n_layer]
    shapes += [(m.block_size, c)] if m.position_encoding == "learned_absolute" else []
    return shapes + ([] if m.weight_tying else [(v, c)])


def test_parameters_of_every_combination() -> None:
    axes: dict[str, tuple[Any, ...]] = {
        "normalization": ("layernorm", "layernorm_nobias", "rmsnorm"),
        "position_encoding": ("learned_absolute", "rope", "none"),
        "norm_position": ("pre", "post"),
        "ffn_type": ("standard", "swiglu"),
        "bias": (True, False),
        "weight_tying": (True, False),
        "qk_norm": (True, False),
        "n_kv_head": (None, 2),
        "vocab_multiple": (1, 64),
    }
    seen = set()
    for values in itertools.product(*axes.values()):
        model = ModelConfig(
            n_layer=3,
            n_head=4,
            n_embd=32,
            block_size=16,
            vocab_size=100,
            **dict(zip(axes, values, strict=True)),
        )
        expected = sum(math.prod(shape) for shape in parameter_shapes(model))
        assert flops.parameters(model).total == expected, values
        seen.add(expected)
    assert len(seen) > 100  # the axes do change the count


def test_flops_are_the_sum_over_queries() -> None:
    model = build("llama", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=7, vocab_size=90, vocab_multiple=16)
    count = flops.flops_per_token(model)
    head = 2 * 2 * model.head_dim
    assert count.scores == model.n_layer * model.n_head * sum(head * (t + 1) for t in range(model.block_size))
    assert count.qkv == 2 * 2 * 7 * 32 * (32 + 16 + 16)
    assert count.output == 2 * 2 * 7 * 32 * 32
    assert count.ffn == 2 * 3 * 2 * 7 * 32 * 256
    assert count.lm_head == 2 * 7 * 32 * 96
    assert count.training == 3 * count.forward
    assert count.forward == count.qkv + count.scores + count.output + count.ffn + count.lm_head
    palm = flops.flops_per_token(model, "palm")
    assert palm.scores * (model.block_size + 1) == count.scores * 2 * model.block_size


def test_grouped_heads_do_not_change_the_scores() -> None:
    model = MODELS["llama_124m"]
    grouped = sized("llama", "12/12/768/2048/1024/50304", n_kv_head=3)
    assert flops.flops_per_token(grouped).scores == flops.flops_per_token(model).scores
    assert flops.flops_per_token(grouped).qkv * 2 == flops.flops_per_token(model).qkv


def test_per_token_is_exact_when_it_does_not_divide() -> None:
    count = flops.FlopCount("strict", tokens=3, qkv=1, scores=0, output=0, ffn=0, lm_head=0)
    assert count.forward_per_token == Fraction(1, 3)
    assert count.training_per_token == 1


def test_attention_ffn_ratio() -> None:
    assert flops.attention_ffn_ratio(MODELS["gpt2_124m"]) == pytest.approx(0.667, abs=5e-4)


def test_unknown_convention_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"found 'chinchilla', wanted one of strict, palm"):
        flops.flops_per_token(MODELS["gpt2_124m"], "chinchilla")


def test_a_plugins_component_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptperf.registry._components", {("normalization", "zero"): object})
    model = ModelConfig(normalization="zero")
    with pytest.raises(ValueError, match="normalization = 'zero' is a plugin's"):
        flops.parameters(model)
    assert flops.flops_per_token(model) == flops.flops_per_token(ModelConfig())
    assert flops.uncountable_flops(model) is None
    assert flops.uncountable_parameters(ModelConfig()) is None
