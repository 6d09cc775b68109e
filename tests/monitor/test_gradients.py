"""The figures of gradients and updates in the log, against an independent computation."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_helpers import masters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptperf.config import command_line
from gptperf.distributed.buckets import Piece
from gptperf.distributed.process import Process
from gptperf.distributed.replicated import Replicated
from gptperf.kernels import reference
from gptperf.monitor.gradients import COMPONENTS, GradientMonitor, component_of, layer_of
from gptperf.training.engine import Engine, build_engine
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import clip_scale
from gptperf.training.step import train_step

SIZES = ["--n_layer=3", "--n_head=2", "--n_embd=36", "--block_size=16", "--vocab_size=97", "--batch_size=2"]
FLAGS = [*SIZES, "--gradient_accumulation_steps=2", "--device=cpu", "--compile=False", "--max_iters=10"]


def _engine(*flags: str) -> Engine:
    return build_engine(command_line.resolve([*FLAGS, *flags]).config, Process(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_figures_are_those_of_the_gradients(preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(f"--arch_preset={preset}", f"--dtype={dtype}")
    batches = iter(lambda: torch.randint(0, 97, (2, 2, 16)), None)
    train_step(engine, batches, 0, watched=True)  # of which the next step must keep nothing
    before = {name: master.clone() for name, master in masters(engine.weights)}
    gradients: dict[str, torch.Tensor] = {}
    measure = engine.monitor.measure

    def keep(pieces: Iterable[Piece]) -> torch.Tensor:
        pieces = list(pieces)
        gradients.update({name: values.double() for name, _, _, values in pieces})
        return measure(pieces)

    monkeypatch.setattr(engine.monitor, "measure", keep)
    result = train_step(engine, batches, 1, watched=True)
    assert result.gradients is not None
    figures, ratios = result.gradients.tolist(), len(engine.monitor.components)
    found = engine.monitor.record(result.gradient_norm.item(), figures[:-ratios], figures[-ratios:])
    assert gradients.keys() == before.keys()
    every = torch.cat([g.flatten() for g in gradients.values()])
    assert found["global_norm"] == pytest.approx(every.norm().item(), rel=1e-5)
    for key, groups in (("layer_norms", layer_of), ("component_norms", component_of)):
        wanted: dict[str, float] = {}
        for name, gradient in gradients.items():
            wanted[groups(name)] = wanted.get(groups(name), 0.0) + gradient.square().sum().item()
        assert found[key] == pytest.approx({k: math.sqrt(v) for k, v in wanted.items()}, rel=1e-5)
        assert math.hypot(*found[key].values()) == pytest.approx(found["global_norm"], rel=1e-5)
    assert found["grad_mean"] == pytest.approx(every.mean().item(), abs=1e-7 * every.std().item())
    assert found["grad_std"] == pytest.approx(every.std(correction=0).item(), rel=1e-5)
    assert (found["grad_min"], found["grad_max"]) == (every.min().item(), every.max().item())
    assert found["zero_share"] == pytest.approx((every == 0).double().mean().item())
    assert found["non_finite"] == 0
    edges, shares = found["histogram"]["log2_edges"], found["histogram"]["shares"]
    assert len(shares) == len(edges) + 1
    assert sum(shares) + found["zero_share"] == pytest.approx(1)
    magnitudes = every.abs()
    for low, high, share in zip(edges, edges[1:], shares[1:], strict=False):
        assert share == pytest.approx(((magnitudes >= 2.0**low) & (magnitudes < 2.0**high)).double().mean().item())
    changed: dict[str, list[float]] = {}
    for name, master in masters(engine.weights):
        sums = changed.setdefault(component_of(name), [0.0, 0.0])
        sums[0] += (master - before[name]).double().square().sum().item()
        sums[1] += master.double().square().sum().item()
    assert found["update_ratios"] == pytest.approx({k: math.sqrt(a / b) for k, (a, b) in changed.items()}, rel=1e-4)


def test_watching_changes_no_bit() -> None:
    found = []
    for watched in (False, True):
        engine = _engine("--arch_preset=llama")
        generator = torch.Generator().manual_seed(0)
        batches = iter(lambda g=generator: torch.randint(0, 97, (2, 2, 16), generator=g), None)
        found.append([train_step(engine, batches, step, watched=watched).loss.item() for step in range(4)])
    assert found[0] == found[1]


def test_what_is_not_finite_is_counted() -> None:
    gradient = torch.tensor([1.0, math.inf, -2.0, math.nan, 0.0, -math.inf])
    monitor = GradientMonitor(["wte.weight"], 6, torch.device("cpu"))
    found = monitor.record(math.nan, monitor.measure([("wte.weight", torch.Size([6]), 0, gradient)]).tolist(), None)
    assert found["non_finite"] == 3
    assert found["zero_share"] == pytest.approx(1 / 6)
    assert sum(found["histogram"]["shares"]) == pytest.approx(2 / 6)


def test_a_mean_that_is_not_small_is_in_no_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = 2 + torch.randn(5000, generator=generator)
    gradient[::4] = 0
    monitor = GradientMonitor(["wte.weight"], 5000, torch.device("cpu"))
    found = monitor.record(1.0, monitor.measure([("wte.weight", gradient.shape, 0, gradient)]).tolist(), None)
    assert found["grad_mean"] == pytest.approx(gradient.double().mean().item(), rel=1e-6)
    assert found["grad_std"] == pytest.approx(gradient.double().std(correction=0).item(), rel=1e-6)


def test_every_parameter_has_a_component_and_a_layer() -> None:
    for preset in ("llama", "gpt2", "gpt2_openai"):
        for name, _ in _engine(f"--arch_preset={preset}", "--qk_norm=True").model.named_parameters():
            assert component_of(name) in COMPONENTS[:-1], name
            assert layer_of(name) in ("embedding", "head", "0", "1", "2"), name
    assert component_of("blocks.0.adapter.weight") == "other"


def test_an_update_of_known_size() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    weights = Replicated(model, torch.float32)
    config = command_line.resolve(["--weight_decay=0", "--device=cpu"]).config.optimizer
    optimizer = AdamW(weights.buckets, config, reference.adamw)
    monitor = GradientMonitor(weights.places, 64, torch.device("cpu"))

    def observe(bucket: object, before: torch.Tensor) -> None:
        (mine,) = weights.buckets
        monitor.observe(weights.pieces_of(mine, before), weights.pieces_of(mine, mine.master.data))

    optimizer.observe = observe
    weights.start_step()
    weights.start_micro_batch(last=True)
    model(torch.ones(1, 8)).sum().backward()
    weights.finish_gradients()
    optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 0.0)
    optimizer.learning_rate.fill_(0.5)
    optimizer.step()  # Adam's first step is lr in every element
    norm = model.weight.detach().norm().item()
    assert monitor.update().tolist() == pytest.approx([0.5 * 8 / norm], rel=1e-4)


def test_a_large_parameter_is_sampled_for_the_histogram_alone() -> None:
    gradient = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    gradient[5] = math.inf  # not in the sample
    monitor = GradientMonitor(["wte.weight"], gradient.numel(), torch.device("cpu"))
    figures = monitor.measure([("wte.weight", gradient.shape, 0, gradient)])
    found = monitor.record(math.inf, figures.tolist(), None)
    assert found["non_finite"] == 1
    edges, shares = found["histogram"]["log2_edges"], found["histogram"]["shares"]
    assert sum(shares) == pytest.approx(1)
    for low, high, share in zip(edges, edges[1:], shares[1:], strict=False):
        wanted = math.erf(2.0**high / math.sqrt(2)) - math.erf(2.0**low / math.sqrt(2))
        assert share == pytest.approx(wanted, abs=5 * math.sqrt(wanted / (gradient.numel() / 16)) + 1e-9)


class _Widened(TorchDispatchMode):
    """Keeps the sizes of the float32 tensors that ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.sizes += [x.numel() for x in tree_leaves(result) if torch.is_tensor(x) and x.dtype == torch.float32]
        return result


def test_gradients_in_bfloat16_need_no_copy_in_float32() -> None:
    generator, numel = torch.Generator().manual_seed(0), (1 << 21) + 5
    gradients = {
        "wte.weight": torch.randn(numel, generator=generator).bfloat16(),
        "norm.weight": torch.randn(7, generator=generator),
        "lm_head.weight": torch.randn(5000, generator=generator).bfloat16(),
    }
    gradients["wte.weight"][[3, 7]] = torch.tensor([math.inf, 0.0]).bfloat16()
    monitor = GradientMonitor(gradients, numel + 5007, torch.device("cpu"))
    found = []
    for widened in (False, True):
        values = {name: x.float() if widened else x for name, x in gradients.items()}
        with _Widened() as seen:
            figures = monitor.measure([Piece(name, x.shape, 0, x) for name, x in values.items()])
        found.append(figures.tolist())
        assert max(seen.sizes) < numel / 8 or widened
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    record = monitor.record(math.inf, found[0], None)
    assert record["non_finite"] == 1


EDGE_VALUES = [sign * 2.0**edge for edge in range(-40, 9, 2) for sign in (1, -1)]
BESIDE = [float(np.nextafter(np.float32(x), np.float32(y))) for x in EDGE_VALUES for y in (0, 2 * x)]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149), 2.0**-126, 3e38]


@given(st.lists(st.floats(width=32) | st.sampled_from([*EDGE_VALUES, *BESIDE, *SPECIAL]), min_size=1, max_size=60))
@example([*EDGE_VALUES, *BESIDE, *SPECIAL])
@settings(deadline=None)
def test_the_histogram_is_frexps(values: list[float]) -> None:
    gradient = torch.tensor(values, dtype=torch.float32)
    monitor = GradientMonitor(["wte.weight"], len(values), torch.device("cpu"))
    figures = monitor.measure([("wte.weight", gradient.shape, 0, gradient)]).tolist()
    found = monitor.record(1.0, figures, None)
    magnitudes = np.abs(gradient.double().numpy())
    exponents = np.frexp(magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)])[1] - 1  # x = m 2^exponent, 1 <= m < 2
    edges = found["histogram"]["log2_edges"]
    assert edges == list(range(-40, 9, 2))
    counts = np.bincount(np.searchsorted(edges, exponents, side="right"), minlength=len(edges) + 1)
    assert found["histogram"]["shares"] == (counts / len(values)).tolist()
    assert found["zero_share"] == (magnitudes == 0).sum() / len(values)
    assert found["non_finite"] == (~np.isfinite(magnitudes)).sum()


def test_pieces_of_any_size() -> None:
    """Rows of whole and of joined parameters, and what is left of both."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"wte.weight": (1 << 20) + 12345, "blocks.0.ffn.up.weight": 1 << 20, "blocks.1.norm1.weight": 70000}
    sizes |= {"norm.weight": 3, "lm_head.weight": 1}
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(size, generator=generator) for size in sizes.values()]
    for values in whole:
        values[torch.rand(len(values), generator=generator) < 0.25] = 0
    pieces = [(name, values.shape, 0, values) for name, values in zip(sizes, whole, strict=True)]
    every = torch.cat(whole).double()
    monitor = GradientMonitor(sizes, every.numel(), torch.device("cpu"))
    found = monitor.record(1.0, monitor.measure(pieces).tolist(), None)
    assert found["zero_share"] == (every == 0).sum().item() / every.numel()
    assert found["grad_mean"] == pytest.approx(every.mean().item(), abs=1e-7 * every.std().item())
    assert (found["grad_min"], found["grad_max"]) == (every.min().item(), every.max().item())
    whole[0][7], whole[2][69999], whole[4][0] = math.inf, math.nan, -math.inf
    found = monitor.record(math.nan, monitor.measure(pieces).tolist(), None)
    assert found["non_finite"] == 3
    assert [layer for layer, norm in found["layer_norms"].items() if math.isfinite(norm)] == ["0"]
    assert [part for part, norm in found["component_norms"].items() if math.isfinite(norm)] == ["ffn"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_watching_never_waits_for_the_gpu(deterministic: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    sizes = {"wte.weight": (1 << 21) + 5, "blocks.0.ffn.up.weight": 1 << 20, "blocks.0.norm1.weight": 1000}
    gradients, old, new = (
        [(name, torch.Size([size]), 0, torch.randn(size, device=device)) for name, size in sizes.items()]
        for _ in range(3)
    )
    gradients = [(*known, values.to(dtype)) for *known, values in gradients]
    monitor = GradientMonitor(sizes, sum(sizes.values()), device)

    def watch() -> torch.Tensor:
        measured = monitor.measure(gradients)
        monitor.start_update()
        monitor.observe(old, new)
        return torch.cat([measured, monitor.update()])

    watch()  # the first call copies tables to the device
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = watch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    on_cpu = GradientMonitor(sizes, sum(sizes.values()), torch.device("cpu"))
    exact = [(name, shape, start, values.cpu().double()) for name, shape, start, values in gradients]
    wanted = on_cpu.measure(exact)
    assert figures[: len(wanted)].tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-2)
