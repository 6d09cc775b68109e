"""The mathematics of the ops: derivatives of the eager reference, and properties of reference and kernels."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import EPS, IGNORE, VARIANTS, build, eager, kernel, rope_case
from kernel_rule import check_close
from torch import Tensor

from gptperf.kernels.reference import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = {"eager": (eager, 100), "triton": (kernel, 20)}
"""Name -> where to get an op's function, and how many examples to try: the interpreter takes its time."""
sizes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
"""Rows, columns, seed."""


def holds(strategies: Any = sizes) -> Callable[[Any], Any]:
    """Make a property of a function of an implementation and an example into a test of both implementations."""

    def decorate(prop: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
        def test(implementation: str) -> None:
            get, examples = IMPLEMENTATIONS[implementation]

            @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
            @given(strategies)
            def run(example: Any) -> None:
                prop(get, *example)

            run()

        test.__doc__ = prop.__doc__
        return test

    return decorate


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


# Derivatives


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_of_the_reference(variant: str) -> None:
    case = build(variant, (2, 2, 6), torch.float64, classes=5)
    if case.op == "linear_cross_entropy":
        case.others["targets"][0, 0] = IGNORE
    names = list(case.tensors)

    def function(*tensors: Tensor) -> Any:
        return eager(case.op)(**dict(zip(names, tensors, strict=True)), **case.others)

    leaves = [x.requires_grad_() for x in case.tensors.values()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_of_rope(interleaved: bool, heads: tuple[int, int]) -> None:
    variant = "rope_qk_norm_interleaved" if interleaved else "rope_qk_norm"
    case = rope_case(variant, (1, 2), heads, 4, torch.float64)

    def function(*tensors: Tensor) -> Any:
        return eager("rope")(**dict(zip(case.tensors, tensors, strict=True)), **case.others)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.tensors.values()])


# The reference against PyTorch's own, where it has one


def test_the_reference_is_the_formula() -> None:
    x, w, b, up = (normal(seed, 5, 8, dtype=torch.float64) for seed in range(4))
    w, b = w[0], b[0]
    rms = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    torch.testing.assert_close(eager("rms_norm")(x, w, EPS), rms)
    centered = x - x.mean(-1, keepdim=True)
    layer = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt() * w + b
    torch.testing.assert_close(eager("layer_norm")(x, w, b, EPS), layer)
    for name, activation in ACTIVATIONS.items():  # tests/model/test_formula.py has their formulas
        torch.testing.assert_close(eager("activation")(x, name, up, b[:5]), activation(x) @ up.T + b[:5])
    torch.testing.assert_close(eager("swiglu")(torch.cat([x, up], -1)), x / (1 + (-x).exp()) * up)
    targets = torch.arange(5, device=DEVICE)
    logits = x @ up.T
    loss = -(logits.exp() / logits.exp().sum(-1, keepdim=True)).log()[targets, targets].mean()
    torch.testing.assert_close(eager("linear_cross_entropy")(x, up, targets).double(), loss)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_product(interleaved: bool) -> None:
    case = rope_case("rope", (2, 5), (3, 1), 6, torch.float64, DEVICE)
    case.others["interleaved"] = interleaved
    turned = eager("rope")(**case.tensors, **case.others)
    heads = case.activation.view(2, 5, 5, 6).split([3, 1, 1], 2)
    turn = torch.complex(case.others["cos"].double(), case.others["sin"].double())[:5, None]
    for found, x in zip(turned[:2], heads[:2], strict=True):
        real, imaginary = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        wanted = torch.complex(real, imaginary) * turn
        parts = (found[..., ::2], found[..., 1::2]) if interleaved else found.chunk(2, -1)
        torch.testing.assert_close(torch.complex(*parts), wanted)
    assert torch.equal(turned[2], heads[2])


# Properties


@holds()
def test_rms_norm_does_not_see_the_scale(get: Any, rows: int, columns: int, seed: int) -> None:
    """y(4 x, 16 eps) = y(x, eps) to the bit: powers of two round nothing."""
    x, w = normal(seed, rows, columns), normal(seed + 1, columns)
    rms_norm = get("rms_norm")
    assert torch.equal(rms_norm(4 * x, w, 16 * EPS), rms_norm(x, w, EPS))
    if columns > 8:
        check_close("rms_norm", rms_norm(3 * x, w, 1e-30), rms_norm(x, w, 1e-30), roundings=8)
    assert torch.equal(rms_norm(-x, w, EPS), -rms_norm(x, w, EPS))


@holds()
def test_layer_norm_does_not_see_a_shift(get: Any, rows: int, columns: int, seed: int) -> None:
    x, w, b = normal(seed, rows, columns), normal(seed + 1, columns), normal(seed + 2, columns)
    layer_norm = get("layer_norm")
    shift = 16.0
    rstd = (x.var(-1, correction=0) + EPS).rsqrt().max().item()
    terms = 4 * (shift + x.abs().max().item()) * rstd * w.abs().max().item() * (1 + rstd)
    check_close("layer_norm", layer_norm(x + shift, w, b, EPS), layer_norm(x, w, b, EPS), terms=terms)
    ones = torch.ones_like(w)
    plain = layer_norm(x, ones, None, EPS)
    if columns > 8:
        check_close("mean", plain.mean(-1), torch.zeros_like(plain[:, 0]), terms=columns)
        variance = x.double().var(-1, correction=0)
        check_close("variance", plain.var(-1, correction=0), (variance / (variance + EPS)).float(), terms=8)


@holds()
def test_cross_entropy_does_not_see_a_shift(get: Any, rows: int, columns: int, seed: int) -> None:
    """A constant on every logit of a row, by a column of ones in the weight: the same loss and other gradients."""
    x, w = normal(seed, rows, columns) / math.sqrt(columns), normal(seed + 1, 11, columns)
    targets = torch.arange(rows, device=DEVICE) % 11
    results = []
    for shift in (0.0, 8.0):
        wide = torch.cat([x, torch.full((rows, 1), shift, device=DEVICE)], 1).requires_grad_()
        weight = torch.cat([w, torch.ones(11, 1, device=DEVICE)], 1).requires_grad_()
        loss = get("linear_cross_entropy")(wide, weight, targets)
        loss.backward()
        results.append((loss, wide.grad, weight.grad))
    (loss, dx, dw), (shifted, dx_shifted, dw_shifted) = results
    magnitude = 8 + float((x @ w.T).abs().max())
    check_close("loss", shifted, loss, terms=2 * magnitude)
    check_close("dx", dx_shifted, dx, terms=4 * magnitude * float(w.abs().max()))
    check_close("dw", dw_shifted[:, :-1], dw[:, :-1], terms=4 * magnitude * float(x.abs().max()))
    check_close("d shift", dx[:, -1], torch.zeros_like(dx[:, -1]), terms=4)  # a row's loss does not change that way


@pytest.mark.slow
@holds(st.tuples(st.sampled_from([2, 18, 64]), st.booleans(), st.integers(0, 2**31)))
def test_rope_turns_and_turns_back(get: Any, head_dim: int, interleaved: bool, seed: int) -> None:
    """Pairs keep their length; the opposite angle undoes it; position 0 does not turn; values are as they were."""
    case = rope_case("rope", (2, 5), (2, 1), head_dim, device=DEVICE, seed=seed)
    others = {**case.others, "interleaved": interleaved}
    q, k, v = get("rope")(**case.tensors, **others)
    before = case.activation.view(2, 5, 4, head_dim)
    assert torch.equal(v, before[:, :, 3:])
    assert torch.equal(torch.cat([q, k], 2)[:, 0], before[:, 0, :3])
    for found, x in ((q, before[:, :, :2]), (k, before[:, :, 2:3])):
        pairs = [y.unflatten(-1, (-1, 2) if interleaved else (2, -1)) for y in (found, x)]
        lengths = [y.norm(dim=-1 if interleaved else -2) for y in pairs]
        check_close("lengths", *lengths)
    back = get("rope")(torch.cat([q, k, v], 2).flatten(2), **{**others, "sin": -others["sin"]})
    check_close("there and back", torch.cat(back, 2), before)
    if head_dim > 2:
        assert (q[:, 1:] != before[:, 1:, :2]).float().mean() > 0.5


@holds()
def test_rope_scores_depend_on_the_distance(get: Any, rows: int, columns: int, seed: int) -> None:
    """The product of a query and a key is that of their distance: both two positions later, it is the same."""
    D = columns + columns % 2
    case = rope_case("rope", (1, rows + 2), (1, 1), D, device=DEVICE)
    one = normal(seed, 1, 1, 3 * D).expand(1, rows + 2, 3 * D)
    q, k, _ = get("rope")(one, **case.others)
    scores = q[0, :, 0].double() @ k[0, :, 0].double().T
    terms = float(one.square().sum())
    check_close("scores", scores[2:, 2:].float(), scores[:-2, :-2].float(), terms=terms * (rows + 2))


@holds()
def test_swiglu_of_zero_is_zero(get: Any, rows: int, columns: int, seed: int) -> None:
    """It is 0 if either half is 0, and linear in the second half."""
    gate, up = normal(seed, rows, columns), normal(seed + 1, rows, columns)
    swiglu = get("swiglu")
    zero = torch.zeros_like(gate)
    assert (swiglu(torch.cat([zero, up], 1)) == 0).all()
    assert (swiglu(torch.cat([gate, zero], 1)) == 0).all()
    assert torch.equal(swiglu(torch.cat([gate, -2 * up], 1)), -2 * swiglu(torch.cat([gate, up], 1)))
    check_close("silu(g) - silu(-g) = g", *_halves(swiglu, gate))


def _halves(swiglu: Any, gate: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(gate)
    return swiglu(torch.cat([gate, one], 1)) - swiglu(torch.cat([-gate, one], 1)), gate


@pytest.mark.slow
@holds(st.tuples(st.sampled_from(sorted(VARIANTS)), st.integers(2, 9), st.integers(0, 2**31)))
def test_rows_do_not_know_their_order(get: Any, variant: str, rows: int, seed: int) -> None:
    """Rows in another order give the same rows in that order, and the same loss."""
    case = build(variant, (rows, 1, 34) if "rope" in variant else (rows, 34), device=DEVICE, seed=seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    by_row = [
        k for k, x in {**case.tensors, **case.others}.items() if k in ("x", "residual", "targets", "gate_up", "qkv")
    ]
    arguments = {**case.tensors, **case.others}
    plain = get(case.op)(**arguments)
    mixed = get(case.op)(**{k: x[order] if k in by_row else x for k, x in arguments.items()})
    if case.op == "linear_cross_entropy":
        check_close(variant, mixed, plain)
        return
    # A product of matrices may add in another order, and PyTorch computes the last GELUs of a tensor in another way.
    exact = "linear" not in variant and not (case.op == "activation" and get is eager)
    for found, wanted in zip(_tuple(mixed), _tuple(plain), strict=True):
        if exact:
            assert torch.equal(found, wanted[order])
        else:
            check_close(variant, found, wanted[order], roundings=16)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
