"""Kernels inside PyTorch: registration, torch.compile in one graph, autocast."""

from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EVERY_OPTION,
    ON_GPU,
    ONE_EACH,
    VARIANTS,
    case_of,
    gradients_for,
    kernel,
    run,
    verify,
)
from kernel_rule import check_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import lowering
from torch.utils._python_dispatch import TorchDispatchMode

BACKEND = "inductor" if ON_GPU else "aot_eager"
LOW = torch.bfloat16 if ON_GPU else torch.float16
ARGUMENTS = {
    "rms_norm": ("x", "residual", "weight", "eps"),
    "layer_norm": ("x", "residual", "weight", "bias", "eps"),
    "rope": ("qkv", "cos", "sin", "n_head", "n_kv_head", "q_weight", "k_weight", "eps", "interleaved"),
    "activation": ("x", "name"),
    "swiglu": ("gate_up", "name"),
    "linear_cross_entropy": ("x", "weight", "targets", "ignore_index", "needs_x", "needs_weight"),
}
"""Op -> names of its arguments, in their order; an argument that a case does not have is None."""


REGISTERED = [v for v, op in VARIANTS.items() if "_linear" not in v and (op != "activation" or v == "activation_gelu")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "gradient"), [*((v, True) for v in REGISTERED), *((v, False) for v in ONE_EACH if v in REGISTERED)]
)
def test_opcheck(variant: str, gradient: bool) -> None:
    case = case_of(variant, (2, 3, 18))
    values = {**case.others, **{k: x.clone().requires_grad_(gradient) for k, x in case.tensors.items()}}
    values |= {"needs_x": gradient, "needs_weight": gradient}
    if case.op == "linear_cross_entropy":
        values |= {"x": values["x"].detach().flatten(0, 1).requires_grad_(gradient)}
        values |= {"targets": values["targets"].flatten()}
    values |= {"name": values.get("name", "swiglu")}
    kernel(case.op)  # registers it
    registered = "activation" if case.op == "swiglu" else case.op
    arguments = tuple(values.get(name) for name in ARGUMENTS[case.op])
    torch.library.opcheck(getattr(torch.ops.gptperf, registered).default, arguments)


class Calls(TorchDispatchMode):
    """The arguments of every call of a gptperf op."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "gptperf":
            self.arguments[op] = args
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_opcheck_of_backward(variant: str) -> None:
    """With the arguments that a backward really hands over."""
    case = case_of(variant, (2, 3, 18))
    with Calls() as calls:
        run(kernel(case.op), case, gradients_for(case))
    [(op, arguments)] = [(op, args) for op, args in calls.arguments.items() if "backward" in op.name()]
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_compiled_is_the_same(variant: str) -> None:
    """One graph, the same bits, and no more than two recompilations for four numbers of rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)
    function = kernel(VARIANTS[variant])
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (3, 7, 12, 33):
        case = case_of(variant, (2, rows, 18))
        incoming = gradients_for(case)
        found, plain = run(compiled, case, incoming), run(function, case, incoming)
        if variant.endswith("_linear_bias") and ON_GPU:  # Inductor's own sum of the incoming gradient
            check_close("bias", found.gradients.pop("bias"), plain.gradients.pop("bias"), terms=rows)
        assert found.same_bits(plain)
    assert counter.frame_count <= 3


def test_inductor_knows_the_ops_before_it_meets_them() -> None:
    """PyTorch 2.11 prints the whole history of the inputs of an op that it does not know."""
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    torch.compile(kernel("rms_norm"), fullgraph=True, backend="aot_eager")(x, weight)
    for op in ("rms_norm", "rms_norm_backward"):
        assert getattr(torch.ops.gptperf, op).default in lowering.lowerings


@pytest.mark.parametrize("variant", ONE_EACH)
def test_compiled_under_autocast_is_the_same(variant: str) -> None:
    torch._dynamo.reset()
    function = kernel(VARIANTS[variant])
    case = case_of(variant, (2, 3, 18))
    incoming = gradients_for(case, autocast=LOW)
    found = run(torch.compile(function, fullgraph=True, backend=BACKEND), case, incoming, autocast=LOW)
    plain = run(function, case, incoming, autocast=LOW)
    if variant.endswith("_linear_bias") and ON_GPU:
        check_close("bias", found.gradients.pop("bias").to(LOW), plain.gradients.pop("bias").to(LOW))
    assert found.same_bits(plain)


# Autocast


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])], ids=str)
@pytest.mark.parametrize("activation", ["as the weights", "low"])
@pytest.mark.parametrize("variant", ONE_EACH)
def test_autocast_is_as_in_eager(variant: str, activation: str, dtype: torch.dtype) -> None:
    """Dtypes and values, from float32 weights and activations in float32 or in the dtype of autocast."""
    case = case_of(variant, (2, 3, 34), scale=0.2 if variant == "linear_cross_entropy" else 1.0)
    if activation == "low":
        low = ("x", "residual", "qkv", "gate_up")
        case = case.having(**{name: x.to(dtype) for name, x in case.tensors.items() if name in low})
    verify(case, autocast=dtype)
