"""The model against its formula, one position and one head at a time in float64; its dropout; its draws."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.model import GPT
from gptperf.model.generate import generate

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24, "d_ff": 20, "block_size": 6}
SIZES |= {"vocab_size": 11, "norm_eps": 0.1, "rope_theta": 50.0}  # far from the defaults, so that both are seen
ACTIVATIONS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0 * x),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "relu_squared": lambda x: torch.where(x > 0, x, 0 * x) ** 2,
}
LLAMA3 = {
    "rope_factor": 4.0,
    "rope_low_freq_factor": 0.16,
    "rope_high_freq_factor": 2.0,
    "rope_original_block_size": 16,
}
CASES: list[dict[str, Any]] = [
    *({"activation": name, "ffn_type": "standard"} for name in ACTIVATIONS),
    *(
        {"norm_position": where, "normalization": norm}
        for where in ("pre", "post")
        for norm in ("rmsnorm", "layernorm")
    ),
    *({"position_encoding": name, "qk_norm": True} for name in ("none", "learned_absolute", "rope")),
    {"position_encoding": "rope", "rope_pairs": "interleaved"},
    {"position_encoding": "rope", "attention_backend": "manual"},
    {"ffn_type": "swiglu", "bias": True, "weight_tying": False},
    {"head_dim": 8, "qk_norm": True, "position_encoding": "rope"},
    *({"attention_bias": kind, "bias": kind != "all"} for kind in ("none", "qkv", "all")),
    {"position_encoding": "rope", "rope_scaling": "linear", "rope_factor": 3.0},
    # Heads of four wavelengths: one kept, two mixed, one multiplied.
    {"position_encoding": "rope", "rope_scaling": "llama3", "head_dim": 8, **LLAMA3},
]


class Formula:
    """The forward pass of one sequence, written out."""

    def __init__(self, model: GPT) -> None:
        self.config, self.weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", torch.zeros(()))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias", torch.zeros(()))
        centred = x if self.config.normalization == "rmsnorm" else x - x.mean()
        return centred / ((centred**2).mean() + self.config.norm_eps).sqrt() * weight + bias

    def wavelength(self, plain: float) -> float:
        c = self.config
        if c.rope_scaling == "none":
            return plain
        longest, shortest = (
            c.rope_original_block_size / factor for factor in (c.rope_low_freq_factor, c.rope_high_freq_factor)
        )
        if c.rope_scaling == "linear" or plain > longest:
            return plain * c.rope_factor
        if plain < shortest:
            return plain
        share = (c.rope_original_block_size / plain - c.rope_low_freq_factor) / (
            c.rope_high_freq_factor - c.rope_low_freq_factor
        )
        return 1 / ((1 - share) / (c.rope_factor * plain) + share / plain)

    def rotated(self, x: Tensor, at: int) -> Tensor:
        y, D = x.clone(), len(x)
        for i in range(D // 2):
            a, b = (2 * i, 2 * i + 1) if self.config.rope_pairs == "interleaved" else (i, i + D // 2)
            angle = at / self.wavelength(2 * math.pi * self.config.rope_theta ** (2 * i / D)) * 2 * math.pi
            y[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            y[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
        return y

    def head(self, name: str, x: Tensor, at: int) -> Tensor:
        """Returns a query or key of one head, normalised and rotated."""
        if f"{name}_norm" in self.weights:
            x = x / ((x**2).mean() + self.config.norm_eps).sqrt() * self.weights[f"{name}_norm"]
        return self.rotated(x, at) if self.config.position_encoding == "rope" else x

    def attention(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        H, K, D = self.config.n_head, self.config.kv_heads, self.config.head_width
        packed = [self.linear(f"{name}.qkv", x).view(H + 2 * K, D) for x in xs]
        found = []
        for t, _ in enumerate(xs):
            heads = []
            for h in range(H):
                k = H + h * K // H
                q = self.head(f"{name}.q", packed[t][h], t)
                scores = [q @ self.head(f"{name}.k", packed[s][k], s) / math.sqrt(D) for s in range(t + 1)]
                shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
                heads.append(shares @ torch.stack([packed[s][k + K] for s in range(t + 1)]))
            found.append(self.linear(f"{name}.out", torch.cat(heads)))
        return found

    def ffn(self, name: str, x: Tensor) -> Tensor:
        if self.config.ffn_type == "standard":
            return self.linear(f"{name}.out", ACTIVATIONS[self.config.activation](self.linear(f"{name}.up", x)))
        gate, up = self.linear(f"{name}.gate_up", x).chunk(2)
        return self.linear(f"{name}.out", ACTIVATIONS["silu"](gate) * up)

    def logits(self, tokens: list[int]) -> Tensor:
        xs = [self.weights["wte.weight"][token] for token in tokens]
        if self.config.position_encoding == "learned_absolute":
            xs = [x + self.weights["position.wpe.weight"][t] for t, x in enumerate(xs)]
        pre = self.config.norm_position == "pre"
        for i in range(self.config.n_layer):
            one, two = f"blocks.{i}.norm1", f"blocks.{i}.norm2"
            added = self.attention(f"blocks.{i}.attention", [self.norm(one, x) if pre else x for x in xs])
            xs = [x + y if pre else self.norm(one, x + y) for x, y in zip(xs, added, strict=True)]
            added = [self.ffn(f"blocks.{i}.ffn", self.norm(two, x) if pre else x) for x in xs]
            xs = [x + y if pre else self.norm(two, x + y) for x, y in zip(xs, added, strict=True)]
        head = self.weights.get("lm_head.weight", self.weights["wte.weight"])
        return torch.stack([head @ self.norm("norm", x) for x in xs])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_logits_are_those_of_the_formula(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES | case)).double()
    with torch.no_grad():
        for parameter in model.parameters():  # other values in every norm weight and bias, and no small activations
            parameter.add_(0.4 * torch.randn_like(parameter))
    tokens = [3, 1, 4, 1, 5, 9]
    logits = model(torch.tensor([tokens]))[0]
    wanted = Formula(model).logits(tokens)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)  # the tables of RoPE are float32
    loss = -sum(wanted[t].log_softmax(0)[token] for t, token in enumerate(tokens)) / len(tokens)
    assert model(torch.tensor([tokens]), torch.tensor([tokens])).item() == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_dropout_is_where_the_flops_count_it(where: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the embedding, on the weights of every attention, and on the output of every attention and FFN."""
    places: Counter[tuple[float, tuple[int, ...]]] = Counter()
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def dropped(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        places[p if training else 0.0, tuple(x.shape)] += 1
        return drop(x, p, training, inplace)

    def attended(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, *rest: Any, **keys: Any) -> Tensor:
        places[p, (*q.shape[:3], k.shape[2])] += 1
        return attend(q, k, v, mask, p, *rest, **keys)

    monkeypatch.setattr(F, "dropout", dropped)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    model = GPT(ModelConfig(**SIZES, dropout=0.3, norm_position=where, attention_backend=backend))
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    for training, p in ((True, 0.3), (False, 0.0)):
        places.clear()
        model.train(training)(tokens)
        assert places == {(p, (1, 6, 24)): 2 * 2 + 1, (p, (1, 4, 6, 6)): 2}


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 0), (2.0, 0), (2.0, 3), (0.5, 50), (2.0, 1)])
def test_tokens_are_drawn_from_the_stated_distribution(temperature: float, top_k: int) -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, 9.0])  # the last one is padding of the vocabulary

    class Fixed:
        config, blocks = SimpleNamespace(block_size=8), (None,)

        def __call__(self, tokens: Tensor, caches: Any, last_only: bool) -> Tensor:
            return logits.expand(1, 1, -1).clone()

    count, model, start = 1000, Fixed(), torch.zeros(1, dtype=torch.int64)
    keys = {"vocab_size": 5, "temperature": temperature, "top_k": top_k}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([*generate(model, start, count, **keys, generator=generator)])  # type: ignore[arg-type]
    kept = sorted(range(5), key=lambda i: -logits[i])[: top_k or 5]
    weights = {i: math.exp(logits[i] / temperature) for i in kept}
    for token in range(6):
        share = weights.get(token, 0.0) / sum(weights.values())
        assert (drawn == token).double().mean().item() == pytest.approx(
            share, abs=5 * math.sqrt(share * (1 - share) / count)
        )


def test_generation_goes_on_from_half_of_a_full_context() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES, weight_tying=False)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0 * torch.randn_like(parameter))
    ids = context = [3, 1, 4, 1, 5, 9, 2, 6][-6:]
    for _ in range(20):
        chosen = [int(model(torch.tensor([context]))[0, -1].argmax())]
        ids, full = ids + chosen, len(context) == 6
        context = ids[-3:] if full else context + chosen
    prompt, generator = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), torch.Generator()
    with torch.no_grad():
        found = list(generate(model, prompt, 20, vocab_size=11, temperature=0, top_k=0, generator=generator))
    assert found == ids[6:]
    assert len(set(found)) > 3
