"""AdamW with moments in bfloat16: small changes add up, any layout draws the same bits, the loss falls as usual."""

import math

import pytest
import torch
from torch import Tensor

from gptperf.config import ModelConfig, OptimizerConfig
from gptperf.distributed.replicated import Replicated
from gptperf.kernels import reference
from gptperf.model import GPT
from gptperf.training.optimizers.adamw import AdamW


def _model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50, bias=True))


def _backward(model: GPT, weights: Replicated, tokens: Tensor, targets: Tensor) -> float:
    """Leaves the gradients in the buckets, and returns the loss."""
    weights.start_step()
    weights.start_micro_batch(last=True)
    loss = model(tokens, targets)
    loss.backward()
    weights.finish_gradients()
    return loss.item()


def test_small_changes_of_a_moment_in_bfloat16_add_up() -> None:
    """Rounded to the nearest, the second moment would stop near 0.25, where 0.001 (1 - v) is half a unit."""
    w, g, m, v = torch.zeros(64, 64), torch.ones(64, 64), *torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    seeds, steps = torch.arange(64, dtype=torch.int32), 1500
    for t in range(1, steps + 1):
        scalars = torch.tensor([1e-3, t, 1 - 0.9**t, 1 - 0.999**t, 1, 0])
        reference.adamw(w, g, m, v, None, scalars, 0.9, 0.999, 1e-8, 0.0, seeds)
    # A rounding is off by at most a unit, 2^-8 v to 2^-7 v, with a variance of at most a quarter of its square; the
    # errors of the last 1 / (1 - beta2) / 2 steps add up.
    wanted = 1 - 0.999**steps
    deviation = wanted * 2**-7 / 2 * math.sqrt(500 / v.numel())
    assert abs(v.float().mean().item() - wanted) < 5 * deviation
    assert v.unique().numel() > 10  # each element has its own random bits


@pytest.mark.parametrize("bucket_numel", [1, 3000])
def test_random_bits_belong_to_parameters_and_not_to_buckets(bucket_numel: int) -> None:
    """The same gradients give the same bits of weights and moments in buckets of any size, and other bits each step."""
    config = OptimizerConfig(optimizer_state_dtype="bfloat16", learning_rate=1e-2, min_lr=1e-3)
    found = []
    for numel in (1 << 20, bucket_numel):
        model = _model()
        weights = Replicated(model, torch.float32, bucket_numel=numel)
        optimizer = AdamW(weights.buckets, config, reference.adamw, weights.pieces_of)
        for step in range(3):
            tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(step))
            _backward(model, weights, tokens[:, :-1], tokens[:, 1:])
            optimizer.step()
        states = {
            f"{key}.{piece.name}": piece.values
            for bucket in weights.buckets
            for key, flat in (optimizer.states(bucket) | {"master": bucket.master.data}).items()
            for piece in weights.pieces_of(bucket, flat)
        }
        found.append(states)
    assert found[0].keys() == found[1].keys()
    assert {x.dtype for name, x in found[0].items() if name.startswith("exp")} == {torch.bfloat16}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_compiled_rounding_draws_the_same_bits() -> None:
    found = []
    for update in (reference.adamw, torch.compile(reference.adamw, backend="aot_eager", fullgraph=True)):
        w, g = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
        m, v = torch.ones(2, 4, 64, dtype=torch.bfloat16)
        scalars = torch.tensor([1e-2, 3, 1 - 0.9**3, 1 - 0.95**3, 1, 0])
        update(w, g, m, v, None, scalars, 0.9, 0.95, 1e-8, 0.1, torch.arange(4, dtype=torch.int32))
        found.append((w, m, v))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_moments_in_bfloat16_train_as_float32_does() -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = _model()
        weights = Replicated(model, torch.float32)
        config = OptimizerConfig(optimizer_state_dtype=dtype, learning_rate=3e-3, beta2=0.999)
        optimizer = AdamW(weights.buckets, config, reference.adamw, weights.pieces_of)
        losses[dtype] = []
        for step in range(60):
            start = torch.randint(0, 50, (8, 1), generator=torch.Generator().manual_seed(step))
            tokens = (start + 3 * torch.arange(17)) % 50
            losses[dtype].append(_backward(model, weights, tokens[:, :-1], tokens[:, 1:]))
            optimizer.step()
    ours, exact = (torch.tensor(losses[dtype]) for dtype in ("bfloat16", "float32"))
    assert exact[-1] < exact[0] / 2  # it learns
    assert not torch.equal(ours, exact)
    # Two runs part by the noise of the rounding, 0.4% of a moment; so may their losses, by a few per cent of the fall.
    assert (ours - exact).abs().max() < 0.02 * (exact[0] - exact[-1])
