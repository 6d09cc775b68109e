"""The arguments that kernels and reference refuse, the messages, and the cases that eager PyTorch handles."""

import re
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    IGNORE,
    ON_GPU,
    ONE_EACH,
    build,
    case_of,
    eager,
    gradients_for,
    kernel,
    run,
)
from torch import Tensor


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
    _wrong("rope", r"3 query heads and 2 key heads", n_kv_head=2),
    _wrong("rope", r"heads", n_head=0),
    _wrong("rope", r"cos \(2, 9\).* wanted \(3, 9\)", cos=_zeros(2, 9)),
    _wrong("rope", r"sin \(5, 18\).* wanted \(3, 9\)", sin=_zeros(5, 18)),
    _wrong("rope", r"cos \(5, 9\) and sin \(4, 9\)", sin=_zeros(4, 9)),
    _wrong("rope", r"float64.* wanted .*float32", cos=_zeros(5, 9).double()),
    _wrong("rope", r"one of q_weight and k_weight", q_weight=_zeros(18)),
    _wrong("rope_qk_norm", r"k_weight \(17,\).* wanted \(18,\)", k_weight=_zeros(17)),
    _wrong("activation_gelu", r"'geluu'.* wanted one of gelu, ", name="geluu"),
    _wrong("activation_gelu", r"int32", x=_zeros(2, 18).int()),
    _wrong("activation_gelu", r"bias without a weight", bias=_zeros(4)),
    _wrong("activation_gelu_linear", r"weight \(24, 36\).* wanted \(C, 18\)", weight=_zeros(24, 36)),
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
    case = case_of(variant, (2, 3, 18))
    with pytest.raises(ValueError, match=words) as caught:
        implementation(case.op)(**{**case.tensors, **case.others, **changes})
    assert re.match(rf"{case.op}: found .*(wanted|without)", str(caught.value))


@pytest.mark.parametrize("implementation", [eager, kernel], ids=["eager", "triton"])
@pytest.mark.parametrize("target", [65, -1, 2**40, -(2**40)])
def test_targets_out_of_range(implementation: Any, target: int) -> None:
    """A mistake that the CPU sees; on a GPU, where seeing it means waiting, the loss is NaN."""
    case = case_of("linear_cross_entropy", (2, 3, 18))
    case.others["targets"][1, 1] = target
    if not ON_GPU:
        with pytest.raises(ValueError, match=rf"target {target}, wanted 0 to 64 or ignore_index = {IGNORE}"):
            implementation(case.op)(**case.tensors, **case.others)
        return
    assert implementation(case.op)(**case.tensors, **case.others).isnan()
    torch.cuda.synchronize()


@pytest.mark.parametrize("variant", ONE_EACH)
def test_float64_is_not_for_triton(variant: str) -> None:
    case = case_of(variant, (2, 3, 18))
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
    case = case_of(variant, (2, 3, 18))
    arguments = {**case.tensors, **case.others}
    for name, x in list(arguments.items())[1:]:
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match=rf"{case.op}: found {name} .* on cpu, wanted .* on cuda:0"):
                implementation(case.op)(**{**arguments, name: x.cpu()})


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_rows_too_wide_run_in_eager_and_say_so_once(op: str) -> None:
    N = 16386 if op == "rms_norm" else 16388  # said once a width
    case = case_of(op, (2, N))
    incoming = gradients_for(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(kernel(op), case, incoming) for _ in range(3)]
    assert [str(w.message) for w in caught if op in str(w.message)] == [str(caught[0].message)]
    assert re.search(rf"{N}.*16384.*eager", str(caught[0].message))
    assert results[0].same_bits(run(eager(op), case, incoming))


@pytest.mark.parametrize("variant", ["swiglu_linear", "activation_gelu_linear_bias"])
def test_a_gradient_of_the_projections_gradient_is_refused(variant: str) -> None:
    """It would leave out the product's own gradient."""
    case = case_of(variant, (3, 18))
    tensors = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    loss = kernel(case.op)(**tensors, **case.others).square().sum()
    [gradient] = torch.autograd.grad(loss, [tensors["weight"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_the_losss_scale_does_not_follow_the_default_dtype() -> None:
    case = case_of("linear_cross_entropy", (50, 16))
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
