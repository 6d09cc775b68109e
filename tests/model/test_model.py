"""The model: its modules, its parameters, and the same numbers however it computes them."""

import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import PARAMETERS
from torch import nn

from gptperf import flops, registry
from gptperf.config import ModelConfig, command_line
from gptperf.config.presets import PRESETS
from gptperf.model import GPT, KVCache

ROOT = Path(__file__).parents[2]
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50}


def _small(**keys: object) -> ModelConfig:
    preset = PRESETS[str(keys.get("arch_preset", "gpt2"))]
    return ModelConfig(**(SMALL | preset | keys))  # type: ignore[arg-type]


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_golden_covers_every_file() -> None:
    assert set(PARAMETERS) == {p.stem for p in (ROOT / "configs").glob("*.toml")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_golden_parameter_counts(name: str) -> None:
    base = ["gpt2_124m"] if name in ("gpt2_owt", "quick_test") else []
    config = command_line.resolve([str(ROOT / "configs" / f"{n}.toml") for n in [*base, name]]).config
    with torch.device("meta"):
        assert _count(GPT(config.model)) == PARAMETERS[name]


def test_registry_names_are_the_models() -> None:
    built = {kind: {name for k, name in registry._components if k == kind} for kind in registry.KINDS}
    assert built == {kind: set(names) for kind, names in registry.KINDS.items()}


CHOICES = [(kind, name) for kind, names in registry.KINDS.items() for name in names if name != "flash_attn"]
CHOICES += [
    ("bias", True),
    ("bias", False),
    ("weight_tying", True),
    ("weight_tying", False),
    ("qk_norm", True),
    ("attention_bias", "none"),
    ("attention_bias", "qkv"),
    ("attention_bias", "all"),
    ("head_dim", 4),
    ("head_dim", 12),
]
CHOICES += [
    ("n_kv_head", 1),
    ("n_kv_head", 2),
    ("d_ff", 24),
    ("rope_pairs", "interleaved"),
    ("vocab_multiple", 32),
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("key", "value"), CHOICES)
def test_override_on_any_preset_builds_and_learns(preset: str, key: str, value: object) -> None:
    config = _small(**{"arch_preset": preset, key: value})
    torch.manual_seed(0)
    model = GPT(config)
    classes = {kind: registry.component(kind, getattr(config, kind)) for kind in registry.KINDS}
    assert type(model.blocks[0]) is classes["norm_position"]
    assert type(model.norm) is type(model.blocks[0].norm1) is classes["normalization"]
    assert type(model.position) is classes["position_encoding"]
    assert type(model.blocks[0].attention.backend) is classes["attention_backend"]
    assert type(model.blocks[0].ffn) is classes["ffn_type"]
    if config.ffn_type == "standard":
        assert model.blocks[0].ffn.activation is classes["activation"]
    assert (model.lm_head.weight is model.wte.weight) is config.weight_tying
    attention = model.blocks[0].attention
    biased = {"none": (False, False), "qkv": (True, False), "all": (True, True)}[config.attention_biases]
    assert (attention.qkv.bias is not None, attention.out.bias is not None) == biased
    assert (model.blocks[0].ffn.out.bias is not None) is config.bias
    assert flops.parameters(config).total == _count(model)
    tokens = torch.randint(0, 50, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - math.log(config.padded_vocab_size)) < 0.3
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_every_override_changes_what_is_computed() -> None:
    tokens = torch.arange(16)[None] % 50
    base = {"arch_preset": "hybrid", "normalization": "rmsnorm"}
    outputs = {}
    for key, value in [("n_layer", 2), *CHOICES]:
        config = _small(**(base | {key: value}))
        if (key, value) != ("n_layer", 2) and config == _small(**base):
            continue
        torch.manual_seed(0)
        model = GPT(config)
        with torch.no_grad():  # spread the weights, so that biases and norms are seen
            for i, p in enumerate(model.parameters()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
            outputs[key, value] = model(tokens)[..., :50]
    same = {("attention_backend", "manual"), ("bias", False), ("attention_bias", "none"), ("weight_tying", True)}
    for key, value in outputs.keys() - same - {("n_layer", 2)}:
        assert (outputs[key, value] - outputs["n_layer", 2]).abs().max() > 1e-4, (key, value)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_backends_agree(n_kv_head: int) -> None:
    models = []
    for backend in ("sdpa", "manual"):
        torch.manual_seed(0)
        models.append(GPT(_small(arch_preset="llama", n_kv_head=n_kv_head, attention_backend=backend)).double())
    tokens = torch.randint(0, 50, (3, 16))
    torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=1e-10, atol=1e-12)


def test_flash_attn_is_called_with_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's interface, played by PyTorch: q (B, T, H, D), k and v (B, S, K, D), causal from the last row."""

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, causal: bool
    ) -> torch.Tensor:
        assert causal
        assert dropout_p == 0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    models = []
    for backend in ("sdpa", "flash_attn"):
        torch.manual_seed(0)
        models.append(GPT(_small(arch_preset="llama", n_kv_head=2, attention_backend=backend)))
    tokens = torch.randint(0, 50, (3, 16))
    assert torch.equal(models[0](tokens), models[1](tokens))


@pytest.mark.parametrize("preset", ["gpt2", "llama", "gpt2_openai"])
def test_causal(preset: str) -> None:
    model = GPT(_small(arch_preset=preset)).double()
    tokens = torch.randint(0, 50, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


@pytest.mark.parametrize(
    ("preset", "keys"),
    list(itertools.product(["gpt2", "llama", "hybrid"], [{}, {"qk_norm": True, "n_kv_head": 2}])),
)
def test_cache_gives_the_logits_of_the_whole_sequence(preset: str, keys: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = GPT(_small(arch_preset=preset, **keys)).double().eval()
    tokens = torch.randint(0, 50, (2, 16))
    caches = [KVCache(16) for _ in model.blocks]
    pieces = [tokens[:, :5], *tokens[:, 5:10].split(1, dim=1), tokens[:, 10:]]
    cached = torch.cat([model(piece, caches=caches) for piece in pieces], dim=1)
    torch.testing.assert_close(cached, model(tokens), rtol=1e-10, atol=1e-12)


def test_initialisation() -> None:
    torch.manual_seed(0)
    for ffn_type in ("standard", "swiglu"):
        model = GPT(
            ModelConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000, block_size=64, ffn_type=ffn_type, bias=True)
        )
        for name, p in model.named_parameters():
            if p.ndim < 2:
                assert (p == (0 if name.endswith("bias") else 1)).all()
                continue
            into_residual = name.split(".")[-2] == "out"
            std = 0.02 / math.sqrt(2 * 8) if into_residual else 0.02
            assert abs(p.std().item() / std - 1) < 6 / math.sqrt(2 * p.numel())  # 6 sigma of a sample's std
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel())


def test_padded_vocabulary_and_ignored_targets() -> None:
    model = GPT(_small(vocab_multiple=32))
    tokens = torch.randint(0, 50, (2, 16))
    assert model(tokens).shape == (2, 16, 64)
    targets = tokens.clone()
    targets[:, 4:] = -100
    torch.testing.assert_close(
        model(tokens, targets),
        nn.functional.cross_entropy(model(tokens)[:, :4].flatten(0, 1), tokens[:, :4].flatten()),
    )
    none = model(tokens, torch.full_like(tokens, -100))
    none.backward()
    assert none == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_one_graph(preset: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(_small(arch_preset=preset))
    tokens = torch.randint(0, 50, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens, tokens), model(tokens, tokens))


def test_plugin_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_norms.py").write_text(
        "from gptperf.model import RMSNorm\nfrom gptperf.registry import register\n"
        "class Doubled(RMSNorm):\n"
        "    def forward(self, x, residual=None):\n"
        "        y, residual = super().forward(x, residual)\n"
        "        return 2 * y, residual\n"
        "register('normalization', 'doubled', Doubled)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_components", dict(registry._components))
    config = command_line.resolve(["--plugins=my_norms", "--normalization=doubled", "--n_layer=1"]).config
    with torch.device("meta"):
        assert type(GPT(config.model).norm).__name__ == "Doubled"
