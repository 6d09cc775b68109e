"""Steps of one micro-batch in one process: backward writes gradients to their buckets, with the bits of a copy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptperf.config import ModelConfig, SystemConfig, command_line
from gptperf.distributed.process import Process, start_process
from gptperf.distributed.replicated import Replicated
from gptperf.kernels.accumulate import accumulate
from gptperf.model import GPT
from gptperf.model.linear import Linear
from gptperf.plan.memory import direct_gradients, strategy_of
from gptperf.training import engine as engine_module
from gptperf.training.engine import make_weights
from gptperf.training.float8 import Float8Layers
from gptperf.training.step import train_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"normalization": "rmsnorm", "ffn_type": "swiglu", "position_encoding": "rope", "weight_tying": False},
    "gpt2": {"normalization": "layernorm", "bias": True, "activation": "gelu"},
}


def _gradients(model: nn.Module, weights: Replicated, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    for _ in range(2):  # the second step overwrites the first one's
        weights.start_step()
        weights.start_micro_batch(last=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(x, x) if isinstance(model, GPT) else model(x).float().square().sum()
        loss.backward()
        weights.finish_gradients()
    return {name: weights.gradient(name) for name in weights.places}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_bits_of_a_copy(
    name: str, recompute: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype of the compute copy, and matrices of linear layers without a copy unless blocks are recomputed."""
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    found, copied = [], []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: (copied.append(list(to)), copy(to, source)))
    for single in (True, False):
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50}
        model = GPT(ModelConfig(**(sizes | MODELS[name])))
        model.recompute = recompute
        weights = Replicated(model, dtype, single=single)
        copied.clear()
        found.append(_gradients(model, weights, tokens, dtype))
        if single and dtype != torch.float16:
            pointers = {to.data_ptr() for call in copied for to in call}
            linear = {f"{key}.weight" for key, layer in model.named_modules() if type(layer) is Linear} & set(found[0])
            direct = {key for key, x in found[0].items() if x.data_ptr() not in pointers}
            assert direct <= linear
            if recompute == "none":
                assert {key for key in linear if key.startswith("blocks.") and "qkv" in key} <= direct
    for key, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        matrix = gradient.ndim >= 2 and dtype != torch.float16
        assert found[0][key].dtype == (dtype if matrix else torch.float32), key
        assert torch.equal(found[0][key].float(), gradient), key
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("level", ["forward", "forward+dgrad", "full"])
@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"])
def test_gradients_of_fp8_have_the_bits_of_a_copy(preset: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the layers in 8 bits are written to their buckets too."""
    sizes = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=16", "--vocab_size=50"]
    system = ["--dtype=bfloat16", "--matmul_dtype=fp8", f"--fp8_level={level}"]
    config = command_line.resolve([*sizes, *system, f"--arch_preset={preset}"]).config
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    found, copied = [], []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: (copied.append(list(to)), copy(to, source)))
    for single in (True, False):
        torch.manual_seed(0)
        model = GPT(config.model)
        weights = Replicated(model, torch.bfloat16, single=single)
        Float8Layers(model, config, triton=False)
        copied.clear()
        found.append(_gradients(model, weights, tokens, torch.bfloat16))
        if single:
            pointers = {to.data_ptr() for call in copied for to in call}
            direct = {key for key, x in found[0].items() if x.data_ptr() not in pointers}
            blocks = {key for key, x in found[0].items() if key.startswith("blocks.") and x.ndim == 2}
            assert blocks <= direct <= blocks | {"lm_head.weight"}
    for key, gradient in found[1].items():
        assert torch.equal(found[0][key].float(), gradient), key
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "flags",
    [[], ["--recompute=full"], ["--optimizer_state_dtype=bfloat16"], ["--optimizer=muon", "--normuon=True"]],
    ids=" ".join,
)
def test_steps_have_the_bits_of_steps_with_a_copy(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped, watched and skipped ones, of a tied model, with an evaluation between them."""
    sizes = ["--arch_preset=gpt2", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=50"]
    system = ["--device=cpu", "--dtype=bfloat16", "--kernels=eager"]
    train = ["--batch_size=2", "--gradient_accumulation_steps=1", "--grad_clip=0.1", "--warmup_iters=0"]
    config = command_line.resolve([*sizes, *system, *train, *flags]).config
    found = []
    for direct in (True, False):
        monkeypatch.setattr(engine_module, "make_weights", partial(_make_weights, direct))
        engine = engine_module.build_engine(config, start_process("cpu"))
        assert engine.weights.direct is direct
        generator, tensors = torch.Generator().manual_seed(0), list[Tensor]()
        for step in range(4):
            batch = torch.randint(0, 50, (2, 2, 16), generator=generator)
            monkeypatch.setattr(engine.scaler, "scale", partial(torch.mul, torch.inf if step == 1 else 1.0))
            result = train_step(engine, iter([batch]), step, watched=step == 2)
            with torch.no_grad(), engine.autocast():
                tensors += [result.gradient_norm, result.loss, engine.model(*batch)]
            tensors += [] if result.gradients is None else [result.gradients]
        for bucket in engine.weights.buckets:
            tensors += [bucket.master.data, bucket.compute, *engine.optimizer.states(bucket).values()]
        assert engine.skipped == 1
        found.append(tensors)
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


def _make_weights(direct: bool, model: GPT, system: SystemConfig, process: Process, single: bool, *packed: Any) -> Any:
    return make_weights(model, system, process, single and direct, *packed)


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_layer_with_several_uses_has_the_sum(uses: int) -> None:
    """Only the first gradient of a weight may be written to its place."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = Linear(8, 8, bias=True), Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(uses):
                x = self.layer(x).tanh()
            return self.other(x)

    found = []
    for single in (True, False):
        torch.manual_seed(0)
        model = Shared()
        weights = Replicated(model, torch.float32, single=single)
        found.append(_gradients(model, weights, torch.randn(5, 8), torch.float32))
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_an_autocast_of_its_own_has_the_bits_of_a_copy(dtype: torch.dtype) -> None:
    """A plugin may compute a layer in another dtype than that of the weight."""
    found = []
    for single in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Linear(8, 8, bias=True), Linear(8, 8, bias=False))
        weights, x = Replicated(model, dtype, single=single), torch.randn(5, 8)
        found.append(_gradients(model, weights, x, torch.float16))
    for key, gradient in found[1].items():
        assert torch.equal(found[0][key].float(), gradient), key


def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize(
    "loss",
    [
        _penalty,
        lambda model, x: model(x).sum() + _penalty(model, x),
        lambda model, x: torch.func.vmap(model)(x).square().sum(),
        lambda model, x: torch.func.jvp(model, (x,), (x,))[1].square().sum(),
        lambda model, x: torch.func.grad(lambda y: model(y).square().sum())(x).square().sum(),
    ],
    ids=["penalty", "loss and penalty", "vmap", "jvp", "grad"],
)
def test_a_plugin_may_differentiate_its_layers_as_with_several_micro_batches(
    loss: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    found = []
    for single in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Linear(8, 8, bias=True), nn.Tanh(), Linear(8, 8, bias=False))
        weights, x = Replicated(model, torch.float32, single=single), torch.randn(5, 8).requires_grad_()
        weights.start_step()
        weights.start_micro_batch(last=True)
        loss(model, x).backward()
        weights.finish_gradients()
        found.append({name: weights.gradient(name) for name in weights.places})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-6, atol=1e-6)
        assert gradient.abs().max() > 0 or name.endswith("bias")


@pytest.mark.parametrize("single", [True, False])
def test_a_step_after_an_error_in_backward_has_its_own_gradients(single: bool) -> None:
    """Gradients that had arrived before the error do not count."""
    model = nn.Sequential(Linear(4, 4, bias=False), Linear(4, 4, bias=False))
    weights, x = Replicated(model, torch.bfloat16, single=single), torch.ones(2, 4, dtype=torch.bfloat16)
    wanted = []
    for error in (None, KeyboardInterrupt, None):
        weights.start_step()
        weights.start_micro_batch(last=True)
        y = model[0](x)
        if error is not None:
            y.register_hook(lambda _: _raise(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                model[1](y).sum().backward()
            assert any(bucket.arrived for bucket in weights.buckets)
            continue
        model[1](y).sum().backward()
        weights.finish_gradients()
        wanted.append({name: weights.gradient(name).clone() for name in weights.places})
    for name, gradient in wanted[0].items():
        assert torch.equal(wanted[1][name], gradient), name


def _raise(error: BaseException) -> None:
    raise error


def test_a_weight_that_is_not_used_has_no_old_gradient() -> None:
    model = nn.ModuleDict({"a": Linear(4, 4, bias=False), "b": Linear(4, 4, bias=False)})
    weights = Replicated(model, torch.float32, single=True)
    for used, unused in (("a", "b"), ("b", "a")):
        weights.start_step()
        weights.start_micro_batch(last=True)
        model[used](torch.ones(1, 4)).sum().backward()
        weights.finish_gradients()
        assert (weights.gradient(f"{used}.weight") == 1).all()
        assert (weights.gradient(f"{unused}.weight") == 0).all()


@pytest.mark.parametrize("flags", [[], ["--use_zero1=True"], ["--use_fsdp=True"]])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plan_knows_in_which_dtype_gradients_are(dtype: str, micro_batches: int, flags: list[str]) -> None:
    given = ["configs/tiny.toml", f"--dtype={dtype}", f"--gradient_accumulation_steps={micro_batches}", *flags]
    config = command_line.resolve(given).config
    weights = make_weights(GPT(config.model), config.system, start_process("cpu"), micro_batches == 1)
    assert weights.direct is direct_gradients(config, 1, strategy_of(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accumulation_by_the_op_has_the_bits_of_pytorchs(dtype: torch.dtype) -> None:
    """Three micro-batches; the vectors, whose gradients are float32, are added by PyTorch."""
    found = []
    for op in (None, accumulate):
        torch.manual_seed(0)
        config, calls = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50), []
        model = GPT(config).to(DEVICE)
        weights = Replicated(model, dtype)
        if op is not None:
            weights.accumulate = lambda *given, calls=calls: (calls.append(given[0]), accumulate(*given))[1]  # type: ignore[misc]
        weights.share()
        weights.start_step()
        for step in range(3):
            weights.start_micro_batch(step == 2)
            tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(step))
            tokens = tokens.to(DEVICE)
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss = model(tokens, tokens.roll(1))
            loss.backward()
        weights.finish_gradients()
        found.append({name: weights.gradient(name).clone() for name in weights.places})
        matrices = [name for name, p in model.named_parameters() if p.ndim >= 2]
        assert len(calls) == (0 if op is None or dtype == torch.float32 else 2 * len(matrices))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
        assert gradient.abs().max() > 0
