"""Measures the errors of eager and of our kernels against float64, for every output and gradient of an op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure.cases import OURS, Inputs, Shape, call, eager, kernel, leaves, make_inputs
from bench.results import guarded

__all__ = ["DTYPES", "dtypes_of", "error_rows"]

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtypes_of(op: str) -> tuple[str, ...]:
    """Returns the dtypes in which the errors of an op are measured."""
    return (*DTYPES, "mixed") if "norm" in op else tuple(DTYPES)


def outputs_and_gradients(
    function: Callable[..., Any], op: str, shape: Shape, inputs: Inputs, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the outputs and the gradients of the inputs by name. The incoming gradients are rounded to `dtype`."""
    wanted = leaves(inputs)
    outputs = call(function, op, shape, inputs)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    normal = partial(torch.randn, generator=generator, device=outputs[0].device)
    dys = [normal(y.shape).to(dtype).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, tuple(wanted.values()), dys)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"d{name}": dx for name, dx in zip(wanted, gradients, strict=True)}


def exact(op: str, shape: Shape, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the results in float64. A sum with the residual is rounded, because the op stores it as an output."""
    doubles = {k: x.double() if x.is_floating_point() and k not in ("cos", "sin") else x for k, x in inputs.items()}
    function = eager(op)
    if "residual" in inputs:
        stored = (inputs["x"] + inputs["residual"]).double()

        def function(x: Tensor, *parameters: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            total = total + (stored - total).detach()
            return eager(op)(total, *parameters), total

    return outputs_and_gradients(function, op, shape, doubles, dtype)


def error_rows(op: str, shape: Shape, dtype: str, device: str) -> list[Row]:
    """Returns the errors of eager and of our kernel, with a row for each output and gradient of one op.

    Args:
        op: One of `bench.measure.cases.OPS`.
        shape: Shape of the op.
        dtype: One of `DTYPES`, or "mixed": bfloat16 with float32 parameters of a norm.
        device: Device of the tensors.

    Returns:
        Errors divided by the root mean square of the exact result, and our error divided by that of eager (None if
        eager has no error).
    """
    low, parameters = DTYPES.get(dtype, torch.bfloat16), DTYPES.get(dtype, torch.float32)
    inputs = partial(make_inputs, op, shape, 0, device, low, parameters)
    head: Row = {"op": op, "shape": list(shape), "dtype": dtype}
    found = guarded(head, lambda: outputs_and_gradients(kernel(op), op, shape, inputs(), low))
    if found is None:
        return [head]
    truth, plain = exact(op, shape, inputs(), low), outputs_and_gradients(eager(op), op, shape, inputs(), low)
    rows = []
    for name, wanted in truth.items():
        scale = wanted.square().mean().sqrt()
        row = {**head, "tensor": name}
        for impl, value in (("eager", plain[name]), (OURS, found[name])):
            error = (value.double() - wanted) / scale
            row[f"{impl}_rms"], row[f"{impl}_max"] = error.square().mean().sqrt().item(), error.abs().max().item()
        for measure_of in ("rms", "max"):
            ours, eagers = row[f"{OURS}_{measure_of}"], row[f"eager_{measure_of}"]
            row[f"ratio_{measure_of}"] = ours / eagers if eagers else None
        rows.append(row)
    return rows
