"""Memory of the kernels: they write no tensor of the caller, nothing outside their tensors, and the same bits twice."""

import importlib
import math
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EVERY_LINE,
    EVERY_OPTION,
    IGNORE,
    ON_GPU,
    VARIANTS,
    Result,
    build,
    case_of,
    compare,
    gradients_for,
    kernel,
    rope_case,
    run,
)
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""NumPy, which runs Triton's interpreter, warns of what these values are meant to do."""


@pytest.mark.parametrize("variant", EVERY_LINE)
def test_nothing_of_the_callers_is_written(variant: str) -> None:
    case = case_of(variant, (7, 65))
    incoming = gradients_for(case)
    mine = {**case.all_tensors(), **{f"gradient {i}": g for i, g in enumerate(incoming)}}
    before = {name: (x._version, x.clone()) for name, x in mine.items()}
    result = run(kernel(case.op), case, incoming)
    for name, x in mine.items():
        assert x._version == before[name][0], name
        assert torch.equal(x, before[name][1]), name
    owned = {x.untyped_storage().data_ptr() for x in result.tensors().values()}
    assert not owned & {x.untyped_storage().data_ptr() for x in mine.values()}
    assert len({x.data_ptr() for x in result.gradients.values()}) == len(result.gradients)


@pytest.mark.parametrize("variant", EVERY_LINE)
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


@pytest.mark.parametrize("variant", ["swiglu_linear", "activation_gelu_linear_bias"])
def test_an_activation_that_is_kept_has_the_bits_of_one_that_is_recomputed(variant: str) -> None:
    """Backward keeps as many elements more as the activation has."""
    case = case_of(variant, (7, 65))
    incoming = gradients_for(case)
    results, kept = [], []
    for recompute in (True, False):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: (to.append(x.numel()), x)[1], lambda x: x):
            results.append(run(kernel(case.op), case.having(recompute=recompute), incoming))
        kept.append(sum(sizes))
    assert results[0].same_bits(results[1])
    assert kept[1] - kept[0] == 7 * 65


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
        ("activation_gelu", (16, 32776, 4096), 0),
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


@pytest.mark.parametrize("variant", EVERY_OPTION)
@pytest.mark.parametrize("shape", [(7, 65), (0, 65)], ids=str)
def test_new_memory_is_written_before_it_is_read(
    variant: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written outside of it either."""
    case = case_of(variant, shape)
    incoming = gradients_for(case)
    clean = run(kernel(case.op), case, incoming)
    with monkeypatch.context() as patch:
        poison = Poison(patch)
        found = run(kernel(case.op), case, incoming)
        assert poison.buffers
    assert not any(x.isnan().any() for x in found.tensors().values())
    assert found.same_bits(clean)
    assert poison.untouched()
