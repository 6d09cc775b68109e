"""Inputs of every op for the tests of kernels: variants, sizes, layouts, values; and how one case is run and compared.

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

__all__ = ["EPS", "LAYOUTS", "VARIANTS", "Case", "Result", "build", "compare", "gradients_for", "kernel", "laid_out"]
__all__ += ["HEADS", "IGNORE", "eager", "rope_case", "run", "truth", "verify"]

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
    "swiglu": "swiglu",
    "swiglu_linear": "swiglu",
    "swiglu_linear_bias": "swiglu",
    "linear_cross_entropy": "linear_cross_entropy",
}
"""Variant -> op, which is the name of a public function in `gptperf.kernels.<op>` and in the reference."""


@dataclass(frozen=True)
class Case:
    """One call of an op."""

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

    @property
    def rows(self) -> int:
        """Rows that a gradient of a weight sums over."""
        x = self.activation
        per_row = max(self.others.get("n_head", 1), 1)  # a weight of the queries sums over heads too
        return x.numel() // max(x.shape[-1], 1) * per_row

    def having(self, **tensors: Any) -> "Case":
        """The same with other tensors or arguments."""
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
        """NaN equal to NaN."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def eager(op: str) -> Callable[..., Any]:
    """The eager function of an op."""
    return getattr(reference, op)


def kernel(op: str) -> Callable[..., Any]:
    """The Triton function of an op."""
    return getattr(importlib.import_module(f"gptperf.kernels.{op}"), op)


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
    """A case with normal values.

    Args:
        variant: of `VARIANTS`.
        shape: rows (...) and columns N of the activation; for swiglu F of 2 F columns, for rope (B, T) and the head_dim
            of 3 heads, rounded up to an even one.
        dtype, device: of the activation.
        weight_dtype: of the weights of norms and heads; dtype unless given.
        classes: V of the cross-entropy.
        scale: of the activation.
        seed: of the values.
    """
    op = VARIANTS[variant]
    if op == "rope":
        rows = (1, *shape[:-1])[-2:]
        D = shape[-1] + shape[-1] % 2
        return rope_case(variant, rows, HEADS["3"], D, dtype, device, weight_dtype, scale, seed)  # type: ignore[arg-type]
    make = _maker(device, seed)
    N = shape[-1]
    if op == "swiglu":
        x = make(*shape[:-1], 2 * N).mul(scale).to(dtype)
        tensors = {"gate_up": x}
        if variant != "swiglu":
            tensors["weight"] = make(24, N).div(math.sqrt(max(N, 1))).to(dtype)
        if variant == "swiglu_linear_bias":
            tensors["bias"] = make(24).to(dtype)
        return Case(variant, tensors)
    x = make(*shape).mul(scale).to(dtype)
    if op == "linear_cross_entropy":
        targets = torch.randint(classes, shape[:-1], generator=torch.Generator().manual_seed(seed)).to(device)
        weight = make(classes, N).to(dtype)
        return Case(variant, {"x": x, "weight": weight}, {"targets": targets, "ignore_index": IGNORE})
    tensors = {"x": x, "weight": (1 + make(N) / 4).to(weight_dtype or dtype)}
    if op == "layer_norm" and not variant.endswith("nobias"):
        tensors["bias"] = make(N).to(weight_dtype or dtype)
    if "_add" in variant:
        tensors["residual"] = make(*shape).mul(scale).to(dtype)
    return Case(variant, tensors, {"eps": EPS})


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
    """A case of rope: rows are (B, T), heads (H, K); the tables have two rows more than the sequence."""
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
    """Call, then backward from the incoming gradients (None: sum of everything, whose gradients have stride 0).

    Args:
        function: `eager(op)` or `kernel(op)`.
        case: what to call it with; its tensors stay as they are.
        incoming: one gradient an output.
        dtype: of copies of the tensors and the incoming gradients, if not their own.
        autocast: dtype of autocast around the call, backward is outside.
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
    """Normal incoming gradients, one an output of the case."""
    with torch.no_grad(), torch.autocast(case.activation.device.type, autocast, enabled=autocast is not None):
        outputs = eager(case.op)(**case.tensors, **case.others)
    make = _maker(str(case.activation.device), seed)
    return tuple(make(*y.shape).to(y.dtype) for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


def truth(case: Case, incoming: tuple[Tensor, ...] | None) -> Result:
    """The eager reference in float64. Where the op itself rounds the sum of x and the residual, so does the truth."""
    function = _rounds_the_sum(case) if "residual" in case.tensors else eager(case.op)
    return run(function, case, incoming, torch.float64)


def _rounds_the_sum(case: Case) -> Callable[..., Any]:
    """The sum is an output of its own, in x's dtype, and the norm is that of what is stored."""

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
    """Every output and gradient of a kernel by the rule.

    Args:
        case, incoming: what the kernel was run with; incoming None: `.sum().backward()`.
        triton: its result.
        autocast: dtype of autocast around it, and around eager.
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
        pure = column and accumulated is not None and (case.op != "swiglu" or name == "bias")
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
    """Of the rows whose target counts, in float64."""
    x, weight, targets = case.tensors["x"].double(), case.tensors["weight"].double(), case.others["targets"]
    return (x @ weight.T).reshape(-1, weight.shape[0])[targets.flatten() != case.others["ignore_index"]]


def verify(
    case: Case,
    incoming: tuple[Tensor, ...] | None = None,
    ones: bool = False,
    autocast: torch.dtype | None = None,
    truncates: bool = False,
) -> Result:
    """Run a case with its kernel and compare.

    Args:
        case: what to run.
        incoming: gradients of the outputs; normal ones unless given.
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
    """Eager PyTorch, its products added up in float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        return run(eager(case.op), case, incoming, autocast=autocast)
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def _terms(case: Case, incoming: tuple[Tensor, ...] | None) -> dict[str, float]:
    """Result -> magnitude of the terms whose difference it is; a result that is missing is no small difference."""
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


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)[:, ::2]


def _column_slice(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _offset(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 1,), math.nan)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def _odd_strides(x: Tensor) -> Tensor:
    return x[:1].contiguous().as_strided((1, *x.shape[1:]), (3, x.shape[-1], 1))


def _channels_last(x: Tensor) -> Tensor:
    four = x.expand(3, *x.shape) + torch.arange(3.0, device=x.device, dtype=x.dtype).view(3, 1, 1, 1)
    return four.contiguous(memory_format=torch.channels_last)


def _packed(x: Tensor) -> Tensor:
    return torch.stack([x, -x, x / 2], dim=2).unbind(2)[1]


def _overlapping(x: Tensor) -> Tensor:
    B, T, N = x.shape
    return x.flatten()[: N + B * T].clone().as_strided((B, T, N), (T, 1, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "every other row": _every_other_row,
    "column slice": _column_slice,
    "offset storage": _offset,
    "stride 0": lambda x: x[:1, :1, :1].expand(x.shape),
    "broadcast batch": lambda x: x[:1].expand(x.shape),
    "channels last": _channels_last,
    "size 1, odd strides": _odd_strides,
    "packed qkv": _packed,
    "overlapping rows": _overlapping,
    "DTensor local": lambda x: _dtensor_local(x),
}
"""Name -> a tensor that lies like that, made from a contiguous `(B, T, N)` one; values and shape may change."""


def laid_out(name: str, x: Tensor) -> Tensor:
    """`x` in the layout of that name, which is really another one than contiguous where it says so."""
    y = LAYOUTS[name](x)
    assert name in ("contiguous", "offset storage", "size 1, odd strides", "DTensor local") or not y.is_contiguous()
    return y


def _dtensor_local(x: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(x.device.type, (1,))
    return distribute_tensor(x, mesh, [Shard(0)]).to_local()
