"""Every kernel against eager PyTorch and float64, in many sizes and precisions.

The rule is in `kernel_rule.py`, the inputs are in `kernel_cases.py`. Without a GPU the kernels run in Triton's
interpreter, where bfloat16 has one loose case only, because the interpreter rounds float32 to bfloat16 towards zero.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EVERY_LINE,
    HEADS,
    ON_GPU,
    PRECISIONS,
    VARIANTS,
    build,
    case_of,
    compare,
    gradients_for,
    kernel,
    rope_case,
    run,
    verify,
)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""NumPy, which runs Triton's interpreter, warns of what these values are meant to do."""
NORMS = [v for v, op in VARIANTS.items() if op.endswith("_norm")]
ROPES = [v for v, op in VARIANTS.items() if op == "rope"]
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


@pytest.mark.parametrize("shape", SMALL[:5] if ON_GPU else SMALL, ids=str)
@pytest.mark.parametrize(
    "variant", ["rms_norm", *(v for v in EVERY_LINE if v not in ROPES and v != "linear_cross_entropy")]
)
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["linear_cross_entropy", "linear_cross_entropy_capped"])
@pytest.mark.parametrize(("rows", "classes"), [(7, 4096), (7, 4113), (300, 65)])
def test_cross_entropy_in_blocks(rows: int, classes: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of logits has several blocks; the rows come in chunks of 128."""
    module = importlib.import_module("gptperf.kernels.logit_chunks")
    monkeypatch.setattr(module, "CHUNK_ROWS", 64)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert module.chunk_rows(classes, 4) == 128
    verify(case_of(variant, (rows, 34), classes=classes, scale=0.3))


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


@pytest.mark.slow
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
@pytest.mark.parametrize("variant", ["swiglu", "swiglu_linear_bias", "activation_gelu", "activation_gelu_linear_bias"])
def test_activation_grid(variant: str, columns: int) -> None:
    for precision in ("float32", "float16", "bfloat16") if columns == 11008 else ("bfloat16",):
        for rows in (1, 128, 4097):
            verify(case_of(variant, (rows, columns), precision))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name, op in VARIANTS.items() if op in ("activation", "swiglu")])
def test_every_activation_in_bfloat16(variant: str) -> None:
    verify(case_of(variant, (4096, 3072), "bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1, 65, 1023, 1025, 4096, 32769, 50257, 50304, 65537, 128256])
def test_cross_entropy_grid(classes: int) -> None:
    for precision in ("float32", "float16", "bfloat16") if classes in (1025, 50257, 128256) else ("bfloat16",):
        for shape in (1, 64), (128, 768), (4097, 256):
            for variant in ("linear_cross_entropy", "linear_cross_entropy_capped"):
                verify(case_of(variant, shape, precision, classes=classes, scale=2 / math.sqrt(shape[1])))
