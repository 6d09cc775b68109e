"""Every kernel against eager PyTorch and float64: sizes, layouts, values, memory, autocast, mistakes of the caller.

The rule is in `kernel_rule.py`, the inputs in `kernel_cases.py`. Without a GPU the kernels run in Triton's interpreter,
where bfloat16 has one loose case only: the interpreter rounds float32 to bfloat16 towards zero.
"""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import (
    HEADS,
    IGNORE,
    LAYOUTS,
    VARIANTS,
    Case,
    Result,
    build,
    compare,
    eager,
    gradients_for,
    kernel,
    laid_out,
    rope_case,
    run,
    truth,
    verify,
)
from kernel_rule import PROBABILITIES, check, check_target_gradient
from torch import Tensor

# NumPy's, which is under the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NORMS = [v for v, op in VARIANTS.items() if op.endswith("_norm")]
ROPES = [v for v, op in VARIANTS.items() if op == "rope"]
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "float16, weight float32": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, weight float32": (torch.bfloat16, torch.float32),
}
"""Dtype of the activation, and that of the weight where it is another. bfloat16 is for the GPU."""
SOME = ["rms_norm_add", "layer_norm", "layer_norm_add_nobias", "rope", "rope_qk_norm_interleaved", "swiglu"]
SOME += ["swiglu_linear_bias", "linear_cross_entropy"]
"""Variants that have every line of every kernel between them."""
precisions = pytest.mark.parametrize("precision", [p for p in PRECISIONS if ON_GPU or not p.startswith("bfloat16")])
SMALL = [
    (0, 65),
    (65,),
    (1, 65),
    (2, 65),
    (7, 1),
    (7, 2),
    (7, 31),
    (7, 63),
    (7, 64),
    (7, 65),
    (7, 123),
    (2, 768),
    (1, 1),
]


def case_of(variant: str, shape: tuple[int, ...], precision: str = "float32", **how: Any) -> Case:
    dtype, weight_dtype = PRECISIONS[precision]
    weight_dtype = weight_dtype if VARIANTS[variant].endswith("_norm") or "qk_norm" in variant else None
    return build(variant, shape, dtype, DEVICE, weight_dtype=weight_dtype, **how)


# Sizes


@pytest.mark.parametrize("shape", SMALL[:5] if ON_GPU else SMALL, ids=str)
@pytest.mark.parametrize("variant", ["rms_norm", *(v for v in SOME if v not in ROPES and v != "linear_cross_entropy")])
def test_small(variant: str, shape: tuple[int, int]) -> None:
    verify(case_of(variant, shape))


@precisions
@pytest.mark.parametrize("shape", [(4097, 768)] if ON_GPU else [(7, 123)], ids=str)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ROPES and v != "linear_cross_entropy"])
def test_precisions(variant: str, shape: tuple[int, int], precision: str) -> None:
    if "weight" not in precision or variant in NORMS:
        verify(case_of(variant, shape, precision))


@pytest.mark.parametrize("precision", ["float32", "float16", *(["bfloat16"] if ON_GPU else [])])
@pytest.mark.parametrize("classes", [1, 2, 31, 65, 257])
@pytest.mark.parametrize("shape", [(0, 64), (64,), (1, 64), (2, 64), (7, 1), (7, 31), (7, 123)], ids=str)
def test_small_cross_entropy(shape: tuple[int, ...], classes: int, precision: str) -> None:
    verify(case_of("linear_cross_entropy", shape, precision, classes=classes, scale=2 / math.sqrt(shape[-1])))


@pytest.mark.parametrize(("rows", "classes"), [(7, 4096), (7, 4113), (300, 65)])
def test_cross_entropy_in_blocks(rows: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the logits of a row; of the rows, 128 at a time."""
    module = importlib.import_module("gptperf.kernels.logit_chunks")
    monkeypatch.setattr(module, "CHUNK_ROWS", 64)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert module.chunk_rows(classes, 4) == 128
    verify(case_of("linear_cross_entropy", (rows, 34), classes=classes, scale=0.3))


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("classes", [1, 63, 65, 72])
def test_sizes_of_the_losss_products(classes: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of 8, padded with zeros; every chunk lies in one buffer, which the products write where it is."""
    module = importlib.import_module("gptperf.kernels.linear_cross_entropy")
    monkeypatch.setattr(importlib.import_module("gptperf.kernels.logit_chunks"), "CHUNK_ROWS", 4)
    monkeypatch.setattr(importlib.import_module("gptperf.kernels.logit_chunks"), "CHUNK_BYTES", 1)
    launch, mm, logits, products = module.launch, torch.mm, [], []

    def launch_and_keep(kernel: Any, grid: Any, tensors: Any, *rest: Any) -> None:
        logits.extend(tensors[:1] if kernel is module._cross_entropy_kernel else [])
        launch(kernel, grid, tensors, *rest)

    def mm_and_keep(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **options: Any) -> torch.Tensor:
        products.append((out.data_ptr(), *a.shape, b.shape[1]))
        return mm(a, b, out=out, **options)

    case = case_of("linear_cross_entropy", (23, 34), precision, classes=classes)
    incoming = gradients_for(case)
    monkeypatch.setattr(module, "launch", launch_and_keep)
    monkeypatch.setattr(module.torch, "mm", mm_and_keep)
    found = run(kernel(case.op), case, incoming)
    monkeypatch.undo()
    columns = (classes + 7) // 8 * 8
    assert [x.shape for x in logits] == [(8, columns), (8, columns), (7, columns)]
    assert {(x.data_ptr(), x.stride()) for x in logits} == {(logits[0].data_ptr(), (columns, 1))}
    assert classes == 1 or (logits[0][:, :classes] != 0).any()
    assert (logits[0][:, classes:] == 0).all()
    at = logits[0].data_ptr()
    assert [sizes for where, *sizes in products if where == at] == [[rows, 34, columns] for rows in (8, 8, 7)]
    assert [sizes for where, *sizes in products if where != at and columns not in sizes] == []
    compare(case, incoming, found)


@pytest.mark.parametrize("variant", ["rms_norm_add", "layer_norm_add"])
def test_norm_programs_with_several_tiles_of_rows(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more rows than all programs take at once."""
    module = importlib.import_module("gptperf.kernels.norm")
    original = module.backward_shape
    monkeypatch.setattr(module, "backward_shape", lambda *args: (2, original(*args)[1]))
    case = case_of(variant, (23, 530))
    assert original(23, 530, 4, variant == "layer_norm_add", True)[1]["BLOCK_M"] * 2 * 2 < 23
    verify(case)


def test_weight_and_bias_of_two_dtypes() -> None:
    case = case_of("layer_norm", (7, 65), "float16")
    verify(case.having(bias=case.tensors["bias"].float()))


@pytest.mark.parametrize("head_dim", [2, 48, 64, 72, 80, 96, 128])
@pytest.mark.parametrize(
    ("variant", "heads"),
    [("rope_interleaved", "1"), ("rope_interleaved", "12"), ("rope_qk_norm", "3"), ("rope_qk_norm", "7:1")],
)
def test_rope_heads(variant: str, head_dim: int, heads: str) -> None:
    verify(rope_case(variant, (2, 3), HEADS[heads], head_dim, device=DEVICE))


@precisions
@pytest.mark.parametrize("rows", [(0, 3), (2, 0), (1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("variant", ["rope_interleaved", "rope_qk_norm"])
def test_rope_rows(variant: str, rows: tuple[int, int], precision: str) -> None:
    dtype, weight_dtype = PRECISIONS[precision]
    verify(rope_case(variant, rows, HEADS["7:1"], 18, dtype, DEVICE, weight_dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_in_the_interpreter(variant: str) -> None:
    verify(build(variant, (7, 65), torch.bfloat16, DEVICE, scale=0.5), truncates=not ON_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 2, 31, 63, 64, 65, 123, 768, 1023, 1025, 4096, 11008, 16384])
@pytest.mark.parametrize("variant", ["rms_norm", "layer_norm"])
def test_norm_grid(variant: str, columns: int) -> None:
    for rows in (7, 4097, *((1, 2, 128) if columns == 768 else ())):  # others are compiled anew for these
        verify(case_of(variant, (rows, columns), "bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16, weight float32"])
@pytest.mark.parametrize("variant", ["rms_norm_add", "layer_norm_add"])
def test_wide_norms(variant: str, precision: str) -> None:
    for rows in (7, 4097):
        verify(case_of(variant, (rows, 16384), precision))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("heads", ["12", "7:1"])
@pytest.mark.parametrize("variant", ["rope", "rope_qk_norm_interleaved"])
def test_rope_grid(variant: str, heads: str, precision: str) -> None:
    dtype, weight_dtype = PRECISIONS[precision]
    for head_dim in (64, 128) if precision == "bfloat16" else (80,):
        for rows in (1, 129), (3, 1025):
            verify(rope_case(variant, rows, HEADS[heads], head_dim, dtype, DEVICE, weight_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 31, 123, 768, 1023, 1025, 4096, 11008])
@pytest.mark.parametrize("variant", ["swiglu", "swiglu_linear_bias"])
def test_swiglu_grid(variant: str, columns: int) -> None:
    for precision in ("float32", "float16", "bfloat16") if columns == 11008 else ("bfloat16",):
        for rows in (1, 128, 4097):
            verify(case_of(variant, (rows, columns), precision))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1, 65, 1023, 1025, 4096, 32769, 50257, 50304, 65537, 128256])
def test_cross_entropy_grid(classes: int) -> None:
    for precision in ("float32", "float16", "bfloat16") if classes in (1025, 50257, 128256) else ("bfloat16",):
        for shape in (1, 64), (128, 768), (4097, 256):
            verify(case_of("linear_cross_entropy", shape, precision, classes=classes, scale=2 / math.sqrt(shape[1])))


# Layouts


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of one, for DTensor."""
    backend = "nccl" if ON_GPU else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", SOME)
def test_layouts(variant: str, layout: str, one_process: None) -> None:
    """Of the activation, the residual and the incoming gradients at once."""
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


@pytest.mark.parametrize("variant", SOME)
def test_sum_of_the_outputs(variant: str) -> None:
    """`.sum().backward()` hands in gradients of stride 0."""
    verify(case_of(variant, (2, 3, 34)), ones=True)


@pytest.mark.parametrize("variant", [v for v in SOME if v != "swiglu"])
def test_strided_weights_tables_and_targets(variant: str) -> None:
    case = case_of(variant, (7, 66))
    spread = {k: torch.stack([x, x.flip(0)], -1)[..., 0] for k, x in _tensors(case).items() if k not in ("x", "qkv")}
    assert not any(x.is_contiguous() for x in spread.values())
    verify(case.having(**spread))


def _tensors(case: Case) -> dict[str, Tensor]:
    return {k: x for k, x in {**case.tensors, **case.others}.items() if isinstance(x, Tensor)}


# Values


VALUES = ["x 1e-4", "x 1e4", "denormal", "equal", "equal in a row", "around 1e4", "zero"]


@pytest.mark.parametrize("values", [*VALUES, "x 1e4, float16", "denormal, float16"])
@pytest.mark.parametrize("variant", [v for v in SOME if v != "rope"])
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
@pytest.mark.parametrize("variant", [v for v in SOME if v != "linear_cross_entropy"])
def test_what_is_not_finite_stays_in_its_row(variant: str, bad: float) -> None:
    """Where in that row NaN stands depends on the formula, as eager's does on the device."""
    case = case_of(variant, (1, 7, 34))
    incoming = gradients_for(case)
    good = run(kernel(case.op), case, incoming)
    case.activation[0, 3, 5] = bad
    found, wanted = run(kernel(case.op), case, incoming), run(eager(case.op), case, incoming)
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


# Memory


@pytest.mark.parametrize("variant", SOME)
def test_nothing_of_the_callers_is_written(variant: str) -> None:
    case = case_of(variant, (7, 65))
    incoming = gradients_for(case)
    mine = {**_tensors(case), **{f"gradient {i}": g for i, g in enumerate(incoming)}}
    before = {name: (x._version, x.clone()) for name, x in mine.items()}
    result = run(kernel(case.op), case, incoming)
    for name, x in mine.items():
        assert x._version == before[name][0], name
        assert torch.equal(x, before[name][1]), name
    owned = {x.untyped_storage().data_ptr() for x in result.tensors().values()}
    assert not owned & {x.untyped_storage().data_ptr() for x in mine.values()}
    assert len({x.data_ptr() for x in result.gradients.values()}) == len(result.gradients)


@pytest.mark.parametrize("variant", SOME)
def test_the_same_twice(variant: str) -> None:
    """The same call, and the same graph backward again, give the same bits."""
    case = case_of(variant, (7, 65))
    incoming = gradients_for(case)
    first = run(kernel(case.op), case, incoming)
    assert all(first.same_bits(run(kernel(case.op), case, incoming)) for _ in range(100 if ON_GPU else 1))
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    outputs = kernel(case.op)(**leaves, **case.others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for retain in (True, False):
        gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming, retain_graph=retain)
        assert first.same_bits(Result(first.outputs, dict(zip(leaves, gradients, strict=True))))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "shape", "classes"),
    [
        ("rms_norm_add", (16, 32776, 4096), 0),
        ("layer_norm", (16, 32776, 4096), 0),
        ("rope", (16, 35000, 128), 0),
        ("rope_qk_norm_interleaved", (16, 35000, 128), 0),
        ("swiglu", (16, 32776, 4096), 0),
        ("linear_cross_entropy", (16, 131080, 1024), 257),
        ("linear_cross_entropy", (16, 1032, 64), 140000),  # the logits, in one chunk
    ],
)
def test_more_than_2_31_elements(
    variant: str, shape: tuple[int, int, int], classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rows, the only ones whose gradient is not 0, against eager PyTorch on these rows alone."""
    module = importlib.import_module("gptperf.kernels.logit_chunks")
    monkeypatch.setattr(module, "CHUNK_BYTES", 6_000_000_000)
    B, T, N = shape
    dtype, tail = torch.bfloat16, 8
    if VARIANTS[variant] == "rope":
        end = rope_case(variant, (1, tail), (30, 1), N, dtype, DEVICE)
        tables = rope_case(variant, (0, T), (30, 1), N, dtype, DEVICE).others
        end = end.having(**{name: tables[name][T - tail : T] for name in ("cos", "sin")})
    else:
        end = build(variant, (1, tail, N), dtype, DEVICE, classes=classes, scale=2 / math.sqrt(N) if classes else 1.0)
        tables = {}
    grown = {
        name: _grown(end.tensors[name], B, T, True)
        for name in ("x", "qkv", "gate_up", "residual")
        if name in end.tensors
    }
    case = end.having(**grown, **tables)
    assert max(case.activation.numel(), min(B * T, module.chunk_rows(max(classes, 1), 2)) * classes) > 2**31
    incoming = gradients_for(end)
    if classes:
        case = case.having(targets=_grown(end.others["targets"] - IGNORE, B, T, False) + IGNORE)
        whole = run(kernel(case.op), case, incoming)
        outputs = whole.outputs
    else:
        whole = run(kernel(case.op), case, tuple(_grown(g, B, T, False) for g in incoming))
        outputs = tuple(y.flatten(0, 1)[-tail:][None] for y in whole.outputs)
    gradients = {k: g.flatten(0, 1)[-tail:][None] if k in grown else g for k, g in whole.gradients.items()}
    compare(end, incoming, Result(outputs, gradients))
    for name in grown:
        assert whole.gradients[name].flatten(0, 1)[:-tail].count_nonzero() == 0


def _grown(x: Tensor, B: int, T: int, normal: bool) -> Tensor:
    """`x` at the end of `(B, T, ...)`, after normal values or zeros."""
    big = torch.zeros((B, T, *x.shape[2:]), dtype=x.dtype, device=x.device)
    big = big.normal_() if normal else big
    big.flatten(0, 1)[-x.shape[1] :] = x[0]
    return big
