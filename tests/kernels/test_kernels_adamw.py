"""The Triton update against the formula in float64 and against eager PyTorch; it changes nothing else."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_rule import check
from torch import Tensor

from gptperf.kernels import reference
from gptperf.kernels.adamw import adamw
from gptperf.kernels.checks import SEED_NUMEL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
NAMES = ("master", "exp_avg", "exp_avg_sq")
OF_A_MODEL = pytest.param((11264, 2048), marks=pytest.mark.gpu)


def _state(shape: tuple[int, ...], copy: torch.dtype | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    master, grad, exp_avg, exp_avg_sq = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4))
    exp_avg_sq = exp_avg_sq.square() * 1e-3
    compute = None if copy is None else torch.zeros(shape, dtype=copy, device=DEVICE)
    state = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "compute": compute}
    return {name: x if x is None else x.clone() for name, x in state.items()}


def _scalars(t: int = 7, divisor: float = 2.5, skip: float = 0.0, lr: float = 1e-3) -> Tensor:
    return torch.tensor([lr, t, 1 - BETAS[0] ** t, 1 - BETAS[1] ** t, divisor, skip], device=DEVICE)


def _update(function: Any, state: dict[str, Any], scalars: Tensor) -> dict[str, Any]:
    function(*state.values(), scalars, *BETAS, EPS, DECAY)
    return state


def _truth(state: dict[str, Any], scalars: Tensor) -> dict[str, Tensor]:
    """Loshchilov and Hutter's algorithm 2 in float64, with the betas and scalars as they are in float32."""
    lr, _, bias1, bias2, divisor, _ = scalars.double()
    w, g, m, v = (state[name].double() for name in ("master", "grad", "exp_avg", "exp_avg_sq"))
    g = g / divisor
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    w = w * (1 - lr * DECAY) - lr * (m / bias1) / ((v / bias2).sqrt() + EPS)
    return {"master": w, "exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize("copy", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (3, 1024), (17, 64), OF_A_MODEL])
def test_the_update_is_the_formula(shape: tuple[int, ...], copy: torch.dtype | None) -> None:
    truth = _truth(_state(shape, copy), _scalars())
    ours, eager = (_update(f, _state(shape, copy), _scalars()) for f in (adamw, reference.adamw))
    for name in NAMES:
        check(f"adamw {name}", ours[name], eager[name], truth[name])
    if copy is not None:
        assert torch.allclose(ours["compute"].float(), ours["master"], rtol=torch.finfo(copy).eps, atol=1e-7)
        if copy is torch.float16 or DEVICE == "cuda":  # the interpreter rounds to bfloat16 towards zero
            assert torch.equal(ours["compute"], ours["master"].to(copy))


@pytest.mark.parametrize("function", [adamw, reference.adamw])
def test_a_gradient_in_bfloat16_is_read_as_it_is(function: Any) -> None:
    """As its float32 values, bit for bit."""
    states = [_state((3, 1000), torch.float16) for _ in range(2)]
    rounded = states[0]["grad"].bfloat16()
    for state, grad in zip(states, (rounded, rounded.float()), strict=True):
        _update(function, state | {"grad": grad}, _scalars())
    assert all(torch.equal(states[0][name], states[1][name]) for name in (*NAMES, "compute"))
    with pytest.raises(ValueError, match="grad"):
        _update(function, _state((3, 1000), None) | {"grad": rounded.half()}, _scalars())


def test_a_step_that_is_left_out_changes_nothing_but_the_copy() -> None:
    before, state = _state((3, 1000), torch.float16), _state((3, 1000), torch.float16)
    state["grad"][1] = math.nan
    after = _update(adamw, state, _scalars(skip=1.0, divisor=math.inf))
    assert all(torch.equal(after[name], before[name]) for name in NAMES)
    assert torch.equal(after["compute"], before["master"].half())


def test_the_gradient_is_only_read() -> None:
    state = _state((2, 700), None)
    assert torch.equal(_update(adamw, state, _scalars())["grad"], _state((2, 700), None)["grad"])


def test_any_skip_but_zero_leaves_the_step_out() -> None:
    for function in (adamw, reference.adamw):
        before, after = _state((5, 64), None), _update(function, _state((5, 64), None), _scalars(skip=2.0))
        assert all(torch.equal(after[name], before[name]) for name in NAMES)


# Moments in bfloat16


def _low_state(shape: tuple[int, ...], copy: torch.dtype | None = None) -> dict[str, Any]:
    """Returns a state with moments in bfloat16."""
    state = _state(shape, copy)
    return state | {name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}


def _seeds(numel: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = -(-numel // SEED_NUMEL)
    return torch.randint(-(2**31), 2**31, (rows,), generator=generator, dtype=torch.int64).int().to(DEVICE)


def _low_update(function: Any, state: dict[str, Any], scalars: Tensor, seeds: Tensor) -> dict[str, Any]:
    function(*state.values(), scalars, *BETAS, EPS, DECAY, seeds)
    return state


@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (17, 64), OF_A_MODEL])
def test_moments_in_bfloat16_are_rounded_to_a_neighbour(shape: tuple[int, ...]) -> None:
    """The weights are those of the exact moments, and eager PyTorch draws the same bits.

    The two terms of a new moment may cancel; their float32 sum is off by 4 roundings of the larger one at most.
    """
    before = _low_state(shape)
    exact = {name: x if x is None else x.float() for name, x in before.items()}
    truth, seeds = _truth(exact, _scalars()), _seeds(before["master"].numel())
    g = before["grad"].double() / _scalars()[4]
    terms = {"exp_avg": (before["exp_avg"], g), "exp_avg_sq": (before["exp_avg_sq"], g * g)}
    ours, eager = (_low_update(f, _low_state(shape), _scalars(), seeds) for f in (adamw, reference.adamw))
    check("adamw master", ours["master"], eager["master"], truth["master"])
    for name in ("exp_avg", "exp_avg_sq"):
        sum_error = 2.0**-22 * torch.maximum(*(term.double().abs() for term in terms[name]))
        unit = 2.0 ** ((truth[name].abs() + sum_error).clamp(min=1e-30).log2().floor() - 7)
        assert ((ours[name].double() - truth[name]).abs() < 1.001 * unit + sum_error).all(), name
        # A moment that differs by a rounding of float32 is rounded to the other neighbour once in 65,536 times.
        assert (ours[name] != eager[name]).sum() <= 1 + ours[name].numel() // 1000, name


def test_rounding_at_random_has_no_bias_and_no_pattern() -> None:
    """The mean error of n roundings is within 5 of its standard deviations, which are at most 1 / sqrt(4 n) units."""
    shape, scalars = (16, 1024), _scalars(divisor=1.0)
    means, errors = [], []
    for t in range(1, 5):
        scalars[1] = t
        state = _low_state(shape)
        state["grad"].fill_(1.0)
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1 + 2**-4)
        wanted = 1 + 2**-4 + (1 - torch.tensor(BETAS[1])) * (1 - 1 - 2**-4)
        found = _low_update(adamw, state, scalars, _seeds(shape[0] * shape[1]))
        assert (found["exp_avg"] == 1).all()  # a value of bfloat16 stays what it is
        errors.append((found["exp_avg_sq"].float() - wanted).flatten() / 2**-7)
        means.append(errors[-1].mean().item())
    bound = 5 / math.sqrt(4 * errors[0].numel())
    assert all(abs(mean) < bound for mean in means), (means, bound)
    for other in (errors[1], errors[0].roll(1), errors[0].roll(SEED_NUMEL)):  # another step, the next element and row
        a, b = errors[0] - errors[0].mean(), other - other.mean()
        assert abs((a * b).mean() / (a.std() * b.std())) < 5 / math.sqrt(a.numel())
    assert errors[0].view(-1, SEED_NUMEL).mean(1).std() < 2 * errors[0].std() / math.sqrt(SEED_NUMEL)


def test_the_place_in_a_bucket_changes_no_random_bit() -> None:
    state, seeds = _low_state((8, 64)), _seeds(8 * 64)
    whole = _low_update(adamw, {k: None if x is None else x.clone() for k, x in state.items()}, _scalars(), seeds)
    part = {k: None if x is None else x[3:6].clone() for k, x in state.items()}
    part = _low_update(adamw, part, _scalars(), seeds[3:6].clone())
    assert all(torch.equal(part[name], whole[name][3:6]) for name in NAMES)


def test_a_step_that_is_left_out_changes_no_moment_in_bfloat16() -> None:
    for function in (adamw, reference.adamw):
        before = _low_state((3, 1000))
        after = _low_update(function, _low_state((3, 1000)), _scalars(skip=1.0, divisor=math.nan), _seeds(3000))
        assert all(torch.equal(after[name], before[name]) for name in NAMES)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_nan_when_it_is_rounded() -> None:
    """Even with all bits set, as a GPU writes it: plus a random number, that would be a zero."""
    for function in (adamw, reference.adamw):
        state = _low_state((3, 64))
        state["grad"][0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        found = _low_update(function, state, _scalars(), _seeds(3 * 64))
        assert all(found[name][0].isnan().all() and found[name][1:].isfinite().all() for name in NAMES)


@pytest.mark.parametrize("function", [adamw, reference.adamw])
@pytest.mark.parametrize("wrong", [None, lambda x: x[:1], lambda x: x.long(), lambda x: x.repeat(2)[::2]])
def test_wrong_seeds(function: Any, wrong: Callable[[Tensor], Tensor] | None) -> None:
    seeds = None if wrong is None else wrong(_seeds(4 * 64))
    with pytest.raises(ValueError, match=r"wanted \(4,\) torch.int32 .* because the moments are bfloat16"):
        function(*_low_state((4, 64)).values(), _scalars(), *BETAS, EPS, DECAY, seeds)
    with pytest.raises(ValueError, match="found seeds with moments in float32"):
        function(*_state((4, 64), None).values(), _scalars(), *BETAS, EPS, DECAY, _seeds(4 * 64))


@pytest.mark.parametrize("function", [adamw, reference.adamw])
@pytest.mark.parametrize("wrong", [lambda x: x[:5], lambda x: x.half(), lambda x: x.repeat(2)[::2]])
def test_wrong_scalars(function: Any, wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"scalars .* wanted \(6,\) torch.float32, contiguous"):
        _update(function, _state((4, 6), None), wrong(_scalars()))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("grad", lambda x: x.half(), r"grad \(4, 6\) torch.float16.*wanted \(4, 6\) torch.float32"),
        ("exp_avg", lambda x: x.half(), r"exp_avg \(4, 6\) torch.float16.*wanted \(4, 6\) torch.float32"),
        ("exp_avg", lambda x: x.bfloat16(), r"exp_avg_sq .*torch.float32.*wanted \(4, 6\) torch.bfloat16"),
        ("exp_avg", lambda x: x[:2], r"exp_avg \(2, 6\).*wanted \(4, 6\)"),
        ("exp_avg_sq", lambda x: x.t().contiguous().t(), r"exp_avg_sq .*strides \(1, 4\)"),
        ("compute", lambda x: x[1:], r"compute \(3, 6\).*wanted \(4, 6\)"),
        ("master", lambda x: x.double(), r"float64"),
    ],
)
def test_wrong_arguments(name: str, wrong: Any, message: str) -> None:
    state = _state((4, 6), torch.bfloat16)
    state[name] = wrong(state[name])
    with pytest.raises(ValueError, match=message):
        _update(adamw, state, _scalars())
