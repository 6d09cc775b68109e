"""Every kernel against eager PyTorch and float64: memory layouts, and values at the limits of the dtypes."""

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EVERY_LINE,
    IGNORE,
    ON_GPU,
    PRECISIONS,
    VARIANTS,
    Case,
    case_of,
    eager,
    gradients_for,
    kernel,
    run,
    truth,
    verify,
)
from kernel_layouts import LAYOUTS, laid_out
from kernel_rule import PROBABILITIES, check, check_target_gradient

from gptperf.kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""NumPy, which runs Triton's interpreter, warns of what these values are meant to do."""


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of one, for DTensor."""
    backend = "nccl" if ON_GPU else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", EVERY_LINE)
def test_layouts(variant: str, layout: str, one_process: None) -> None:
    """The activation, the residual and the incoming gradients have the layout."""
    if VARIANTS[variant] == "rope" and layout == "channels last":
        pytest.skip("rope takes three dimensions")
    flat = case_of(variant, (2, 3, 34))
    x = laid_out(layout, flat.activation)
    case = case_of(variant, (*x.shape[:-1], 34)).having(**{next(iter(flat.tensors)): x})
    if "residual" in flat.tensors:
        case = case.having(residual=laid_out(layout, flat.tensors["residual"]))
    incoming = gradients_for(case)
    if case.op != "linear_cross_entropy":
        pairs = zip(gradients_for(flat), incoming, strict=True)
        incoming = tuple(laid_out(layout, g.flatten(2)).unflatten(-1, y.shape[x.dim() - 1 :]) for g, y in pairs)
    verify(case, incoming)


@pytest.mark.parametrize("variant", EVERY_LINE)
def test_sum_of_the_outputs(variant: str) -> None:
    """`.sum().backward()` hands in gradients of stride 0."""
    verify(case_of(variant, (2, 3, 34)), ones=True)


@pytest.mark.parametrize("variant", [v for v in EVERY_LINE if VARIANTS[v] != "activation" and v != "swiglu"])
def test_strided_weights_tables_and_targets(variant: str) -> None:
    case = case_of(variant, (7, 66))
    spread = {
        k: torch.stack([x, x.flip(0)], -1)[..., 0] for k, x in case.all_tensors().items() if k not in ("x", "qkv")
    }
    assert not any(x.is_contiguous() for x in spread.values())
    verify(case.having(**spread))


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_of_float16(name: str) -> None:
    """One rounding, and a relative error below 1e-4, even where GELU's value is a small part of x."""
    every = torch.arange(-(2**15), 2**15, 5, device=DEVICE).short().view(torch.float16)
    every = every[every.isfinite() & (every.abs() < 200)]
    case = Case(f"activation_{name}", {"x": every}, {"name": name})
    found, exact = run(kernel("activation"), case, None), truth(case, None)
    off, wanted = (found.outputs[0].double() - exact.outputs[0]).abs(), exact.outputs[0].abs()
    rounding = 2**-11 * wanted + 2**-25  # the second term: the spacing of the smallest numbers
    assert (off <= 1.001 * rounding + 1e-4 * wanted).all()
    off, wanted = (found.gradients["x"].double() - exact.gradients["x"]).abs(), exact.gradients["x"].abs()
    assert (off <= 2**-11 * wanted + 2**-25 + 1e-5).all()


VALUES = ["x 1e-4", "x 1e4", "denormal", "equal", "equal in a row", "around 1e4", "zero"]


@pytest.mark.parametrize("values", [*VALUES, "x 1e4, float16", "denormal, float16"])
@pytest.mark.parametrize("variant", [v for v in EVERY_LINE if v != "rope"])
def test_values(variant: str, values: str) -> None:
    values, _, precision = values.partition(", ")
    case = case_of(variant, (4, 33), precision or "float32")
    x = case.activation
    changed = {
        "x 1e-4": x * 1e-4,
        "x 1e4": x * 1e4,
        "denormal": x * torch.finfo(x.dtype).smallest_normal,
        "equal": torch.full_like(x, 3.7),
        "equal in a row": x[..., :1].expand(x.shape),
        "around 1e4": x * 10 + 1e4,
        "zero": torch.zeros_like(x),
    }
    case = case.having(**{next(iter(case.tensors)): changed[values]})
    if "residual" in case.tensors and values != "x 1e-4":
        case = case.having(residual=torch.zeros_like(x))
    verify(case)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.startswith("activation") or (v in EVERY_LINE and "cross_entropy" not in v)]
)
def test_what_is_not_finite_stays_in_its_row(variant: str, bad: float) -> None:
    """Where in that row NaN stands depends on the formula, as eager's does on the device."""
    case = case_of(variant, (1, 7, 34))
    incoming = gradients_for(case)
    good = run(kernel(case.op), case, incoming)
    case.activation[0, 3, 5] = bad
    exact = torch.float64 if case.op == "activation" else None  # PyTorch's GELU in float32 on a CPU is NaN at infinity
    found, wanted = run(kernel(case.op), case, incoming), run(eager(case.op), case, incoming, exact)
    for y, e in zip(found.outputs, wanted.outputs, strict=True):
        for found_in, wanted_in in ((y.isnan(), e.isnan()), (y.isinf(), e.isinf())):
            assert torch.equal(found_in.flatten(2).any(-1), wanted_in.flatten(2).any(-1))
    others = [0, 1, 2, 4, 5, 6]
    for name, x in found.tensors().items():
        if "weight" in name or "bias" in name:
            assert x.isnan().any() == wanted.gradients[name].isnan().any(), name
        else:
            assert torch.equal(x[:, others], good.tensors()[name][:, others]), name
            assert name.startswith("output") or x.isnan().any() == wanted.gradients[name].isnan().any(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cross_entropy_is_not_finite_where_eagers_is_not(bad: float) -> None:
    case = case_of("linear_cross_entropy", (7, 34))
    case.activation[3, 5] = bad
    found = verify(case)
    assert found.outputs[0].isnan()
    assert found.gradients["x"][[0, 1, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "values", ["all ignored", "half ignored", "first and last", "confident", "one-hot", "-1 ignored"]
)
def test_targets(values: str, precision: str) -> None:
    V = 65
    case = case_of("linear_cross_entropy", (8, V), precision, classes=V)
    targets, x = case.others["targets"].clone(), case.tensors["x"]
    if values == "all ignored":
        targets.fill_(IGNORE)
    elif values == "half ignored":
        targets[::2] = IGNORE
    elif values == "first and last":
        targets[::2], targets[1::2] = 0, V - 1
    elif values == "-1 ignored":
        targets[:3] = -1
        case = case.having(ignore_index=-1)
    else:  # the weight is the identity: x are the logits
        x = torch.zeros_like(x) if values == "one-hot" else x.clone()
        x[torch.arange(8), targets] = 30.0
        case = case.having(weight=torch.eye(V, device=DEVICE, dtype=x.dtype), x=x)
    found = verify(case.having(targets=targets))
    ignored = targets == case.others["ignore_index"]
    assert (found.gradients["x"][ignored] == 0).all()
    if ignored.all():
        assert found.outputs[0] == 0
        assert (found.gradients["weight"] == 0).all()


def test_small_probabilities_with_a_loss_scale() -> None:
    """In float16: gradients of 1e-8 that are no longer small once the scale of the loss has multiplied them."""
    targets = torch.arange(8, device=DEVICE)[:, None]
    x = torch.randn(8, 65, generator=torch.Generator().manual_seed(0)).half().to(DEVICE).scatter(1, targets, 18.0)
    case = case_of("linear_cross_entropy", (8, 65), "float16")
    case = case.having(x=x, weight=torch.eye(65, device=DEVICE, dtype=x.dtype), targets=targets[:, 0])
    incoming = (torch.tensor(65536.0, device=DEVICE),)
    results = [run(kernel(case.op), case, incoming), run(eager(case.op), case, incoming), truth(case, incoming)]
    check("gradients of small probabilities", *(r.gradients["x"].scatter(1, targets, 0) for r in results))


def test_an_index_that_is_ignored_may_be_a_class() -> None:
    case = case_of("linear_cross_entropy", (8, 34), classes=4)
    case.others["targets"][:4] = torch.arange(4)
    verify(case.having(ignore_index=2))


@pytest.mark.parametrize("precision", ["float32", "float16", *(["bfloat16"] if ON_GPU else [])])
def test_the_targets_gradient(precision: str) -> None:
    samples, V = 32, 17
    dtype = PRECISIONS[precision][0]
    x = torch.randn(len(PROBABILITIES), samples, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.randint(V, x.shape[:2], generator=torch.Generator().manual_seed(1))
    others = x.scatter(-1, targets[..., None], -math.inf).logsumexp(-1)
    odds = torch.tensor(PROBABILITIES, dtype=torch.float64).logit()[:, None]
    x.scatter_(-1, targets[..., None], (others + odds)[..., None])  # the target has this probability, but for rounding
    tensors = {"x": x.to(DEVICE, dtype), "weight": torch.eye(V, device=DEVICE, dtype=dtype)}
    case = Case("linear_cross_entropy", tensors, {"targets": targets.to(DEVICE), "ignore_index": IGNORE})
    incoming = (torch.tensor(float(targets.numel()), device=DEVICE),)  # undoes the mean
    results = [run(kernel(case.op), case, incoming), run(eager(case.op), case, incoming), truth(case, incoming)]
    at = [result.gradients["x"].gather(-1, targets.to(DEVICE)[..., None])[..., 0] for result in results]
    check_target_gradient(f"{case.op} {precision}", *at)
