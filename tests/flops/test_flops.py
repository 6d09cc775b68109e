"""Parameters and FLOPs against published counts and against a count that multiplies shapes one by one."""

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from golden import PARAMETERS

from gptperf import flops
from gptperf.config import Config, ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.flops import __main__ as flops_command
from gptperf.flops.tables import report_lines

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
    ("gpt2_124m", "description", 1_146_673_152),
    ("gpt2_124m", "12sbh2", 934_281_216),
]
# L, H, D, C, F, T, V, m of an FFN: written down here, not read from a configuration.
BY_HAND = {
    "gpt2_124m": (12, 12, 64, 768, 3072, 1024, 50304, 2),
    "llama_1.36b": (24, 16, 128, 2048, 5632, 2048, 32000, 3),
}


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


@pytest.mark.parametrize("name", BY_HAND)
def test_every_convention_by_hand(name: str) -> None:
    L, H, D, C, F, T, V, m = BY_HAND[name]
    llama = name.startswith("llama")
    block = 3 * C * C + C * C + m * C * F
    causal = L * 4 * C * (T + 1) // 2  # of a forward token; T + 1 times an even number
    everything = (2 if llama else 1) * V * C + (0 if llama else T * C) + (2 * L + 1) * C + L * block
    strict = 3 * (L * 2 * block + causal + 2 * V * C)
    wanted = {
        "strict": strict,
        "palm": 6 * (L * block + V * C) + 12 * L * C * T,
        "nanogpt": 6 * (everything - (0 if llama else T * C)) + 12 * L * H * D * T,
        "6n": 6 * everything,
        "hfu": strict,
        # RoPE 4 S H and RMSNorm 1.5 S H, or LayerNorm 2 S H, of S tokens.
        "description": 3 * L * (6 * C * C + 2 * H * T * C + 2 * m * C * F) + 3 * L * (11 * C // 2 if llama else 2 * C),
        "12sbh2": 3 * L * (12 * C * C + 2 * H * T * C),
    }
    assert everything == PARAMETERS[name]
    assert {n: flops.flops_per_token(MODELS[name], n).training_per_token for n in flops.CONVENTIONS} == wanted
    again = {"none": 0, "selective": 0, "flash": causal // 2, "attention": causal, "full": L * 2 * block + causal}
    for recompute in flops.RECOMPUTE:
        count = flops.flops_per_token(MODELS[name], "hfu", recompute=recompute)
        assert count.training_per_token == strict + again[recompute], recompute


def test_six_n_and_nanogpt_count_all_parameters() -> None:
    """Whatever the components: norms, biases, an untied embedding are in `other`."""
    for bias, tying, qk_norm, position in itertools.product(
        (0, 1), (0, 1), (0, 1), ("learned_absolute", "rope", "none")
    ):
        model = ModelConfig(
            n_layer=3, n_head=3, n_kv_head=1, n_embd=30, d_ff=17, block_size=5, vocab_size=11, bias=bool(bias),
            weight_tying=bool(tying), qk_norm=bool(qk_norm), position_encoding=position, ffn_type="swiglu",
        )  # fmt: skip
        count = flops.parameters(model)
        assert flops.flops_per_token(model, "6n").training_per_token == 6 * count.total
        scores = 12 * 3 * 30 * 5
        assert flops.flops_per_token(model, "nanogpt").training_per_token == 6 * count.non_embedding + scores


def test_half_a_flop_stays_exact() -> None:
    model = build("llama", n_layer=1, n_head=1, n_embd=2, d_ff=3, block_size=3, vocab_size=7, position_encoding="none")
    odd = build("llama", n_layer=1, n_head=1, n_embd=1, d_ff=3, block_size=3, vocab_size=7, position_encoding="none")
    assert flops.flops_per_token(model, "description").other == 9
    assert flops.flops_per_token(odd, "description").other == Fraction(9, 2)


def test_recompute_counts_in_hfu_alone() -> None:
    model = MODELS["gpt2_124m"]
    for convention in set(flops.CONVENTIONS) - {"hfu"}:
        with pytest.raises(ValueError, match=r"found 'full' with the convention .*, wanted 'none', or .* 'hfu'"):
            flops.flops_per_token(model, convention, recompute="full")
    with pytest.raises(ValueError, match="found 'half', wanted one of none, selective"):
        flops.flops_per_token(model, "hfu", recompute="half")


VECTOR = {"normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu", "n_kv_head": 1, "dropout": 0.1}
VECTOR |= {"bias": True, "attention_bias": "qkv", "qk_norm": True, "head_dim": 6}


def test_vector_flops_by_hand() -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "d_ff": 5, "block_size": 3, "vocab_size": 7}
    count = flops.vector_flops(build("gpt2", **sizes | VECTOR))
    T, L, C, F, H, K, pairs = 3, 2, 8, 5, 12, 6, 6  # H and K are the widths of all query and of all key heads
    assert count.parts == {
        "norm": 4 * T * (5 * C + L * (H + K)),
        "residual": T * 2 * L * C,
        "position": 3 * T * L * (H + K),
        "activation": 5 * T * L * F,
        "bias": T * L * (H + 2 * K + 2 * F + C),
        "softmax": 6 * L * 2 * pairs,
        "loss": 4 * T * 7,
        "dropout": 2 * (T * 5 * C + L * 2 * pairs),
    }
    assert count.forward_per_token == Fraction(sum(count.parts.values()), T)
    plain = flops.vector_flops(build("gpt2", **sizes))
    assert plain.parts == {
        "norm": 6 * T * 5 * C,
        "residual": T * 2 * L * C,
        "position": T * C,
        "activation": 5 * T * L * F,
        "bias": 0,
        "softmax": 6 * L * 2 * pairs,
        "loss": 4 * T * 7,
        "dropout": 0,
    }


def test_vector_flops_are_few_and_in_no_convention() -> None:
    gelu = MODELS["gpt2_124m"]
    relu = sized("gpt2", "12/12/768/3072/1024/50304", activation="relu", normalization="layernorm")
    assert flops.vector_flops(relu).activation * 5 == flops.vector_flops(gelu).activation
    assert flops.vector_flops(relu).norm * 6 == flops.vector_flops(gelu).norm * 7
    assert flops.flops_per_token(relu) == flops.flops_per_token(gelu)
    assert flops.vector_flops(gelu).forward < flops.flops_per_token(gelu).forward / 100


def test_bytes_by_hand() -> None:
    """Embedding, loss and dropout; the other parts are compared with the operands of the ops that run."""
    model = MODELS["gpt2_124m"]
    moved = flops.bytes_moved(model)
    assert moved.embedding == (2 * 2 * 768, 2 * 2 * 768)
    assert moved.loss == (2 * 2 * 50304, 2 * 2 * 768)
    assert flops.bytes_moved(model, logits_kept=True).loss == (2 * 50304, 2 * 2 * 50304)
    assert moved.dropout == (0, 0)
    assert moved.total == moved.forward + moved.backward == sum(sum(part) for part in moved.parts.values())
    dropping = flops.bytes_moved(sized("gpt2", "12/12/768/3072/1024/50304", dropout=0.2))
    assert dropping.dropout == (25 * 768 * 5, 25 * 768 * 5)  # an element read, one written, and the mask
    assert flops.bytes_moved(model, element_bytes=4).total == 2 * moved.total


def test_bytes_of_a_wrong_element() -> None:
    with pytest.raises(ValueError, match="element_bytes: found 0, wanted a number >= 1"):
        flops.bytes_moved(MODELS["gpt2_124m"], element_bytes=0)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    flops_command.main(arguments)
    return capsys.readouterr().out


def test_command_prints_every_convention(capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, "configs/gpt2_124m.toml")
    table = text[text.index("CONVENTIONS") : text.index("CONVENTIONS BY PART")]
    rows = {line.split("  ")[1]: line.split() for line in table.splitlines()[2:] if line}
    figures = {name: float(row[len(name.split())]) * 1e9 for name, row in rows.items()}
    for name, figure in figures.items():
        convention, _, recompute = name.partition(" ")
        count = flops.flops_per_token(MODELS["gpt2_124m"], convention, recompute=recompute or "none")
        assert round(figure) == count.training_per_token, name
    assert {name.partition(" ")[0] for name in figures} == set(flops.CONVENTIONS)
    assert "124,373,760" in text


def test_the_page_of_formulas_has_these_figures() -> None:
    page = (Path(__file__).parents[2] / "configs" / "PARAMETER_FORMULAS.md").read_text()
    table = page[page.index("## Conventions") : page.index("## Vector FLOPs")]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    assert {row[0].split("`")[1] for row in rows} == set(flops.CONVENTIONS)
    for what, _, *figures in rows:
        _, convention, rest = what.split("`")
        named = [name for name in flops.RECOMPUTE if name in rest] or ["none"]
        for recompute, (model, at) in itertools.product(named, (("gpt2_124m", 0), ("llama_1.36b", 2))):
            count = flops.flops_per_token(MODELS[model], convention, recompute=recompute).training_per_token
            assert round(float(figures[at]) * 1e9) == count, what
            strict = flops.flops_per_token(MODELS[model]).training_per_token
            assert float(figures[at + 1]) == pytest.approx(float(count / strict), abs=5e-5), what


def test_command_as_json_with_flags(capsys: pytest.CaptureFixture[str]) -> None:
    counts = json.loads(command(capsys, "configs/llama_1.36b.toml", "--json", "--n_kv_head=4", "--dtype=float32"))
    model = sized("llama", "24/16/2048/5632/2048/32000", n_kv_head=4)
    assert counts["parameters"]["total"] == flops.parameters(model).total
    strict = counts["conventions"]["strict"]
    assert (
        strict["training"]
        == flops.flops_per_token(model).training_per_token
        == 3 * sum(strict["forward_parts"].values())
    )
    assert counts["vector_flops"]["forward"] == flops.vector_flops(model).forward_per_token
    assert counts["bytes_moved"]["total"] == flops.bytes_moved(model, element_bytes=4).total


def test_command_reports_a_mistake_in_one_line() -> None:
    line = [sys.executable, "-m", "gptperf.flops", "configs/gpt2_124m.toml", "--n_hed=3"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gptperf: E2: command line: unknown key 'n_hed'; nearest: n_head\n"


def test_command_says_what_a_plugin_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptperf.registry._components", {("activation", "zero"): abs, ("normalization", "one"): object})
    hidden = flops_command.count_all(Config(model=ModelConfig(activation="zero")))
    assert "component activation = 'zero' has no card" in hidden["vector_flops"]["uncountable"]
    assert hidden["conventions"] == flops_command.count_all(Config())["conventions"]
    hidden = flops_command.count_all(Config(model=ModelConfig(normalization="one")))
    text = "\n".join(report_lines(hidden))
    assert hidden["conventions"]["strict"]["training"] == 798_087_168
    for section in ("parameters", "vector_flops", "bytes_moved"):
        assert "component normalization = 'one' has no card" in hidden[section]["uncountable"]
    assert text.count("not counted: component normalization = 'one'") == 6  # those, nanogpt, 6n and description


def parameter_shapes(m: ModelConfig) -> Shapes:
    """Every parameter's shape, written out as a state dict lists them."""
    c, f, v, d = m.n_embd, m.ffn_width, m.padded_vocab_size, m.head_width
    norm: Shapes = [(c,), (c,)] if m.normalization == "layernorm" else [(c,)]
    up = 2 * f if m.ffn_type == "swiglu" else f
    qkv = m.n_head * d + m.kv_heads * d + m.kv_heads * d
    linears = [(qkv, c), (c, m.n_head * d), (up, c), (c, f)]
    layer: Shapes = [*linears, *norm, *norm]
    biased = {None: m.bias * 2, "none": 0, "qkv": 1, "all": 2}[m.attention_bias]
    layer += [(out,) for out, _ in [*linears[:biased], *(linears[2:] if m.bias else [])]]
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
        "head_dim": (None, 6),
        "attention_bias": (None, "none", "qkv", "all"),
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
    head = 2 * 2 * model.head_width
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
    with pytest.raises(ValueError, match="component normalization = 'zero' has no card"):
        flops.parameters(model)
    assert flops.flops_per_token(model) == flops.flops_per_token(ModelConfig())
    assert flops.uncountable_flops(model) is None
    assert flops.uncountable_parameters(ModelConfig()) is None
