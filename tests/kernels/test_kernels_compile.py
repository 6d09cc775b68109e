"""Kernels inside PyTorch: registration, torch.compile, autocast, frozen tensors, memory; and what they refuse."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import (
    IGNORE,
    VARIANTS,
    Case,
    Result,
    build,
    eager,
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
from torch.utils.checkpoint import checkpoint

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = "inductor" if ON_GPU else "aot_eager"
LOW = torch.bfloat16 if ON_GPU else torch.float16
ONE_EACH = ["rms_norm_add", "layer_norm_add", "rope_qk_norm", "swiglu", "swiglu_linear_bias", "linear_cross_entropy"]
ARGUMENTS = {
    "rms_norm": ("x", "residual", "weight", "eps"),
    "layer_norm": ("x", "residual", "weight", "bias", "eps"),
    "rope": ("qkv", "cos", "sin", "n_head", "n_kv_head", "q_weight", "k_weight", "eps", "interleaved"),
    "swiglu": ("gate_up",),
    "linear_cross_entropy": ("x", "weight", "targets", "ignore_index", "needs_x", "needs_weight"),
}
"""Of the registered ops, in their order; an argument that a case has not is None."""
SOME = ["rms_norm", "rms_norm_add", "layer_norm", "layer_norm_add_nobias", "rope_interleaved", "rope_qk_norm", "swiglu"]
SOME += ["swiglu_linear_bias", "linear_cross_entropy"]
"""Variants that have every public function with and without its options."""


def case_of(variant: str, *shape: int, dtype: torch.dtype = torch.float32, **how: Any) -> Case:
    return build(variant, shape, dtype, DEVICE, **how)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# Registration


REGISTERED = [v for v in VARIANTS if not v.startswith("swiglu_linear")]


@pytest.mark.parametrize(
    ("variant", "gradient"), [*((v, True) for v in REGISTERED), *((v, False) for v in ONE_EACH if v in REGISTERED)]
)
def test_opcheck(variant: str, gradient: bool) -> None:
    case = case_of(variant, 2, 3, 18)
    values = {**case.others, **{k: x.clone().requires_grad_(gradient) for k, x in case.tensors.items()}}
    values |= {"needs_x": gradient, "needs_weight": gradient}
    if case.op == "linear_cross_entropy":
        values |= {"x": values["x"].detach().flatten(0, 1).requires_grad_(gradient)}
        values |= {"targets": values["targets"].flatten()}
    kernel(case.op)  # registers it
    arguments = tuple(values.get(name) for name in ARGUMENTS[case.op])
    torch.library.opcheck(getattr(torch.ops.gptperf, case.op).default, arguments)


class Calls(TorchDispatchMode):
    """The arguments of every call of a gptperf op."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "gptperf":
            self.arguments[op] = args
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", SOME)
def test_opcheck_of_backward(variant: str) -> None:
    """With the arguments that a backward really hands over."""
    case = case_of(variant, 2, 3, 18)
    with Calls() as calls:
        run(kernel(case.op), case, gradients_for(case))
    [(op, arguments)] = [(op, args) for op, args in calls.arguments.items() if "backward" in op.name()]
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


# torch.compile


@pytest.mark.parametrize("variant", SOME)
def test_compiled_is_the_same(variant: str) -> None:
    """One graph, the same bits, and no more than two recompilations for four numbers of rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)
    function = kernel(VARIANTS[variant])
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (3, 7, 12, 33):
        case = case_of(variant, 2, rows, 18)
        incoming = gradients_for(case)
        found, plain = run(compiled, case, incoming), run(function, case, incoming)
        if variant == "swiglu_linear_bias" and ON_GPU:  # Inductor's own sum of the incoming gradient
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
    case = case_of(variant, 2, 3, 18)
    incoming = gradients_for(case, autocast=LOW)
    found = run(torch.compile(function, fullgraph=True, backend=BACKEND), case, incoming, autocast=LOW)
    plain = run(function, case, incoming, autocast=LOW)
    if variant == "swiglu_linear_bias" and ON_GPU:
        check_close("bias", found.gradients.pop("bias").to(LOW), plain.gradients.pop("bias").to(LOW))
    assert found.same_bits(plain)


# Autocast


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])], ids=str)
@pytest.mark.parametrize("activation", ["as the weights", "low"])
@pytest.mark.parametrize("variant", ONE_EACH)
def test_autocast_is_as_in_eager(variant: str, activation: str, dtype: torch.dtype) -> None:
    """Dtypes and values, from float32 weights and activations in float32 or in the dtype of autocast."""
    case = case_of(variant, 2, 3, 34, scale=0.2 if variant == "linear_cross_entropy" else 1.0)
    if activation == "low":
        low = ("x", "residual", "qkv", "gate_up")
        case = case.having(**{name: x.to(dtype) for name, x in case.tensors.items() if name in low})
    verify(case, autocast=dtype)


# Gradients that nobody asks for


@pytest.mark.parametrize("variant", SOME)
def test_without_gradients(variant: str) -> None:
    case = case_of(variant, 2, 3, 18)
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


@pytest.mark.parametrize("variant", SOME)
def test_frozen_tensors(variant: str) -> None:
    """The gradient of each tensor alone is the one that it has among the others."""
    case = case_of(variant, 2, 3, 18)
    incoming = gradients_for(case)
    wanted = run(kernel(case.op), case, incoming).gradients
    for name in case.tensors:
        leaves = {k: x.detach().requires_grad_(k == name) for k, x in case.tensors.items()}
        outputs = _tuple(kernel(case.op)(**leaves, **case.others))
        pairs = [(y, g) for y, g in zip(outputs, incoming, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        assert torch.equal(leaves[name].grad, wanted[name]), name  # type: ignore[arg-type]
        assert all(x.grad is None for k, x in leaves.items() if k != name)


@pytest.mark.parametrize("variant", ["rms_norm_add", "layer_norm_add", "rope_qk_norm"])
def test_outputs_that_nobody_uses(variant: str) -> None:
    """Have a gradient of 0."""
    case = case_of(variant, 2, 3, 18)
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
    case = case_of(variant, 2, 3, 18)
    incoming = gradients_for(case)

    def function(**arguments: Any) -> Any:
        return checkpoint(kernel(case.op), use_reentrant=False, **arguments)

    assert run(function, case, incoming).same_bits(run(kernel(case.op), case, incoming))


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_residual_may_be_x(op: str) -> None:
    case = case_of(f"{op}_add", 2, 3, 18)
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
    result = run(kernel(op), case := case_of(f"{op}_add", 2, 3, 18), gradients_for(case))
    before = result.gradients["x"].clone()
    result.gradients["residual"].zero_()
    assert torch.equal(result.gradients["x"], before)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_a_gradient_of_a_gradient_is_not_silently_wrong(variant: str) -> None:
    """PyTorch has no formula for it: it raises, or warns that a part is missing."""
    case = case_of(variant, 2, 3, 18)
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


# Memory


class Poison:
    """Stands in for torch.empty and its like: memory full of NaN, with a guard of NaN on both sides."""

    GUARD = 128

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.empty = torch.empty
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, self.poisoned(getattr(owner, name)))

    def poisoned(self, function: Any) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Tensor:
            like = function(*args, **kwargs)
            if like.device.type == "meta" or not like.is_floating_point():
                return like
            span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
            buffer = self.empty(span + 2 * self.GUARD, dtype=like.dtype, device=like.device).fill_(math.nan)
            self.buffers.append((buffer, span))
            return buffer.as_strided(like.shape, like.stride(), self.GUARD)

        return replacement

    def untouched(self) -> bool:
        g = self.GUARD
        return all(buffer[:g].isnan().all() and buffer[g + span :].isnan().all() for buffer, span in self.buffers)


@pytest.mark.parametrize("variant", SOME)
@pytest.mark.parametrize("shape", [(7, 65), (0, 65)], ids=str)
def test_new_memory_is_written_before_it_is_read(
    variant: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written beside it."""
    case = case_of(variant, *shape)
    incoming = gradients_for(case)
    clean = run(kernel(case.op), case, incoming)
    with monkeypatch.context() as patch:
        poison = Poison(patch)
        found = run(kernel(case.op), case, incoming)
        assert poison.buffers
    assert not any(x.isnan().any() for x in found.tensors().values())
    assert found.same_bits(clean)
    assert poison.untouched()


# Mistakes of the caller


def _wrong(variant: str, words: str, **changes: Any) -> Any:
    return pytest.param(variant, words, changes, id=f"{variant}: {', '.join(changes)}: {words}")


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


WRONG = [
    *(_wrong(v, r"weight \(19,\).* wanted \(18,\)", weight=_zeros(19)) for v in ("rms_norm", "layer_norm_add")),
    *(_wrong(v, r"weight \(18, 1\)", weight=_zeros(18, 1)) for v in ("rms_norm", "layer_norm")),
    *(_wrong(v, r"float64.* wanted \(18,\)", weight=_zeros(18).double()) for v in ("rms_norm", "layer_norm")),
    *(_wrong(v, r"float16.* wanted \(18,\)", weight=_zeros(18).half()) for v in ("rms_norm", "layer_norm")),
    *(_wrong(v, r"int32.* wanted", x=_zeros(2, 3, 18).int()) for v in ("rms_norm", "layer_norm")),
    *(_wrong(v, r"residual \(3, 18\).* wanted \(2, 3, 18\)", residual=_zeros(3, 18)) for v in ("rms_norm_add",)),
    *(_wrong(v, r"float16.* wanted .*float32", residual=_zeros(2, 3, 18).half()) for v in ("layer_norm_add",)),
    _wrong("layer_norm", r"bias \(1,\).* wanted \(18,\)", bias=_zeros(1)),
    _wrong("rope", r"odd|head_dim 17.* even", qkv=_zeros(2, 3, 153)),
    _wrong("rope", r"width 161.* 9 heads", qkv=_zeros(2, 3, 161)),
    _wrong("rope", r"qkv \(3, 162\).* wanted \(B, T", qkv=_zeros(3, 162)),
    _wrong("rope", r"int64", qkv=_zeros(2, 3, 162).long()),
    _wrong("rope", r"3 heads and 2|width", n_kv_head=2),
    _wrong("rope", r"heads", n_head=0),
    _wrong("rope", r"cos \(2, 9\).* wanted \(3, 9\)", cos=_zeros(2, 9)),
    _wrong("rope", r"sin \(5, 18\).* wanted \(3, 9\)", sin=_zeros(5, 18)),
    _wrong("rope", r"cos \(5, 9\) and sin \(4, 9\)", sin=_zeros(4, 9)),
    _wrong("rope", r"float64.* wanted .*float32", cos=_zeros(5, 9).double()),
    _wrong("rope", r"one of q_weight and k_weight", q_weight=_zeros(18)),
    _wrong("rope_qk_norm", r"k_weight \(17,\).* wanted \(18,\)", k_weight=_zeros(17)),
    _wrong("swiglu", r"last dimension of 35.* even", gate_up=_zeros(2, 35)),
    _wrong("swiglu", r"int32", gate_up=_zeros(2, 36).int()),
    _wrong("swiglu", r"bias without a weight", bias=_zeros(4)),
    _wrong("swiglu_linear", r"weight \(24, 36\).* wanted \(C, 18\)", weight=_zeros(24, 36)),
    _wrong("swiglu_linear", r"float16.* wanted .*float32", weight=_zeros(24, 18).half()),
    _wrong("swiglu_linear_bias", r"bias \(23,\).* wanted \(24,\)", bias=_zeros(23)),
    _wrong("swiglu_linear_bias", r"float16.* wanted .*float32", bias=_zeros(24).half()),
    _wrong("linear_cross_entropy", r"weight \(65, 17\).* wanted \(V, 18\)", weight=_zeros(65, 17)),
    _wrong("linear_cross_entropy", r"weight \(0, 18\)", weight=_zeros(0, 18)),
    _wrong("linear_cross_entropy", r"float16.* wanted .*float32", weight=_zeros(65, 18).half()),
    _wrong("linear_cross_entropy", r"int64.* wanted", x=_zeros(2, 3, 18).long()),
    _wrong("linear_cross_entropy", r"targets \(2, 4\).* wanted \(2, 3\)", targets=_zeros(2, 4).long()),
    _wrong("linear_cross_entropy", r"int32.* wanted .*int64", targets=_zeros(2, 3).int()),
]


@pytest.mark.parametrize("implementation", [eager, kernel], ids=["eager", "triton"])
@pytest.mark.parametrize(("variant", "words", "changes"), WRONG)
def test_wrong_arguments(variant: str, words: str, changes: dict[str, Any], implementation: Any) -> None:
    case = case_of(variant, 2, 3, 18)
    with pytest.raises(ValueError, match=words) as caught:
        implementation(case.op)(**{**case.tensors, **case.others, **changes})
    assert re.match(rf"{case.op}: found .*(wanted|without)", str(caught.value))


@pytest.mark.parametrize("implementation", [eager, kernel], ids=["eager", "triton"])
@pytest.mark.parametrize("target", [65, -1, 2**40, -(2**40)])
def test_targets_out_of_range(implementation: Any, target: int) -> None:
    """A mistake that the CPU sees; on a GPU, where seeing it means waiting, the loss is NaN."""
    case = case_of("linear_cross_entropy", 2, 3, 18)
    case.others["targets"][1, 1] = target
    if not ON_GPU:
        with pytest.raises(ValueError, match=rf"target {target}, wanted 0 to 64 or ignore_index = {IGNORE}"):
            implementation(case.op)(**case.tensors, **case.others)
        return
    assert implementation(case.op)(**case.tensors, **case.others).isnan()
    torch.cuda.synchronize()


@pytest.mark.parametrize("variant", ONE_EACH)
def test_float64_is_not_for_triton(variant: str) -> None:
    case = case_of(variant, 2, 3, 18)
    doubles = {name: x.double() for name, x in case.tensors.items()}
    with pytest.raises(ValueError, match=rf"{case.op}: found torch.float64, wanted float32"):
        kernel(case.op)(**doubles, **case.others)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_tensors_on_the_cpu_are_not_for_triton(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    case = build(variant, (2, 3, 18))
    with pytest.raises(ValueError, match=rf"{case.op}: found a tensor on cpu, wanted one on a CUDA GPU"):
        kernel(case.op)(**case.tensors, **case.others)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [eager, kernel], ids=["eager", "triton"])
@pytest.mark.parametrize("variant", ONE_EACH)
def test_another_device(variant: str, implementation: Any) -> None:
    case = case_of(variant, 2, 3, 18)
    arguments = {**case.tensors, **case.others}
    for name, x in list(arguments.items())[1:]:
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match=rf"{case.op}: found {name} .* on cpu, wanted .* on cuda:0"):
                implementation(case.op)(**{**arguments, name: x.cpu()})


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_rows_too_wide_run_in_eager_and_say_so_once(op: str) -> None:
    N = 16386 if op == "rms_norm" else 16388  # said once a width
    case = case_of(op, 2, N)
    incoming = gradients_for(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(kernel(op), case, incoming) for _ in range(3)]
    assert [str(w.message) for w in caught if op in str(w.message)] == [str(caught[0].message)]
    assert re.search(rf"{N}.*16384.*eager", str(caught[0].message))
    assert results[0].same_bits(run(eager(op), case, incoming))


@pytest.mark.parametrize("variant", ["swiglu_linear", "swiglu_linear_bias"])
def test_a_gradient_of_the_projections_gradient_is_refused(variant: str) -> None:
    """It would leave out the product's own gradient."""
    case = case_of(variant, 3, 18)
    tensors = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    loss = kernel(case.op)(**tensors, **case.others).square().sum()
    [gradient] = torch.autograd.grad(loss, [tensors["weight"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_the_losss_scale_does_not_follow_the_default_dtype() -> None:
    case = case_of("linear_cross_entropy", 50, 16)
    plain = run(kernel(case.op), case, None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert run(kernel(case.op), case, None).same_bits(plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_too_wide_compile_in_one_graph() -> None:
    x, weight = torch.randn(2, 16400, device=DEVICE), torch.ones(16400, device=DEVICE)
    compiled = torch.compile(kernel("rms_norm"), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, weight), eager("rms_norm")(x, weight))
