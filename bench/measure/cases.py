"""The cases that `bench.measure.ops` measures: ops, shapes, inputs, least bytes, and the implementations besides ours.

A rival (an implementation of another project) is imported only when it is measured. Each rival gets its inputs in the
form in which it is fastest: weights of norms in bfloat16 for `liger`, `torch_native` and cuDNN's RMSNorm (ours, eager
and compiled have them in float32, as the model does); gate and up in two tensors for Liger's SwiGLU. RoPE takes the
packed projection, except in `liger_separate`, which rotates q and k in two tensors of their own and does not move v.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf import ops
from gptperf.kernels import reference

__all__ = ["HOST_ROWS", "HOST_SHAPES", "IMPLS", "LOSS_OP", "OPS", "OURS", "YARDSTICKS", "Implementation", "Inputs"]
__all__ += ["Shape", "call", "eager"]
__all__ += ["implementation", "kernel", "leaves", "least_bytes", "make_inputs", "share"]

Shape = tuple[int, ...]
Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
OURS, YARDSTICKS = "triton", ("copy", "gemm")
LOSS_OP = "linear_cross_entropy"
EPS = 1e-5  # the default of our kernels and of eager


@dataclass(frozen=True)
class Op:
    """An op with the shapes and implementations that are measured."""

    shapes: tuple[Shape, ...]
    impls: tuple[str, ...]
    small: Shape
    """Small shape for the measurement of errors, which Triton's interpreter can run too."""
    real: Shape
    """Shape with the width of a model, for the measurement of errors."""


NORM = ((32768, 2048), (65536, 768), (16384, 4096), (8192, 8192))  # M, N
ROPE = ((16, 16, 2048, 128, 16), (4, 32, 4096, 128, 32), (64, 12, 1024, 64, 12), (4, 32, 4096, 128, 8))  # B, H, T, D, K
SWIGLU = ((32768, 5632), (16384, 14336), (65536, 2048))  # M, F
ACTIVATION = ((65536, 3072), (16384, 16384))  # M, F
LOSS = ((32768, 2048, 32000), (65536, 768, 50304), (16384, 4096, 128256))  # M, C, V
PLAIN = ("eager", "compiled", "triton", "liger")
OPS = {
    "rms_norm": Op(NORM, (*PLAIN, "torch_native", "cudnn"), (37, 96), (4096, 2048)),
    "rms_norm_add": Op(NORM, (*PLAIN, "torch_native"), (37, 96), (4096, 2048)),
    "layer_norm": Op(NORM, (*PLAIN, "torch_native", "cudnn"), (37, 96), (4096, 768)),
    "layer_norm_add": Op(NORM, (*PLAIN, "torch_native"), (37, 96), (4096, 768)),
    "rope": Op(ROPE, (*PLAIN, "liger_separate"), (2, 4, 9, 16, 2), (2, 16, 1024, 128, 4)),
    "gelu": Op(ACTIVATION, PLAIN[:3], (19, 40), (4096, 3072)),
    "gelu_recompute": Op(ACTIVATION, ("triton",), (19, 40), (4096, 3072)),
    "gelu_tanh": Op(ACTIVATION[:1], PLAIN[:3], (19, 40), (4096, 3072)),
    "relu_squared": Op(ACTIVATION[:1], PLAIN[:3], (19, 40), (4096, 3072)),
    "swiglu": Op(SWIGLU, PLAIN, (19, 40), (4096, 5632)),
    "swiglu_recompute": Op(SWIGLU, ("triton",), (19, 40), (4096, 5632)),
    "linear_cross_entropy": Op(LOSS, PLAIN, (23, 32, 101), (4096, 768, 50304)),
}
IMPLS = tuple(dict.fromkeys(name for op in OPS.values() for name in op.impls))
HOST_ROWS = (1, 8, 64, 512)
HOST_SHAPES: dict[str, Callable[[int], Shape]] = {
    **dict.fromkeys((op for op in OPS if "norm" in op), lambda rows: (rows, 768)),
    "rope": lambda rows: (1, 12, rows, 64, 12),
    **dict.fromkeys(("gelu", "swiglu"), lambda rows: (rows, 2048)),
}


def least_bytes(op: str, shape: Shape) -> dict[str, int]:
    """Returns direction -> the least bytes that an op on 2-byte elements moves: every input and output once.

    Parameters of norms and tables of rope are float32, and so are the statistics of a row, which forward writes and
    backward reads. With the residual add, backward reads two gradients and writes once the gradient that both inputs
    share.
    """
    if "norm" in op:
        M, N = shape
        params = 1 if op.startswith("rms") else 2  # and as many statistics a row
        passes = (4, 4) if op.endswith("_add") else (2, 3)
        forward, backward = (2 * M * N * n + 4 * M * params for n in passes)
        return {"forward": forward + 4 * N * params, "backward": backward + 4 * N * (1 + params)}
    if op == "rope":
        B, H, T, D, K = shape
        moved = 2 * (2 * B * T * (H + 2 * K) * D) + 2 * (4 * T * D // 2)
        return {"forward": moved, "backward": moved}
    if op == "linear_cross_entropy":
        return {}  # limited by its matrix products, not by memory
    M, d_ff = shape
    forward, backward = (3, 5) if op.startswith("swiglu") else (2, 3)
    if op.endswith("_recompute"):
        return {"backward": 2 * (backward + 1) * M * d_ff}
    return {"forward": 2 * forward * M * d_ff, "backward": 2 * backward * M * d_ff}


def share(impl: str, op: str, shape: Shape) -> float:
    """Returns the share of the op's bytes that an implementation has to move."""
    if op == "rope" and impl == "liger_separate":
        _, H, _, _, K = shape
        return (H + K) / (H + 2 * K)
    return 1.0


def make_inputs(
    op: str,
    shape: Shape,
    seed: int = 0,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    norm_dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Returns random arguments of an op by name, in the order of its signature."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    if "norm" in op:
        M, N = shape
        inputs = {"x": normal(M, N), "weight": normal(N, dtype=norm_dtype).mul_(0.1).add_(1)}
        if op.startswith("layer"):
            inputs["bias"] = normal(N, dtype=norm_dtype).mul_(0.1)
        return inputs | ({"residual": normal(M, N)} if op.endswith("_add") else {})
    if op == "rope":
        B, H, T, D, K = shape
        frequencies = 10000.0 ** (-torch.arange(D // 2, device=device) * 2 / D)
        angles = torch.outer(torch.arange(T, device=device), frequencies)
        return {"qkv": normal(B, T, (H + 2 * K) * D), "cos": angles.cos(), "sin": angles.sin()}
    if op == "linear_cross_entropy":
        M, C, V = shape
        targets = torch.randint(V, (M,), generator=generator, device=device)
        return {"x": normal(M, C), "weight": normal(V, C).mul_(0.02), "targets": targets}
    M, d_ff = shape
    inputs = {"gate_up": normal(M, 2 * d_ff)} if op.startswith("swiglu") else {"x": normal(M, d_ff)}
    return inputs | ({"dy": normal(M, d_ff)} if op.endswith("_recompute") else {})


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Returns the inputs that get a gradient, with `requires_grad` set."""
    with_gradient = (name for name, x in inputs.items() if x.is_floating_point() and name not in ("cos", "sin"))
    return {name: inputs[name].requires_grad_() for name in with_gradient}


def call(function: Callable[..., Any], op: str, shape: Shape, inputs: Inputs) -> Outputs:
    """Calls a function that has the signature of the op's reference, and returns its outputs as a tuple."""
    positional = [x for name, x in inputs.items() if name != "residual"]
    heads = (shape[1], shape[4]) if op == "rope" else ()
    outputs = function(*positional, *heads, **{k: v for k, v in inputs.items() if k == "residual"})
    return outputs if isinstance(outputs, tuple) else (outputs,)


def eager(op: str) -> Callable[..., Any]:
    """Returns the eager reference of an op."""
    if op in reference.ACTIVATIONS:
        return partial(reference.activation, name=op)
    return getattr(reference, op.removesuffix("_add"))


def kernel(op: str) -> Callable[..., Any]:
    """Returns the Triton implementation of an op."""
    name = op.removesuffix("_add").removesuffix("_recompute")
    public = "activation" if name in reference.ACTIVATIONS else name
    function = getattr(importlib.import_module(ops.OPS[public]), public)
    if op.endswith("_recompute"):
        return lambda x, dy: torch.ops.gptperf.activation_backward(dy, x, name, True)
    return partial(function, name=name) if public != name else function


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op."""

    run: Callable[[Inputs], Outputs]
    own: Callable[[Inputs], Inputs] = dict
    """Converts the op's inputs to the form that `run` takes."""
    overwrites: bool = False
    """Whether backward writes into tensors that it reads, so that their values drift from call to call."""


def implementation(name: str, op: str, shape: Shape) -> Implementation:
    """Returns an implementation of an op, ready to run.

    Raises:
        ImportError: The package of the implementation is not installed.
    """
    match name:
        case "eager":
            return Implementation(partial(call, eager(op), op, shape))
        case "compiled":
            return Implementation(partial(call, _compiled(op), op, shape))
        case "triton":
            return Implementation(partial(call, kernel(op), op, shape))
        case "torch_native":
            return Implementation(_norm(op, F.rms_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS)), _low)
        case "cudnn":
            norm = importlib.import_module("cudnn.ops.norm")  # graphs with one plan per shape, TRAINING phase
            rms = partial(_without_shape, norm.rms_norm)
            run = _norm(op, rms, lambda x, w, b: norm.layer_norm(x, w.shape, w, b, EPS))
            return Implementation(run, _low if op == "rms_norm" else dict)
    return _liger_norm(op) if "norm" in op else _liger(op, shape, separate=name == "liger_separate")


def _compiled(op: str) -> Callable[..., Any]:
    function = eager(op)
    if op != "rope":
        return torch.compile(function, fullgraph=True, dynamic=False)

    def rope(*arguments: Any) -> Outputs:
        q, k, v = function(*arguments)
        return q, k, v.contiguous()  # autograd would differentiate a view outside the graph, at a high cost

    return torch.compile(rope, fullgraph=True, dynamic=False)


def _low(inputs: Inputs) -> Inputs:
    """Converts the parameters to the dtype of x."""
    return {name: x.to(inputs["x"].dtype) for name, x in inputs.items()}


def _norm(op: str, rms: Callable[..., Tensor], layer: Callable[..., Tensor]) -> Callable[[Inputs], Outputs]:
    """Returns a norm; where the op has a residual, a plain addition comes first."""

    def run(inputs: Inputs) -> Outputs:
        x, weight = inputs["x"], inputs["weight"]
        if "residual" in inputs:
            x = x + inputs["residual"]
        y = layer(x, weight, inputs["bias"]) if op.startswith("layer") else rms(x, weight.shape, weight, EPS)
        return (y, x) if "residual" in inputs else (y,)

    return run


def _without_shape(rms: Callable[..., Tensor], x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    return rms(x, weight, None, eps)


def _liger_function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _liger_norm(op: str) -> Implementation:
    if op == "rms_norm_add":
        add_norm = _liger_function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return Implementation(lambda t: add_norm(t["x"], t["residual"], t["weight"], EPS, 0.0, "llama", False), _low)
    if op == "rms_norm":  # by default it works in place: the gradient of x overwrites that of y
        rms = _liger_function("rms_norm", "LigerRMSNormFunction")
        run = _norm(op, lambda x, _, w, eps: rms(x, w, eps, 0.0, "llama", True, None), F.layer_norm)
        return Implementation(run, _low, overwrites=True)
    layer = _liger_function("layer_norm", "LigerLayerNormFunction")
    return Implementation(_norm(op, F.rms_norm, lambda x, w, b: layer(x, w, b, EPS)), _low)


def _liger(op: str, shape: Shape, separate: bool) -> Implementation:
    if op == "linear_cross_entropy":
        loss = _liger_function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
        return Implementation(lambda t: (loss(t["x"], t["weight"], t["targets"])[0],))
    if op == "swiglu":  # the gradients overwrite gate and up
        product = _liger_function("swiglu", "LigerSiLUMulFunction")
        return Implementation(lambda t: (product(t["gate"], t["up"]),), _gate_and_up, overwrites=True)
    rotate = _liger_function("rope", "LigerRopeFunction")

    def rope(inputs: Inputs) -> Outputs:
        cos, sin = inputs["cos"], inputs["sin"]
        q, k, *v = (inputs["q"], inputs["k"]) if separate else _split(inputs["qkv"], *heads)
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # (B, H, T, D)
        return (q.transpose(1, 2), k.transpose(1, 2), *v)

    heads = shape[1], shape[4]
    return Implementation(rope, partial(_doubled_tables, heads=heads if separate else None))


def _split(qkv: Tensor, n_head: int, n_kv_head: int) -> Outputs:
    """Returns q `(B, T, H, D)`, k and v `(B, T, K, D)` as views."""
    return qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split([n_head, n_kv_head, n_kv_head], dim=2)


def _gate_and_up(inputs: Inputs) -> Inputs:
    gate, up = inputs["gate_up"].chunk(2, dim=-1)
    return {"gate": gate.contiguous(), "up": up.contiguous()}


def _doubled_tables(inputs: Inputs, heads: tuple[int, int] | None) -> Inputs:
    """Returns tables `(1, T, D)` as Hugging Face has them; with `heads`, also q and k as separate tensors."""
    tables = {name: torch.cat([inputs[name]] * 2, -1)[None] for name in ("cos", "sin")}
    if heads is None:
        return {"qkv": inputs["qkv"], **tables}
    q, k, _ = _split(inputs["qkv"], *heads)
    return {"q": q.contiguous(), "k": k.contiguous(), **tables}
