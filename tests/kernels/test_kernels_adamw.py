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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
NAMES = ("master", "exp_avg", "exp_avg_sq")


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
@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (3, 1024), (17, 64)])
def test_the_update_is_the_formula(shape: tuple[int, ...], copy: torch.dtype | None) -> None:
    truth = _truth(_state(shape, copy), _scalars())
    ours, eager = (_update(f, _state(shape, copy), _scalars()) for f in (adamw, reference.adamw))
    for name in NAMES:
        check(f"adamw {name}", ours[name], eager[name], truth[name])
    if copy is not None:
        assert torch.allclose(ours["compute"].float(), ours["master"], rtol=torch.finfo(copy).eps, atol=1e-7)
        if copy is torch.float16 or DEVICE == "cuda":  # the interpreter rounds to bfloat16 towards zero
            assert torch.equal(ours["compute"], ours["master"].to(copy))


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


@pytest.mark.parametrize("function", [adamw, reference.adamw])
@pytest.mark.parametrize("wrong", [lambda x: x[:5], lambda x: x.half(), lambda x: x.repeat(2)[::2]])
def test_wrong_scalars(function: Any, wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"scalars .* wanted \(6,\) torch.float32, contiguous"):
        _update(function, _state((4, 6), None), wrong(_scalars()))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("grad", lambda x: x.half(), r"grad \(4, 6\) torch.float16.*wanted \(4, 6\) torch.float32"),
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
