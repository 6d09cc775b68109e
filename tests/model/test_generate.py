"""Generation with a cache draws the tokens that whole forward passes draw, for every preset and option."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.kernels import decode_linear as linear_kernel
from gptperf.kernels import draw as draw_module
from gptperf.kernels import reference
from gptperf.kernels.checks import DECODE_ROWS, DECODE_WIDTH
from gptperf.kernels.decode_attention import decode_attention
from gptperf.kernels.decode_linear import decode_linear
from gptperf.kernels.draw import draw
from gptperf.model import GPT, SDPA, KVCache
from gptperf.model import generate as generation
from gptperf.model import linear as linear_module
from gptperf.model.generate import Sampling, generate
from gptperf.ops import resolve_ops

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 60}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 1, "qk_norm": True},
    {"window": "3,full,5", "attention_backend": "manual", "bias": True},
    {"window": "4", "n_kv_head": 2, "position_encoding": "rope", "rope_pairs": "interleaved"},
    {"position_encoding": "none", "norm_position": "post", "ffn_type": "swiglu"},
    {"position_encoding": "learned_absolute", "norm_position": "pre", "qk_norm": True},
]
GREEDY = Sampling(50, temperature=0, top_k=0)


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


def drawn(model: GPT, prompt: Tensor, tokens: int, sampling: Sampling = GREEDY, seed: int = 2) -> list[int]:
    """The tokens that continue one prompt."""
    steps = generate(model, [prompt.tolist()], tokens, sampling, [torch.Generator().manual_seed(seed)])
    return [token for (token,) in steps]


@torch.no_grad()
def whole_passes(model: GPT, prompt: Tensor, tokens: int, temperature: float) -> list[int]:
    """The tokens, each drawn after a forward pass of its whole context without a cache."""
    block, uniforms = model.config.block_size, torch.rand(tokens, generator=torch.Generator().manual_seed(2))
    ids, context, found = prompt.tolist(), prompt.tolist()[-block:], []
    for uniform in uniforms.double():
        full = len(context) == block
        logits = model(torch.tensor([context]))[0, -1, :50].float()
        weights = ((logits - logits.max()).double() / (temperature or 1)).softmax(-1)
        chosen = (weights.cumsum(0) <= uniform * weights.sum()).sum()
        found.append(int(chosen if temperature else logits.argmax()))
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
        found = drawn(model, prompt, tokens, Sampling(50, temperature, 0))
        assert found == whole_passes(model, prompt, tokens, temperature)
        assert temperature == 0 or len(set(found)) > 1, "the tokens say nothing about the cache"


def test_a_token_comes_before_the_next_one_is_computed() -> None:
    model, passes = small("llama", torch.float32), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for i, _ in enumerate(generate(model, [[1, 2, 3]], 5, GREEDY, [torch.Generator()]), 1):
        assert len(passes) == i
        assert torch.is_grad_enabled(), "a generator must leave the caller's mode alone between two tokens"


@pytest.mark.parametrize("temperature", [1e-320, 1e-3, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    model = small("llama", torch.float32)
    found = drawn(model, torch.tensor([1, 2, 3]), 20, Sampling(50, temperature, 5))
    likeliest = drawn(model, torch.tensor([1, 2, 3]), 20)
    assert (found == likeliest) == (temperature < 1)


class _OfPlugin(SDPA):
    """A backend that generation does not know, so that it cannot replace it."""


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3], OPTIONS[5]], ids=str)
def test_a_sequence_gets_its_tokens_in_any_batch(options: dict[str, Any], plugin: bool) -> None:
    """Prompts of different lengths: their contexts move on at different steps."""
    model = small("llama", torch.float64, **options)
    if plugin:
        for block in model.blocks:
            block.attention.backend = _OfPlugin(model.config)
    torch.manual_seed(1)
    prompts = [torch.randint(0, 50, (length,)) for length in (1, 5, 12, 20, 5)]
    sources = [torch.Generator().manual_seed(seed) for seed in range(5)]
    sampling = Sampling(50, 8.0, 20, 0.9)
    steps = list(generate(model, [prompt.tolist() for prompt in prompts], 15, sampling, sources))
    for row, prompt in enumerate(prompts):
        assert [step[row] for step in steps] == drawn(model, prompt, 15, sampling, seed=row)
    assert len({tuple(row) for row in zip(*steps, strict=True)}) == 5


def test_more_tokens_begin_with_the_same_ones() -> None:
    model, prompt = small("llama", torch.float64), torch.tensor([1, 2, 3])
    long = drawn(model, prompt, 300, Sampling(50, 8.0, 0))
    assert drawn(model, prompt, 7, Sampling(50, 8.0, 0)) == long[:7]
    assert len(set(long[256:])) > 10  # the numbers of the second portion


def test_autocast_is_that_of_the_argument_or_of_the_caller() -> None:
    """Matrices are in bfloat16 and vectors in float32, as in a loaded model."""
    model, on = small("gpt2", torch.float32), list[bool]()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if parameter.ndim > 1 else torch.float32)
    model.wte.register_forward_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    arguments = model, [[1, 2, 3], [4]], 2, GREEDY, [torch.Generator()] * 2
    found = list(generate(*arguments, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert list(generate(*arguments)) == found
        list(generate(*arguments, dtype=torch.float32))
    assert on == [True] * 6 + [False] * 3  # a prefill and two steps for each call


def counted(model: GPT, rows: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers of a decode step the op decode_linear computes."""
    calls: list[Tensor] = []

    def counting(x: Tensor, *others: Any) -> Tensor:
        calls.append(x)
        return reference.decode_linear(x, *others)

    for module in (model, *model.blocks):
        monkeypatch.setattr(module, "decode_linear", counting)
    list(generate(model, [[1]] * rows, 1, GREEDY, [torch.Generator()] * rows))
    return len(calls)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2_openai", "llama"])
def test_few_sequences_take_few_kernels(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of each block and the head; not with more sequences, nor where a plugin's component is in the way."""
    model = small(preset, torch.float32)
    assert counted(model, DECODE_ROWS, monkeypatch) == 4 * len(model.blocks) + 1
    assert counted(model, DECODE_ROWS + 1, monkeypatch) == 0

    class Own(type(model.blocks[0].norm2)):  # type: ignore[misc]
        """A plugin's norm, which may compute anything."""

    model.blocks[0].norm2.__class__ = Own
    model.blocks[1].attention.out.float8 = object()
    monkeypatch.setattr(
        linear_module, "float8_linear", lambda x, weight, bias, _: linear_module.linear(x, weight, bias)
    )
    assert counted(model, 1, monkeypatch) == 4 * (len(model.blocks) - 2) + 1
    monkeypatch.setattr(model.lm_head, "in_features", DECODE_WIDTH + 1)
    assert counted(model, 1, monkeypatch) == 4 * (len(model.blocks) - 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_triton_draws_what_eager_draws(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "CHUNK", 32)  # sorting takes the interpreter seconds, and so do many programs
    monkeypatch.setattr(linear_kernel, "PROGRAMS", 4)
    model = small(preset, torch.float32, n_layer=2)
    prompts = [[1, 2, 3], [4]]
    found = []
    for linear, attention, drawing in (
        (reference.decode_linear, reference.decode_attention, reference.draw),
        (decode_linear, decode_attention, draw),
    ):
        model.draw, model.position.decode_attention = drawing, attention
        for module in (model, *model.blocks):
            module.decode_linear = linear
        found.append(list(generate(model, prompts, 3, Sampling(50, 1.0, 5), [torch.Generator()] * 2)))
    assert found[0] == found[1]
    assert len({tuple(step) for step in found[0]}) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_a_graph_draws_what_the_step_draws(preset: str) -> None:
    """Also in the next call, which finds the graph of the first one, with other prompts and other numbers."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 40, "vocab_size": 60}
    config = ModelConfig(arch_preset=preset, **(sizes | PRESETS[preset] | {"weight_tying": False}))
    torch.manual_seed(0)
    model = GPT(config, resolve_ops("auto", "cuda")).cuda().eval()
    sampling = Sampling(50, 2.0, 20, 0.95)
    for seed in range(3):
        prompts = [torch.randint(0, 50, (length,)).tolist() for length in (3, 30)]
        found = []
        for capture in (False, True):
            sources = [torch.Generator().manual_seed(seed + row) for row in range(2)]
            found.append(list(generate(model, prompts, 60, sampling, sources, capture=capture)))
        assert found[0] == found[1]
    assert model in generation._kept


def on_another_gpu(capture: bool) -> list[list[int]]:
    torch.manual_seed(0)
    config = ModelConfig(arch_preset="llama", **(SIZES | PRESETS["llama"] | {"n_embd": 64, "weight_tying": False}))
    model = GPT(config, resolve_ops("auto", "cuda")).to("cuda:1").eval()
    sources = [torch.Generator().manual_seed(row) for row in range(2)]
    found = list(generate(model, [[1, 2, 3], [4]], 30, Sampling(50, 2.0, 20), sources, capture=capture))
    assert (model in generation._kept) == capture
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_gpu_than_the_current_one() -> None:
    assert on_another_gpu(capture=True) == on_another_gpu(capture=False)
    assert torch.cuda.current_device() == 0


def test_tokens_are_awaited_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event without a stream is one of the current device, which may have nothing to do."""
    model, events = small("llama", torch.float32), list[Any]()
    decoder = generation._Decoder(model, 2, 12, GREEDY, False, None)
    event = SimpleNamespace(record=lambda *stream: events.append(stream), synchronize=lambda: events.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: ("stream of", *device))
    decoder.device, decoder.read, decoder.events = torch.device("cuda", 1), [torch.empty(2).long()], [event]
    decoder.last[:, 0] = torch.tensor([7, 9])
    arrived = decoder.fetch()
    assert events == [(("stream of", torch.device("cuda", 1)),)]
    assert arrived() == [7, 9]
    assert events[1:] == ["waited"]


def test_a_call_outside_of_inference_mode_after_one_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder with a graph is kept for the next call, here without a graph; its memory is that of the first call."""

    def step(self: Any, model: GPT) -> None:
        self._step(model)
        self.graph = "a graph"

    monkeypatch.setattr(generation._Decoder, "step", step)
    model, prompt = small("llama", torch.float32), torch.tensor([1, 2, 3])
    with torch.inference_mode():
        found = drawn(model, prompt, 5)
    kept = generation._kept[model][1]
    assert drawn(model, prompt, 5) == drawn(model, prompt, 5) == found
    assert generation._kept[model][1] is not kept


def test_a_cache_takes_no_more_than_its_size() -> None:
    cache, k = KVCache(3), torch.ones(1, 2, 1, 4)
    cache.append(k, k)
    with pytest.raises(AssertionError, match="full"):
        cache.append(k, k)
