"""Inputs of every op for the tests of kernels: variants, sizes, values; runs a case and compares the results.

A case holds the tensors that get gradients and the rest of the arguments, by name. It is run three times: the eager
reference on float64 copies, the eager reference, and the kernel; `tests/helpers/kernel_rule.py` says how far apart they
may be.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kernel_rule import check, check_loss
from torch import Tensor

from gptperf.kernels import reference
from gptperf.ops import OPS

__all__ = ["DEVICE", "EPS", "EVERY_LINE", "EVERY_OPTION", "HEADS", "IGNORE", "ONE_EACH", "ON_GPU", "PRECISIONS"]
__all__ += ["VARIANTS", "Case", "Result", "build", "case_of", "compare", "eager", "gradients_for", "kernel"]
__all__ += ["rope_case", "run", "truth", "verify"]

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

EPS = 1e-5
IGNORE = -100
HEADS = {"1": (1, 1), "3": (3, 3), "12": (12, 12), "7:1": (7, 1)}
"""Query heads and key heads."""
VARIANTS = {
    "rms_norm": "rms_norm",
    "rms_norm_add": "rms_norm",
    "layer_norm": "layer_norm",
    "layer_norm_nobias": "layer_norm",
    "layer_norm_add": "layer_norm",
    "layer_norm_add_nobias": "layer_norm",
    "rope": "rope",
    "rope_interleaved": "rope",
    "rope_qk_norm": "rope",
    "rope_qk_norm_interleaved": "rope",
    **{f"activation_{name}": "activation" for name in reference.ACTIVATIONS},
    "activation_gelu_linear": "activation",
    "activation_gelu_linear_bias": "activation",
    "activation_gelu_linear_kept": "activation",
    **dict.fromkeys(("swiglu", "swiglu_linear", "swiglu_linear_bias", "swiglu_linear_kept"), "swiglu"),
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy_capped": "linear_cross_entropy",
}
"""Variant -> op, which is the name of a public function in the module that `OPS` names, and in the reference."""
EVERY_LINE = ["rms_norm_add", "layer_norm", "layer_norm_add_nobias", "rope", "rope_qk_norm_interleaved", "swiglu"]
EVERY_LINE += ["activation_gelu", "swiglu_linear_bias", "linear_cross_entropy", "linear_cross_entropy_capped"]
"""Variants that together run every line of every kernel."""
EVERY_OPTION = ["rms_norm", "rms_norm_add", "layer_norm", "layer_norm_add_nobias", "rope_interleaved", "rope_qk_norm"]
EVERY_OPTION += ["swiglu", "swiglu_linear_bias", "activation_gelu", "activation_gelu_linear_bias"]
EVERY_OPTION += ["swiglu_linear_kept", "linear_cross_entropy", "linear_cross_entropy_capped"]
"""Variants that together call every public function with and without its options."""
ONE_EACH = ["rms_norm_add", "layer_norm_add", "rope_qk_norm", "swiglu", "swiglu_linear_bias"]
ONE_EACH += ["activation_gelu_linear_bias", "activation_gelu_linear_kept", "linear_cross_entropy"]
"""One variant of every autograd function."""
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "float16, weight float32": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, weight float32": (torch.bfloat16, torch.float32),
}
"""The dtype of the activation, and that of the weight if it differs. bfloat16 is for the GPU."""


@dataclass(frozen=True)
class Case:
    """The arguments of one call of an op."""

    variant: str
    tensors: dict[str, Tensor]
    """Arguments that get a gradient; the first is the activation."""
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return VARIANTS[self.variant]

    @property
    def activation(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def all_tensors(self) -> dict[str, Tensor]:
        """Every argument that is a tensor, by name."""
        return {k: x for k, x in {**self.tensors, **self.others}.items() if isinstance(x, Tensor)}

    @property
    def rows(self) -> int:
        """The number of rows that the gradient of a weight sums over."""
        x = self.activation
        per_row = max(self.others.get("n_head", 1), 1)  # a weight of the queries sums over heads too
        return x.numel() // max(x.shape[-1], 1) * per_row

    def having(self, **tensors: Any) -> "Case":
        """Returns the same case with other tensors or arguments."""
        mine = {name: x for name, x in tensors.items() if name in self.tensors}
        others = {name: x for name, x in tensors.items() if name not in self.tensors}
        return replace(self, tensors={**self.tensors, **mine}, others={**self.others, **others})


@dataclass(frozen=True)
class Result:
    """Outputs, and the gradient of every tensor of the case."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {**{f"output {i}": x for i, x in enumerate(self.outputs)}, **self.gradients}

    def same_bits(self, other: "Result") -> bool:
        """Whether all bits are equal, those of NaN included."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def eager(op: str) -> Callable[..., Any]:
    """Returns the eager function of an op."""
    return getattr(reference, op)


def kernel(op: str) -> Callable[..., Any]:
    """Returns the Triton function of an op."""
    return getattr(importlib.import_module(OPS[op]), op)


def build(
    variant: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    weight_dtype: torch.dtype | None = None,
    classes: int = 65,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Returns a case with normally distributed values.

    Args:
        variant: a key of `VARIANTS`.
        shape: rows (...) and columns N of the activation; for swiglu N is F of 2 F columns; for rope the rows are
            (B, T) and N, rounded up to an even number, is the head_dim of 3 heads.
        dtype, device: dtype and device of the activation.
        weight_dtype: dtype of the weights of norms and heads; default: dtype.
        classes: V of the cross-entropy.
        scale: factor of the activation.
        seed: seed of the values.
    """
    op = VARIANTS[variant]
    if op == "rope":
        rows = (1, *shape[:-1])[-2:]
        D = shape[-1] + shape[-1] % 2
        return rope_case(variant, rows, HEADS["3"], D, dtype, device, weight_dtype, scale, seed)  # type: ignore[arg-type]
    make = _maker(device, seed)
    N = shape[-1]
    if op in ("swiglu", "activation"):
        first, parts = ("gate_up", 2) if op == "swiglu" else ("x", 1)
        tensors = {first: make(*shape[:-1], parts * N).mul(scale).to(dtype)}
        if "_linear" in variant:
            tensors["weight"] = make(24, N).div(math.sqrt(max(N, 1))).to(dtype)
        if variant.endswith("_bias"):
            tensors["bias"] = make(24).to(dtype)
        name = variant.removeprefix("activation_").partition("_linear")[0]
        kept: dict[str, Any] = {"recompute": False} if variant.endswith("_kept") else {}
        return Case(variant, tensors, kept | ({"name": name} if op == "activation" else {}))
    x = make(*shape).mul(scale).to(dtype)
    if op == "linear_cross_entropy":
        targets = torch.randint(classes, shape[:-1], generator=torch.Generator().manual_seed(seed)).to(device)
        weight = make(classes, N).to(dtype)
        cap = {"softcap": 3.0} if variant.endswith("capped") else {}
        return Case(variant, {"x": x, "weight": weight}, {"targets": targets, "ignore_index": IGNORE, **cap})
    tensors = {"x": x, "weight": (1 + make(N) / 4).to(weight_dtype or dtype)}
    if op == "layer_norm" and not variant.endswith("nobias"):
        tensors["bias"] = make(N).to(weight_dtype or dtype)
    if "_add" in variant:
        tensors["residual"] = make(*shape).mul(scale).to(dtype)
    return Case(variant, tensors, {"eps": EPS})


def case_of(variant: str, shape: tuple[int, ...], precision: str = "float32", **how: Any) -> Case:
    """Returns `build` on the tests' device, in one of `PRECISIONS`."""
    dtype, weight_dtype = PRECISIONS[precision]
    weight_dtype = weight_dtype if VARIANTS[variant].endswith("_norm") or "qk_norm" in variant else None
    return build(variant, shape, dtype, DEVICE, weight_dtype=weight_dtype, **how)


def rope_case(
    variant: str,
    rows: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    weight_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Returns a case of rope with rows (B, T) and heads (H, K); the tables have two rows more than the sequence."""
    make = _maker(device, seed)
    H, K = heads
    tensors = {"qkv": make(*rows, (H + 2 * K) * head_dim).mul(scale).to(dtype)}
    if "qk_norm" in variant:
        for name in ("q_weight", "k_weight"):
            tensors[name] = (1 + make(head_dim) / 4).to(weight_dtype or dtype)
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    angles = torch.outer(torch.arange(rows[1] + 2, dtype=torch.float64), frequencies)
    others = {"cos": angles.cos().float().to(device), "sin": angles.sin().float().to(device), "n_head": H}
    return Case(variant, tensors, {**others, "n_kv_head": K, "eps": EPS, "interleaved": "interleaved" in variant})


def _maker(device: str, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def run(
    function: Callable[..., Any],
    case: Case,
    incoming: tuple[Tensor, ...] | None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> Result:
    """Calls a function with a case, and runs backward.

    Args:
        function: `eager(op)` or `kernel(op)`.
        case: the arguments; its tensors are not changed.
        incoming: one gradient for each output; None: `.sum().backward()`, whose gradients have stride 0.
        dtype: converts copies of the tensors and of the incoming gradients to this dtype first.
        autocast: dtype of autocast around the call; backward runs outside of it.
    """
    tensors = {name: (x.to(dtype) if dtype else x).detach().requires_grad_() for name, x in case.tensors.items()}
    with torch.autocast(case.activation.device.type, autocast, enabled=autocast is not None):
        outputs = function(**tensors, **case.others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if incoming is None:
        sum(y.sum() for y in outputs).backward()
    else:
        torch.autograd.backward(outputs, [g.to(dtype) if dtype else g for g in incoming])
    gradients = {name: x.grad for name, x in tensors.items()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"{case.variant}: no gradient of {missing}"
    return Result(tuple(y.detach() for y in outputs), gradients)  # type: ignore[arg-type]


def gradients_for(case: Case, seed: int = 1, autocast: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Returns normally distributed incoming gradients, one for each output of the case."""
    with torch.no_grad(), torch.autocast(case.activation.device.type, autocast, enabled=autocast is not None):
        outputs = eager(case.op)(**case.tensors, **case.others)
    make = _maker(str(case.activation.device), seed)
    return tuple(make(*y.shape).to(y.dtype) for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


def truth(case: Case, incoming: tuple[Tensor, ...] | None) -> Result:
    """Runs the eager reference in float64, but rounds the sum of x and the residual where the op rounds it."""
    function = _rounds_the_sum(case) if "residual" in case.tensors else eager(case.op)
    return run(function, case, incoming, torch.float64)


def _rounds_the_sum(case: Case) -> Callable[..., Any]:
    """Returns the eager function of a norm with the sum as an output in x's dtype; it normalises the rounded sum."""

    def function(residual: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        exact = arguments["x"] + residual
        rounding = (exact.detach().to(case.activation.dtype) - exact.detach()).double()
        x = exact + rounding  # straight through: the gradient is that of the sum
        return eager(case.op)(**{**arguments, "x": x}), exact

    return function


def compare(
    case: Case,
    incoming: tuple[Tensor, ...] | None,
    triton: Result,
    autocast: torch.dtype | None = None,
    truncates: bool = False,
) -> None:
    """Checks every output and gradient of a kernel by the rule.

    Args:
        case, incoming: the arguments of `run`.
        triton: the kernel's result.
        autocast: dtype of autocast around the kernel, and around eager.
        truncates: see `check`.
    """
    exact, unfused = truth(case, incoming), _plain(case, incoming, autocast)
    terms = _terms(case, incoming)
    accumulated = None
    if case.activation.dtype.itemsize < 4 and case.op != "linear_cross_entropy" and not autocast:
        accumulated = run(eager(case.op), case, incoming, torch.float32)
    for name, found in triton.tensors().items():
        label = f"{case.variant} {tuple(case.activation.shape)} {case.activation.dtype}: {name}"
        e, r = unfused.tensors()[name], exact.tensors()[name]
        if case.op == "linear_cross_entropy" and name == "output 0":
            check_loss(label, found, e, r, _logits(case), autocast or case.activation.dtype)
            continue
        column = "weight" in name or "bias" in name
        pure = column and accumulated is not None and (case.op not in ("swiglu", "activation") or name == "bias")
        check(
            label,
            found,
            e,
            r,
            autocast,
            kind="column" if column else "output",
            rows=max(case.rows, 1),
            terms=terms.get(name, 0.0),
            eager_accumulated=accumulated.gradients[name].to(e.dtype) if pure and accumulated else None,
            truncates=truncates,
        )


def _logits(case: Case) -> Tensor:
    """Returns the logits of the rows whose target counts, in float64."""
    x, weight, targets = case.tensors["x"].double(), case.tensors["weight"].double(), case.others["targets"]
    return (x @ weight.T).reshape(-1, weight.shape[0])[targets.flatten() != case.others["ignore_index"]]


def verify(
    case: Case,
    incoming: tuple[Tensor, ...] | None = None,
    ones: bool = False,
    autocast: torch.dtype | None = None,
    truncates: bool = False,
) -> Result:
    """Runs a case with its kernel and compares.

    Args:
        case: the case.
        incoming: gradients of the outputs; default: normally distributed ones.
        ones: `.sum().backward()` instead.
        autocast, truncates: see `compare`.

    Returns:
        The kernel's result.
    """
    incoming = None if ones else incoming or gradients_for(case, autocast=autocast)
    triton = run(kernel(case.op), case, incoming, autocast=autocast)
    compare(case, incoming, triton, autocast, truncates)
    return triton


def _plain(case: Case, incoming: tuple[Tensor, ...] | None, autocast: torch.dtype | None = None) -> Result:
    """Runs eager PyTorch, whose matrix products are summed in float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        return run(eager(case.op), case, incoming, autocast=autocast)
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def _terms(case: Case, incoming: tuple[Tensor, ...] | None) -> dict[str, float]:
    """Returns, for each result that is a small difference of large terms, the magnitude of the terms."""
    tensors = {name: x.detach().double() for name, x in case.tensors.items()}
    x = next(iter(tensors.values()))
    if not x.numel():
        return {}
    gradient = 1.0 if incoming is None else _magnitude(incoming[0])
    if case.op == "linear_cross_entropy":
        count = max(int((case.others["targets"] != case.others["ignore_index"]).sum()), 1)
        each = gradient / count
        return {"x": each * _magnitude(tensors["weight"]), "weight": each * math.sqrt(count) * _magnitude(x)}
    if case.op in ("rms_norm", "layer_norm"):
        x = x + tensors["residual"] if "residual" in tensors else x
        center = x.mean(-1, keepdim=True) if case.op == "layer_norm" else 0.0
        rstd = ((x - center).square().mean(-1, keepdim=True) + EPS).rsqrt()
        each = gradient * _magnitude(rstd) * _magnitude(tensors["weight"])
        if case.op == "rms_norm":
            return {"x": each, "residual": each}
        h = 2 * _magnitude(x * rstd)  # the mean is rounded twice, as a sum and as a quotient
        columns = gradient * h * math.sqrt(case.rows)
        return {"output 0": h * _magnitude(tensors["weight"]), "x": each * h, "residual": each * h, "weight": columns}
    if "qk_norm" in case.variant:
        D = case.tensors["q_weight"].numel()
        heads = x.unflatten(-1, (-1, D))
        rstd = (heads.square().mean(-1) + EPS).rsqrt()
        largest = max(_magnitude(tensors["q_weight"]), _magnitude(tensors["k_weight"]))
        return {
            "qkv": max(1.0 if incoming is None else _magnitude(g) for g in (incoming or [x]))
            * _magnitude(rstd)
            * largest
        }
    return {}


def _magnitude(x: Tensor) -> float:
    x = x.abs()
    return float(x[x.isfinite()].max()) if x.isfinite().any() else 0.0
