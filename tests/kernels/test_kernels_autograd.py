"""Kernels inside autograd: frozen and shared tensors, unused outputs, checkpointing, second derivatives."""

import re
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import (
    EVERY_OPTION,
    ONE_EACH,
    Result,
    case_of,
    gradients_for,
    kernel,
    run,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_without_gradients(variant: str) -> None:
    case = case_of(variant, (2, 3, 18))
    function = kernel(case.op)
    wanted = run(function, case, gradients_for(case)).outputs
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = _tuple(function(**leaves, **case.others))
        assert not any(y.requires_grad for y in found)
        assert Result(found, {}).same_bits(Result(wanted, {}))
    found = _tuple(function(**case.tensors, **case.others))
    assert not any(y.requires_grad for y in found)
    assert Result(found, {}).same_bits(Result(wanted, {}))


@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_frozen_tensors(variant: str) -> None:
    """The gradient of each tensor alone is the one that it has among the others."""
    case = case_of(variant, (2, 3, 18))
    incoming = gradients_for(case)
    wanted = run(kernel(case.op), case, incoming).gradients
    for name in case.tensors:
        leaves = {k: x.detach().requires_grad_(k == name) for k, x in case.tensors.items()}
        outputs = _tuple(kernel(case.op)(**leaves, **case.others))
        pairs = [(y, g) for y, g in zip(outputs, incoming, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        assert torch.equal(leaves[name].grad, wanted[name]), name  # type: ignore[arg-type]
        assert all(x.grad is None for k, x in leaves.items() if k != name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rms_norm_add", "layer_norm_add", "rope_qk_norm"])
def test_outputs_that_nobody_uses(variant: str) -> None:
    """Have a gradient of 0."""
    case = case_of(variant, (2, 3, 18))
    incoming = gradients_for(case)
    for only in range(len(incoming)):
        used = [i == only for i in range(len(incoming))]
        zeros = tuple(g * u for g, u in zip(incoming, used, strict=True))
        wanted = run(kernel(case.op), case, zeros).gradients
        leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
        outputs = kernel(case.op)(**leaves, **case.others)
        pairs = [(y, g) for y, g, u in zip(outputs, incoming, used, strict=True) if u]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        for name, x in leaves.items():
            assert x.grad is not None, name
            assert torch.equal(x.grad, wanted[name]), (name, used)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_activation_checkpointing(variant: str) -> None:
    case = case_of(variant, (2, 3, 18))
    incoming = gradients_for(case)

    def function(**arguments: Any) -> Any:
        return checkpoint(kernel(case.op), use_reentrant=False, **arguments)

    assert run(function, case, incoming).same_bits(run(kernel(case.op), case, incoming))


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_residual_may_be_x(op: str) -> None:
    case = case_of(f"{op}_add", (2, 3, 18))
    incoming = gradients_for(case)
    apart = run(kernel(op), case.having(residual=case.activation), incoming)
    x = case.activation.detach().requires_grad_()
    others = {name: y for name, y in {**case.tensors, **case.others}.items() if name not in ("x", "residual")}
    outputs = kernel(op)(x=x, residual=x, **others)
    torch.autograd.backward(outputs, incoming)
    assert Result(tuple(y.detach() for y in outputs), {}).same_bits(Result(apart.outputs, {}))
    assert torch.equal(x.grad, apart.gradients["x"] * 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_gradients_of_x_and_of_the_residual_are_two_tensors(op: str) -> None:
    result = run(kernel(op), case := case_of(f"{op}_add", (2, 3, 18)), gradients_for(case))
    before = result.gradients["x"].clone()
    result.gradients["residual"].zero_()
    assert torch.equal(result.gradients["x"], before)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_a_gradient_of_a_gradient_is_not_silently_wrong(variant: str) -> None:
    """PyTorch has no formula for it: it raises, or warns that a part is missing."""
    case = case_of(variant, (2, 3, 18))
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    outputs = _tuple(kernel(case.op)(**leaves, **case.others))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = ""
        try:
            first = torch.autograd.grad(outputs, list(leaves.values()), gradients_for(case), create_graph=True)
            sum(x.square().sum() for x in first).backward()  # type: ignore[union-attr]
        except RuntimeError as error:
            said = str(error)
    said += "".join(str(w.message) for w in caught)
    assert re.search(rf"gptperf::{case.op}_backward: an autograd kernel was not registered|does not require grad", said)
