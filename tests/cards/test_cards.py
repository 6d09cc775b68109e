"""Every built-in component and optimizer has a card, and the cards agree with the modules that are built."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gptperf import cards, registry
from gptperf.config import ModelConfig, OptimizerConfig
from gptperf.distributed.replicated import Replicated
from gptperf.flops.model_cards import ffn_of, optimizer_of
from gptperf.model import GPT
from gptperf.model.attention import Attention
from gptperf.ops import OPS, resolve_ops
from gptperf.registry import KINDS
from gptperf.training.optimizers.adamw import AdamW

CARD_CLASSES = {
    "normalization": cards.Norm,
    "activation": cards.Activation,
    "position_encoding": cards.PositionEncoding,
    "attention_backend": cards.AttentionBackend,
    "norm_position": cards.Block,
    "ffn_type": cards.FFN,
}
SIZES = {"n_layer": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 24, "d_ff": 17, "block_size": 5, "vocab_size": 11}
EAGER = resolve_ops("eager", "cpu")


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Returns the shapes of all weights, then of all biases."""
    parameters = list(module.parameters())
    return [tuple(p.shape) for p in parameters if p.dim() == 2] + [tuple(p.shape) for p in parameters if p.dim() == 1]


def matmul_shapes(matmuls: tuple[cards.Matmul, ...], bias: bool) -> list[tuple[int, ...]]:
    return [(m.out, m.into) for m in matmuls] + ([(m.out,) for m in matmuls] if bias else [])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_every_component_has_a_card_and_a_class(kind: str, name: str) -> None:
    assert isinstance(registry.card(kind, name), CARD_CLASSES[kind])
    assert callable(registry.component(kind, name))
    assert registry.no_card(**{kind: name}) is None
    op = getattr(registry.card(kind, name), "op", None)
    assert op is None or op in OPS


def test_cards_take_numbers_alone() -> None:
    """No configuration, no tensor, no name of a component."""
    plain = {"int", "float", "bool", "Implementation", int, float, bool, cards.Implementation}
    for card in (*CARD_CLASSES.values(), cards.Optimizer):
        for name, method in inspect.getmembers(card, inspect.isfunction):
            if not name.startswith("_"):
                arguments = list(inspect.signature(method).parameters.values())[1:]
                assert {argument.annotation for argument in arguments} <= plain, f"{card.__name__}.{name}"


@pytest.mark.parametrize("name", KINDS["normalization"])
def test_parameters_of_a_norm(name: str) -> None:
    config = ModelConfig(**SIZES, normalization=name)
    card: cards.Norm = registry.card("normalization", name)
    norm = registry.component("normalization", name)(config, EAGER)
    assert numel(norm) == card.parameters(config.n_embd)
    assert (getattr(norm, "bias", None) is not None) is card.bias


@pytest.mark.parametrize("name", KINDS["position_encoding"])
def test_parameters_of_a_position_encoding(name: str) -> None:
    config = ModelConfig(**SIZES, position_encoding=name)
    card: cards.PositionEncoding = registry.card("position_encoding", name)
    position = registry.component("position_encoding", name)(config, EAGER)
    assert numel(position) == card.parameters(config.block_size, config.n_embd)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", KINDS["ffn_type"])
def test_matmuls_of_an_ffn(name: str, bias: bool) -> None:
    config = ModelConfig(**SIZES, ffn_type=name, bias=bias)
    card: cards.FFN = registry.card("ffn_type", name)
    ffn = registry.component("ffn_type", name)(config, EAGER)
    assert linear_shapes(ffn) == matmul_shapes(card.matmuls(24, 17), bias)
    assert numel(ffn) == card.parameters(24, 17, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_matmuls_of_attention(bias: bool) -> None:
    config = ModelConfig(**SIZES, bias=bias, attention_backend="manual")
    attention = Attention(config)
    assert linear_shapes(attention) == matmul_shapes(cards.projections(24, 4 * 6, 2 * 6), bias)


@pytest.mark.parametrize("name", KINDS["norm_position"])
def test_norms_of_a_block(name: str) -> None:
    config = ModelConfig(**SIZES, norm_position=name)
    card: cards.Block = registry.card("norm_position", name)
    block = registry.component("norm_position", name)(config, EAGER)
    norm = registry.component("normalization", config.normalization)
    assert sum(isinstance(module, norm) for module in block.modules()) == card.norms
    x = torch.randn(1, 5, 24)
    outputs = block(x, None, registry.component("position_encoding", "none")(config, EAGER))
    assert (outputs[1] is not None) is card.passes_residual
    assert card.inputs == sum(output is not None for output in outputs)


def kept_by(module: Any, *arguments: torch.Tensor) -> int:
    """Returns the number of elements that autograd keeps, without parameters."""
    own = {x.untyped_storage().data_ptr() for x in module.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(*arguments)
    return sum(elements for pointer, elements in kept.items() if pointer not in own)


def test_the_standard_ffn_keeps_what_its_card_says() -> None:
    card: cards.FFN = registry.card("ffn_type", "standard")
    ffn = registry.component("ffn_type", "standard")(ModelConfig(**SIZES), EAGER)
    x = torch.randn(2, 5, 24, requires_grad=True)
    assert kept_by(ffn, x) == 10 * (24 + card.kept(17, "eager"))


@pytest.mark.parametrize("name", KINDS["activation"])
def test_an_op_runs_every_activation(name: str) -> None:
    card: cards.Activation = registry.card("activation", name)
    standard: cards.FFN = registry.card("ffn_type", "standard")
    assert card.op == standard.op == "activation"
    called = []

    def op(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        called.append(arguments)
        return x

    ffn = registry.component("ffn_type", "standard")(
        ModelConfig(**SIZES, activation=name), replace(EAGER, activation=op)
    )
    ffn(torch.randn(2, 5, 24))
    assert called == [(name, ffn.out.weight, ffn.out.bias)]


def test_pytorch_runs_the_activation_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card or without one, and a model with the Triton ops keeps and moves what the standard FFN's card says."""
    for table in ("_components", "_cards"):
        monkeypatch.setattr(registry, table, getattr(registry, table).copy())
    registry.register("activation", "cube", lambda x: x**3)
    registry.register("activation", "square", torch.square, cards.Activation(cards.Cost(1, "square")))
    x = torch.randn(2, 5, 24)
    for name, power in (("cube", 3), ("square", 2)):
        model = ModelConfig(**SIZES, activation=name)
        ffn = registry.component("ffn_type", "standard")(model, replace(EAGER, activation=None))
        assert torch.equal(ffn(x), ffn.out(ffn.up(x) ** power))
        card = ffn_of(model)
        assert card.op is None
        assert (card.kept(17, "triton"), card.moved(17), card.backward_peak(17)) == (34, (34, 51), 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_adamw(dtype: str) -> None:
    weights = Replicated(GPT(ModelConfig(**SIZES)), torch.bfloat16)
    config = OptimizerConfig(optimizer_state_dtype=dtype)
    optimizer = AdamW(weights.buckets, config, lambda *_: None, weights.pieces_of)
    held = sum(x.nbytes for bucket in weights.buckets for x in optimizer.states(bucket).values())
    masters = sum(bucket.master.numel() for bucket in weights.buckets)
    assert optimizer_of(config).state_bytes(masters) == held
    # Gradient, weight and both moments are read, the last three and a copy in 2 bytes written.
    assert optimizer_of(config).update_bytes(1, 0, 2) == {"float32": 30, "bfloat16": 22}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_element_bytes_are_pytorchs(dtype: str) -> None:
    assert cards.element_bytes(dtype) == getattr(torch, dtype).itemsize
