"""What a run says of its gradients, its update and its losses, against figures computed in another way."""

import math
from collections.abc import Iterable

import pytest
import torch

from gptperf import cli
from gptperf.kernels import reference
from gptperf.monitor.gradients import COMPONENTS, GradientMonitor, component_of, layer_of
from gptperf.monitor.stability import LossWindow
from gptperf.optim import AdamW, clip_scale
from gptperf.parallel import Process
from gptperf.step import Engine, build_engine, train_step
from gptperf.weights import Piece, Replicated

SIZES = ["--n_layer=3", "--n_head=2", "--n_embd=36", "--block_size=16", "--vocab_size=97", "--batch_size=2"]
FLAGS = [*SIZES, "--gradient_accumulation_steps=2", "--device=cpu", "--compile=False", "--max_iters=10"]


def _engine(*flags: str) -> Engine:
    return build_engine(cli.resolve([*FLAGS, *flags]).config, Process(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_figures_are_those_of_the_gradients(preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(f"--arch_preset={preset}", f"--dtype={dtype}")
    batches = iter(lambda: torch.randint(0, 97, (2, 2, 16)), None)
    train_step(engine, batches, 0)
    before = {name: master.clone() for name, master in engine.weights.masters()}
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
    for name, master in engine.weights.masters():
        sums = changed.setdefault(component_of(name), [0.0, 0.0])
        sums[0] += (master - before[name]).double().square().sum().item()
        sums[1] += master.double().square().sum().item()
    assert found["update_ratios"] == pytest.approx({k: math.sqrt(a / b) for k, (a, b) in changed.items()}, rel=1e-4)


def test_watching_changes_no_bit() -> None:
    losses = []
    for watched in (False, True):
        engine = _engine("--arch_preset=llama")
        generator = torch.Generator().manual_seed(0)
        batches = iter(lambda g=generator: torch.randint(0, 97, (2, 2, 16), generator=g), None)
        losses.append([train_step(engine, batches, step, watched=watched).loss.item() for step in range(4)])
    assert losses[0] == losses[1]


def test_what_is_not_finite_is_counted() -> None:
    gradient = torch.tensor([1.0, math.inf, -2.0, math.nan, 0.0, -math.inf])
    monitor = GradientMonitor(["wte.weight"], 6, torch.device("cpu"))
    found = monitor.record(math.nan, monitor.measure([("wte.weight", torch.Size([6]), 0, gradient)]).tolist(), None)
    assert found["non_finite"] == 3
    assert found["zero_share"] == pytest.approx(1 / 6)
    assert sum(found["histogram"]["shares"]) == pytest.approx(2 / 6)


def test_every_parameter_has_a_component_and_a_layer() -> None:
    for preset in ("llama", "gpt2", "gpt2_openai"):
        for name, _ in _engine(f"--arch_preset={preset}", "--qk_norm=True").model.named_parameters():
            assert component_of(name) in COMPONENTS[:-1], name
            assert layer_of(name) in ("embedding", "head", "0", "1", "2"), name
    assert component_of("blocks.0.adapter.weight") == "other"


def test_an_update_of_known_size() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    weights = Replicated(model, torch.float32)
    config = cli.resolve(["--weight_decay=0", "--device=cpu"]).config.optimizer
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
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()  # Adam's first step is lr in every element
    norm = model.weight.detach().norm().item()
    assert monitor.update().tolist() == pytest.approx([0.5 * 8 / norm], rel=1e-4)


def test_spikes_and_plateaus() -> None:
    window = LossWindow(20)
    falling = [window.add(4 - 0.05 * i + 0.01 * (-1) ** i) for i in range(30)]
    assert not any(found["spike"] or found["plateau"] for found in falling)
    assert falling[-1]["window"] == 20
    last = [4 - 0.05 * i + 0.01 * (-1) ** i for i in range(10, 30)]
    assert falling[-1]["loss_mean"] == pytest.approx(sum(last) / 20)
    assert falling[-1]["loss_variance"] == pytest.approx(torch.tensor(last).double().var(correction=0).item())
    assert window.add(6.0)["spike"]
    assert window.add(math.nan)["spike"]
    assert math.isfinite(window.add(2.4)["loss_mean"])
    flat = LossWindow(20)
    found = [flat.add(2.5 + 0.01 * (-1) ** i, skipped=i) for i in range(20)]
    assert [f["plateau"] for f in found] == [False] * 19 + [True]
    assert not any(f["spike"] for f in found)
    assert found[7]["non_finite"] == 7
