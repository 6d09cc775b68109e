"""AdamW over flat buckets equals PyTorch's; schedules; gradients are float32 sums in every layout."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import masters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptperf.config import ModelConfig, OptimizerConfig
from gptperf.distributed.bucket_sizes import ALIGN
from gptperf.distributed.buckets import gradient_of
from gptperf.distributed.replicated import Replicated
from gptperf.kernels import reference
from gptperf.model import GPT
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import clip_scale
from gptperf.training.optimizers.schedule import learning_rate

ROOT = Path(__file__).parents[2]
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50}


def _model(**keys: object) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**(SMALL | keys)))  # type: ignore[arg-type]


def _backward(model: nn.Module, weights: Replicated, batches: list[torch.Tensor]) -> None:
    weights.start_step()
    for i, tokens in enumerate(batches):
        weights.start_micro_batch(last=i == len(batches) - 1)
        (model(tokens, tokens) / len(batches)).backward()
    weights.finish_gradients()


def _formula(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    compute: torch.Tensor | None,
    scalars: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The update written out with every scalar that the op is given, as the Triton kernel uses them."""
    lr, _, bias1, bias2, divisor, skip = scalars.tolist()
    assert compute is None
    assert skip == 0
    grad = grad / divisor
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    master.mul_(1 - lr * weight_decay)
    master.addcdiv_(exp_avg / bias1, (exp_avg_sq / bias2).sqrt() + eps, value=-lr)


@pytest.mark.parametrize("op", [reference.adamw, _formula])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bucket_numel", [1, 3000, 1 << 20])
def test_steps_are_pytorchs(tied: bool, bucket_numel: int, op: Callable[..., None]) -> None:
    model = _model(weight_tying=tied, bias=True)
    theirs = copy.deepcopy(model)
    # Steps of this size show a wrong moment, bias correction or decay; after a long warm-up they would not.
    config = OptimizerConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, weight_decay=0.3, grad_clip=0.7)
    weights = Replicated(model, torch.float32, bucket_numel=bucket_numel)
    ours = AdamW(weights.buckets, config, op)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference_optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    for step in range(6):
        batches = [
            torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(3 * step + i)) for i in range(3)
        ]
        rate = learning_rate(step, config, 100)
        _backward(model, weights, batches)
        norm = weights.gradient_norm()
        ours.grad_scale, ours.found_inf = clip_scale(norm, config.grad_clip)
        for tokens in batches:
            (theirs(tokens, tokens) / 3).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), config.grad_clip)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        ours.learning_rate.fill_(rate)
        ours.step()
        for group in reference_optimizer.param_groups:
            group["lr"] = rate
        reference_optimizer.step()
        reference_optimizer.zero_grad()
    expected_weights = dict(theirs.named_parameters())
    assert {name for name, _ in masters(weights)} == expected_weights.keys()
    for name, master in masters(weights):
        torch.testing.assert_close(master, expected_weights[name].data, rtol=1e-4, atol=2e-6, msg=name)
        assert dict(model.named_parameters())[name].data_ptr() == master.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
def test_update_against_fp64(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(4))
    v = v.square()
    lr, beta1, beta2, eps, decay, t, divisor = 1e-2, 0.9, 0.95, 1e-8, 0.1, 7, 2.0
    scalars = torch.tensor([lr, t, 1 - beta1**t, 1 - beta2**t, divisor, 0])
    ours = [x.float() for x in (w, m, v)]
    copy_ = torch.empty(64, dtype=torch.bfloat16)
    update = torch.compile(reference.adamw, backend="aot_eager", fullgraph=True) if compiled else reference.adamw
    update(ours[0], g.float(), ours[1], ours[2], copy_, scalars, beta1, beta2, eps, decay)
    kept = [x.clone() for x in ours]
    scalars[4:] = torch.tensor([float("nan"), 1.0])
    update(ours[0], g.float(), ours[1], ours[2], copy_, scalars, beta1, beta2, eps, decay)
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
    g = g / divisor
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    w = w - lr * decay * w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    for got, wanted in zip(ours, (w, m, v), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(copy_, ours[0].bfloat16())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_bad_gradients_changes_nothing(bad: float) -> None:
    model = _model()
    weights = Replicated(model, torch.bfloat16)
    optimizer = AdamW(weights.buckets, OptimizerConfig(), reference.adamw)
    _backward(model, weights, [torch.randint(0, 50, (2, 16))])
    optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 1.0)
    optimizer.step()
    before = {name: master.clone() for name, master in masters(weights)}
    moments = {key: [optimizer.states(b)[key] for b in weights.buckets] for key in ("exp_avg", "exp_avg_sq")}
    saved = copy.deepcopy(moments)
    weights.gradient("wte.weight")[3, 5] = bad
    optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 1.0)
    assert optimizer.found_inf == 1
    optimizer.step()
    assert all(torch.equal(master, before[name]) for name, master in masters(weights))
    for key, views in moments.items():
        assert all(torch.equal(view, before) for view, before in zip(views, saved[key], strict=True))
    assert optimizer.steps == 1


class Recorded(TorchDispatchMode):
    """Records every op with what the host passes to it: all arguments that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = pytree.tree_map_only(torch.Tensor, lambda x: (tuple(x.shape), x.dtype), (args, kwargs or {}))
        self.found.append(f"{func.name()}{shown}")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_what_varies_from_the_device() -> None:
    """The host does the same in every step, whatever learning rate, clipping, overflow and number of updates are."""
    model = _model()
    weights = Replicated(model, torch.bfloat16)
    optimizer = AdamW(weights.buckets, OptimizerConfig(), reference.adamw)
    static = [optimizer.learning_rate, optimizer.grad_scale, optimizer.found_inf, optimizer.steps]
    memory = [x.data_ptr() for x in static]
    recorded = []
    for rate, grad_clip, loss_scale in ((1e-3, 1e-3, 1.0), (1e-2, 0.0, 1.0), (0.0, 1.0, math.inf), (5.0, 1e9, 2.0)):
        weights.start_step()
        weights.start_micro_batch(last=True)
        tokens = torch.randint(0, 50, (2, 16))
        (loss_scale * model(tokens, tokens)).backward()
        weights.finish_gradients()
        optimizer.learning_rate.fill_(rate)
        optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), grad_clip)
        with Recorded() as record:
            optimizer.step()
        recorded.append(record.found)
        assert not [op for op in record.found if "_local_scalar_dense" in op]  # what `item` is
    assert optimizer.steps == 3
    assert all(found == recorded[0] for found in recorded)
    assert sum("stack" in op for op in recorded[0]) == 1
    now = [optimizer.learning_rate, optimizer.grad_scale, optimizer.found_inf, optimizer.steps]
    assert [x.data_ptr() for x in now] == memory


def test_a_grad_scaler_sets_the_static_scalars() -> None:
    """What `torch.amp.GradScaler` assigns and deletes are values: an overflow leaves the step out, once."""
    model = _model()
    weights = Replicated(model, torch.bfloat16)
    optimizer = AdamW(weights.buckets, OptimizerConfig(), reference.adamw)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    memory = optimizer.grad_scale.data_ptr(), optimizer.found_inf.data_ptr()
    moments, gradients = [], []
    for bad in (1.0, math.inf, 1.0):
        weights.start_step()
        weights.start_micro_batch(last=True)
        tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
        scaler.scale(bad * model(tokens, tokens)).backward()
        weights.finish_gradients()
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
        gradients.append(gradient_of(weights.buckets[0]).clone())
        optimizer.grad_scale = torch.tensor(2.0)
        scaler.step(optimizer)  # type: ignore[arg-type]
        scaler.update()
        moments.append(optimizer.states(weights.buckets[0])["exp_avg"].clone())
    assert (optimizer.steps, scaler.get_scale()) == (2, 4)
    assert torch.equal(moments[0], moments[1])
    assert not torch.equal(moments[1], moments[2])
    torch.testing.assert_close(moments[0], (1 - 0.9) * gradients[0] / 2)  # unscaled, then clipped
    assert (optimizer.grad_scale.data_ptr(), optimizer.found_inf.data_ptr()) == memory


def test_matrices_are_copied_and_vectors_are_not() -> None:
    model = _model(bias=True, normalization="layernorm", qk_norm=True)
    weights = Replicated(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim >= 2 else torch.float32), name
    assert model.lm_head.weight is model.wte.weight
    assert all(master.dtype == torch.float32 for _, master in masters(weights))
    assert all(b.master.numel() % ALIGN == 0 for b in weights.buckets)
    assert {name for b in weights.buckets if b.group.has_weight_decay for name in b.names} == {
        name for name, p in model.named_parameters() if p.ndim >= 2
    }


def test_micro_batch_gradients_add_up_in_float32() -> None:
    """bfloat16 gradients of many micro-batches: the sum is that of their float32 values, bit for bit."""
    model = _model()
    weights = Replicated(model, torch.bfloat16)
    seen: list[torch.Tensor] = []
    handle = model.blocks[0].ffn.up.weight.register_hook(lambda g: seen.append(g.clone()))
    batches = [torch.randint(0, 50, (2, 16)) for _ in range(8)]
    with torch.autocast("cpu", torch.bfloat16):
        _backward(model, weights, batches)
    handle.remove()
    total = torch.zeros_like(seen[0], dtype=torch.float32)
    for g in seen:
        assert g.dtype == torch.bfloat16
        total += g.float()
    assert torch.equal(weights.gradient("blocks.0.ffn.up.weight"), total)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_without_gradient_has_zero() -> None:
    model = _model(weight_tying=False)
    weights = Replicated(model, torch.float32)
    tokens = torch.randint(0, 50, (2, 16))
    _backward(model, weights, [tokens])
    assert weights.gradient("lm_head.weight").abs().max() > 0
    weights.start_step()
    weights.start_micro_batch(last=True)
    model.wte(tokens).sum().backward()
    weights.finish_gradients()
    assert (weights.gradient("lm_head.weight") == 0).all()
    assert weights.gradient("wte.weight").abs().max() > 0
    assert all(b.master.grad is b.grad for b in weights.buckets)


def test_a_bucket_that_no_micro_batch_fills_loses_nothing() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1, bias=False), "unused": nn.Linear(4, 1, bias=False)})
    weights = Replicated(model, torch.float32)
    weights.start_step()
    for i in range(3):
        weights.start_micro_batch(last=i == 2)
        model["used"](torch.ones(1, 4)).sum().backward()
    weights.finish_gradients()
    assert (weights.gradient("used.weight") == 3).all()
    assert (weights.gradient("unused.weight") == 0).all()


def test_a_frozen_parameter_stays_as_it_is() -> None:
    model = _model()
    model.norm.weight.requires_grad_(False)
    weights = Replicated(model, torch.bfloat16)
    assert "norm.weight" not in weights.places
    _backward(model.float(), weights, [torch.randint(0, 50, (2, 16))])
    assert model.norm.weight.grad is None


schedules = st.builds(
    OptimizerConfig,
    lr_schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup_iters=st.integers(0, 50),
    lr_decay_iters=st.none() | st.integers(1, 120),
    wsd_decay_fraction=st.floats(0, 1),
    min_lr=st.floats(0, 6e-4),
)


@given(schedules, st.integers(1, 100))
def test_schedule_stays_within_its_bounds_and_falls_after_the_warm_up(config: OptimizerConfig, max_iters: int) -> None:
    rates = [learning_rate(i, config, max_iters) for i in range(max_iters)]
    low = min(config.min_lr, config.learning_rate / (config.warmup_iters + 1))
    assert all(low * (1 - 1e-9) <= rate <= config.learning_rate for rate in rates)
    warm = rates[: config.warmup_iters]
    assert warm == sorted(warm)
    after = rates[config.warmup_iters :]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(after))


@given(schedules, st.integers(1, 100))
def test_schedule_is_interpolation_between_its_corners(config: OptimizerConfig, max_iters: int) -> None:
    peak, low, warm = config.learning_rate, config.min_lr, config.warmup_iters
    end = max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    start = max(warm, round(end * (1 - config.wsd_decay_fraction))) if config.lr_schedule == "wsd" else warm
    at = np.arange(120)
    left = np.where(at >= end, 0, np.interp(at, [start, max(end, start + 1)], [1, 0]))
    if config.lr_schedule == "cosine":
        left = np.sin(np.pi / 2 * left) ** 2
    after = low + left * (peak - low) if config.lr_schedule != "constant" else np.full(120, peak)
    wanted = np.where(at < warm, np.interp(at, [-1, warm], [0, peak]), after)
    np.testing.assert_allclose([learning_rate(int(i), config, max_iters) for i in at], wanted, rtol=1e-6)


def test_schedule_values() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_schedule="cosine")
    assert learning_rate(0, config, 109) == pytest.approx(0.1)
    assert learning_rate(9, config, 109) == 1.0
    assert learning_rate(59, config, 109) == pytest.approx(0.55)
    assert learning_rate(109, config, 109) == 0.1
    wsd = OptimizerConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=0, lr_schedule="wsd", wsd_decay_fraction=0.2)
    assert [learning_rate(i, wsd, 100) for i in (0, 79, 80, 90)] == pytest.approx([1, 1, 1, 0.5])
    constant = OptimizerConfig(learning_rate=1.0, lr_schedule="constant", warmup_iters=0)
    assert learning_rate(10**6, constant, 10) == 1.0


@pytest.mark.parametrize(("norm", "grad_clip", "divisor"), [(5.0, 2.0, 2.5), (1.5, 2.0, 1.0), (5.0, 0.0, 1.0)])
def test_clipping(norm: float, grad_clip: float, divisor: float) -> None:
    """The first moment after one step is (1 - beta1) times the clipped gradient."""
    model = nn.Linear(8, 8, bias=False)
    weights = Replicated(model, torch.float32)
    optimizer = AdamW(weights.buckets, OptimizerConfig(beta1=0.9), reference.adamw)
    weights.start_step()
    weights.start_micro_batch(last=True)
    gradient = torch.randn(8, 8)
    gradient *= norm / gradient.norm()
    (model.weight * gradient).sum().backward()
    weights.finish_gradients()
    assert weights.gradient_norm().item() == pytest.approx(norm)
    optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), grad_clip)
    optimizer.step()
    moment = optimizer.states(weights.buckets[0])["exp_avg"][:64].view(8, 8)
    torch.testing.assert_close(moment, 0.1 * gradient / divisor, rtol=1e-5, atol=1e-7)
