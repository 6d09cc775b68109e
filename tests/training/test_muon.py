"""Muon against float64 and exact singular value decompositions; the layout of whole matrices; its FLOPs and states."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import masters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gptperf.config import ModelConfig, OptimizerConfig, command_line
from gptperf.distributed.bucket_sizes import ALIGN, cut_between
from gptperf.distributed.buckets import BucketGroup
from gptperf.distributed.replicated import Replicated
from gptperf.errors import CheckpointError, ConfigError
from gptperf.flops.matmuls import hidden_matrices
from gptperf.flops.model_cards import optimizer_of
from gptperf.kernels import reference
from gptperf.model import GPT
from gptperf.ops import resolve_ops
from gptperf.plan.step_time import optimizer_flops
from gptperf.training.engine import packed_rows
from gptperf.training.matching import changed_keys
from gptperf.training.optimizers import muon
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import clip_scale
from gptperf.training.optimizers.muon import _COEFFICIENTS, BAND, LEAST, UPDATE_RMS, Muon, orthogonalize

SIZES = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
LLAMA = {"ffn_type": "swiglu", "d_ff": 40, "weight_tying": False, "bias": True}
OPS = resolve_ops("eager", "cpu")


def _moved(s: Tensor) -> Tensor:
    """Returns where the five polynomials take singular values, which are relative to the Frobenius norm."""
    s = s / 1.02
    for a, b, c in _COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


def _exact(u: Tensor) -> Tensor:
    """Returns the update of one matrix for a learning rate of 1, in float64, by its singular value decomposition."""
    U, s, Vh = torch.linalg.svd(u.double(), full_matrices=False)
    return UPDATE_RMS * math.sqrt(max(u.shape)) * (U * _moved(s / s.norm())) @ Vh


def test_the_polynomials_are_the_best_ones() -> None:
    """The largest error below 1 equals that above 1, and the extremes alternate, as in the minimax solution."""
    s = torch.logspace(math.log10(LEAST), 0, 200_001, dtype=torch.float64)
    found = _moved(1.02 * s)
    assert BAND[0] < found.min() < found.max() < BAND[1]
    assert 1 - found.min().item() == pytest.approx(found.max().item() - 1, rel=1e-3)
    small = torch.logspace(-12, math.log10(LEAST), 10_000, dtype=torch.float64)
    assert ((_moved(1.02 * small) > 0) & (_moved(1.02 * small) <= 1000 * small)).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 10, 14), (2, 10, 15), (2, 5, 24), (1, 1, 7)])
def test_singular_values_move_and_singular_vectors_stay(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x, reference.symmetric_matmul, torch.float64)
    wanted = (U * _moved(s / s.norm(dim=-1, keepdim=True))[:, None]) @ Vh
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    # The polar factor has singular values of 1, the result those of the band.
    assert (torch.linalg.matrix_norm(found - U @ Vh, 2) <= 1 - BAND[0] + 1e-3).all()


@pytest.mark.parametrize("columns", [64, 176])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 0.08)])
def test_low_precision_stays_near_the_exact_result(dtype: torch.dtype, error: float, columns: int) -> None:
    """For many spectra: flat, spread over three orders of magnitude, one large value, and low rank."""
    generator = torch.Generator().manual_seed(0)
    U, s, Vh = torch.linalg.svd(torch.randn(64, columns, generator=generator), full_matrices=False)
    spike, low = torch.full((64,), 0.02), torch.full((64,), 1e-6)
    spike[0], low[:8] = 1.0, 1.0
    for spectrum in (s, torch.ones(64), torch.logspace(0, -3, 64), spike, low):
        x = (U * spectrum) @ Vh
        wanted = (U * _moved(spectrum / spectrum.norm())) @ Vh
        found = orthogonalize(1e-6 * x[None], reference.symmetric_matmul, dtype)[0].float()
        assert (found - wanted).norm() < error * wanted.norm()
        assert torch.linalg.svdvals(found).max() < 1.05 * BAND[1]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-19, 1e-12, 1.0, 1e12])
def test_no_size_of_a_gradient_makes_a_larger_update(scale: float) -> None:
    x = scale * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        s = torch.linalg.svdvals(orthogonalize(x, reference.symmetric_matmul, dtype).float())
        assert s.max() < 1.1 * BAND[1]
        assert scale < 1e-12 or s.min() > 0.8 * BAND[0]


def _weights(dtype: torch.dtype = torch.float32, bucket_numel: int = 1 << 20, **keys: Any) -> tuple[GPT, Replicated]:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SIZES | LLAMA | keys)))
    return model, Replicated(model, dtype, bucket_numel=bucket_numel, packed=packed_rows(model))


def _backward(model: GPT, weights: Replicated, seed: int) -> None:
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(seed))
    weights.start_step()
    weights.start_micro_batch(last=True)
    with torch.autocast("cpu", weights.compute_dtype, enabled=weights.compute_dtype != torch.float32):
        model(tokens, tokens).backward()
    weights.finish_gradients()


def _parts(model: GPT, name: str, x: Tensor) -> list[Tensor]:
    """Returns the matrices of a parameter: queries, keys and values; gate and up."""
    K = model.config.kv_width
    if name.endswith("qkv.weight"):
        return [x[: -2 * K], x[-2 * K : -K], x[-K:]]
    return list(x.chunk(2)) if name.endswith("gate_up.weight") else [x]


def _is_hidden(name: str, x: Tensor) -> bool:
    return name.startswith("blocks.") and x.dim() == 2


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize("bucket_numel", [1, 1 << 20])
def test_steps_are_the_formula_in_float64(bucket_numel: int, normuon: bool, cautious: bool) -> None:
    model, weights = _weights(bucket_numel=bucket_numel)
    config = OptimizerConfig(
        optimizer="muon", learning_rate=0.01, muon_lr=0.02, muon_momentum=0.9, weight_decay=0.3, beta2=0.8,
        normuon=normuon, cautious_weight_decay=cautious,
    )  # fmt: skip
    optimizer = Muon(weights, config, OPS)
    expected = {name: [x.double() for x in _parts(model, name, w)] for name, w in masters(weights)}
    momenta, averages = (
        {name: [torch.zeros_like(x) for x in parts] for name, parts in expected.items()} for _ in range(2)
    )
    for step in range(3):
        _backward(model, weights, step)
        optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 0.5)
        gradients = {name: weights.gradient(name).double() / optimizer.grad_scale for name in weights.places}
        optimizer.learning_rate.fill_(0.005)  # the schedule's rate; that of Muon is twice as high
        optimizer.step()
        found = dict(masters(weights))
        for name, parts in expected.items():
            if not _is_hidden(name, found[name]):
                continue
            for i, g in enumerate(_parts(model, name, gradients[name])):
                momenta[name][i] = m = 0.9 * momenta[name][i] + 0.1 * g
                u = _exact(0.9 * m + 0.1 * g)
                if normuon:
                    averages[name][i] = v = 0.8 * averages[name][i] + 0.2 * u.square().mean(1, keepdim=True)
                    u = u / v.sqrt()
                    u = UPDATE_RMS * u / u.square().mean().sqrt()
                decays = (u * parts[i] > 0) if cautious else torch.ones_like(u)
                parts[i] = parts[i] - 0.01 * (0.3 * decays * parts[i] + u)
            torch.testing.assert_close(found[name].double(), torch.cat(parts), rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normuon", [False, True])
def test_each_matrix_moves_by_a_fifth_of_the_learning_rate(normuon: bool, dtype: torch.dtype) -> None:
    model, weights = _weights(dtype)
    before = {name: w.clone() for name, w in masters(weights)}
    config = OptimizerConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.0, normuon=normuon)
    optimizer = Muon(weights, config, OPS)
    for bucket in weights.buckets:
        bucket.master.grad = 1e-7 * torch.randn_like(bucket.master)
    optimizer.step()
    for name, w in masters(weights):
        for moved in _parts(model, name, w - before[name]) if _is_hidden(name, w) else ():
            rms = moved.square().mean().sqrt().item() / 0.01
            assert rms == pytest.approx(UPDATE_RMS, rel=0.02 if normuon else 0.16), name
    for bucket in weights.buckets:
        if bucket.copy is not None:  # it was the scratch buffer, and is now the rounded weights
            assert torch.equal(bucket.copy, bucket.master.data.to(dtype))


def test_products_are_in_float16_unless_the_run_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    original = muon.orthogonalize
    monkeypatch.setattr(
        muon, "orthogonalize", lambda x, op, dtype, *how: (found.append(dtype), original(x, op, dtype, *how))[1]
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, weights = _weights(dtype)
        for bucket in weights.buckets:
            bucket.master.grad = torch.ones_like(bucket.master)
        Muon(weights, OptimizerConfig(optimizer="muon"), OPS).step()
        assert set(found) == {torch.float32 if dtype == torch.float32 else torch.float16}
        found.clear()


def test_the_rest_is_adamws_bit_for_bit() -> None:
    found = []
    for make in (lambda w, c: Muon(w, c, OPS), lambda w, c: AdamW(w.buckets, c, reference.adamw)):
        model, weights = _weights(torch.bfloat16)
        optimizer: AdamW = make(weights, OptimizerConfig(optimizer="muon", learning_rate=0.01))
        _backward(model, weights, 0)
        optimizer.step()
        found.append(dict(masters(weights)))
    for name, w in found[0].items():
        assert torch.equal(w, found[1][name]) != _is_hidden(name, w), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_bad_gradients_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    model, weights = _weights(dtype)
    optimizer = Muon(weights, OptimizerConfig(optimizer="muon", normuon=True), OPS)
    _backward(model, weights, 0)
    optimizer.step()
    kept = [x for bucket in weights.buckets for x in (bucket.master.data, *optimizer.states(bucket).values())]
    kept += [bucket.copy for bucket in weights.buckets if bucket.copy is not None]
    before = [x.clone() for x in kept]
    _backward(model, weights, 1)
    weights.gradient("blocks.1.ffn.out.weight")[3, 5] = bad
    optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert optimizer.steps == 1


def test_a_matrix_without_gradient_gets_no_update() -> None:
    for normuon in (False, True):
        model, weights = _weights()
        optimizer = Muon(weights, OptimizerConfig(optimizer="muon", normuon=normuon, weight_decay=0.0), OPS)
        before = [w.clone() for _, w in masters(weights)]
        for bucket in weights.buckets:
            bucket.master.grad = torch.zeros_like(bucket.master)
        optimizer.step()
        assert all(torch.equal(w, b) for (_, w), b in zip(masters(weights), before, strict=True))
        assert model is not None


def test_what_packs_matrices_is_what_the_cards_say() -> None:
    for keys in ({}, {"ffn_type": "standard"}, {"n_kv_head": 4}, {"head_dim": 12}):
        model, weights = _weights(**keys)
        hidden = [bucket for bucket in weights.buckets if bucket.group is BucketGroup.HIDDEN]
        found = [matrix for bucket in hidden for matrix in weights.matrices(bucket)]
        wanted = hidden_matrices(model.config)
        shapes = sorted((rows, columns) for rows, columns, times in wanted.shapes for _ in range(times))
        assert sorted((matrix.rows, matrix.columns) for matrix in found) == shapes
        assert sum(matrix.rows for matrix in found) == wanted.rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normuon", [False, True])
def test_states_are_what_the_card_says(normuon: bool, dtype: str) -> None:
    """`optimizer_state_dtype` is that of AdamW's moments; Muon's states stay float32."""
    model, weights = _weights(n_embd=64, d_ff=128)  # sizes that leave no gaps between matrices
    config = OptimizerConfig(optimizer="muon", normuon=normuon, optimizer_state_dtype=dtype)
    optimizer = Muon(weights, config, OPS)
    held = sum(x.nbytes for bucket in weights.buckets for x in optimizer.states(bucket).values())
    hidden = hidden_matrices(model.config)
    total = sum(bucket.master.numel() for bucket in weights.buckets)
    assert held == optimizer_of(config).state_bytes(total, hidden.elements, hidden.rows)


def test_flops_are_those_that_are_counted() -> None:
    config = command_line.resolve(["--optimizer=muon", *(f"--{k}={v}" for k, v in (SIZES | LLAMA).items())]).config
    _, weights = _weights()
    optimizer = Muon(weights, config.optimizer, OPS)
    for bucket in weights.buckets:
        bucket.master.grad = torch.ones_like(bucket.master)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    assert counted.get_total_flops() == optimizer_flops(config, halved=False)
    adamw = command_line.resolve(["--optimizer=adamw"]).config
    assert optimizer_flops(adamw, halved=False) == 0


matrices = st.lists(st.lists(st.integers(1, 300).map(lambda n: 16 * n), min_size=1, max_size=3), min_size=1, max_size=9)


@given(matrices, st.integers(1, 9))
def test_no_matrix_lies_in_two_shares(parameters: list[list[int]], shares: int) -> None:
    offsets, share = cut_between(parameters, shares)
    assert share % ALIGN == 0
    end = 0
    for offset, sizes in zip(offsets, parameters, strict=True):
        assert offset >= end
        assert offset % ALIGN == 0
        ends = list(itertools.accumulate(sizes, initial=offset))
        assert all(a // share == (b - 1) // share for a, b in itertools.pairwise(ends))
        end = ends[-1]
    assert end <= share * shares
    # No share is larger than what an equal cut and the largest parameter need together.
    slack = max(map(sum, parameters)) + ALIGN * (len(parameters) + 1)
    assert share <= sum(map(sum, parameters)) / shares + slack


def test_equal_matrices_are_cut_without_padding() -> None:
    assert cut_between([[4096] * 3, [4096]] * 4, 8) == ([0, 12288, 16384, 28672, 32768, 45056, 49152, 61440], 8192)


def test_a_block_parameter_that_is_no_matrix_is_refused() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SIZES | LLAMA)))
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match=r"blocks.0.extra \(2, 3, 4\), wanted 2 dimensions; nearest: optimizer"):
        Replicated(model, torch.float32, packed={})


def _saved(*flags: str) -> dict[str, Any]:
    config = command_line.resolve(list(flags)).config
    derived = {name: getattr(config.model, name) for name in ("kv_heads", "ffn_width", "padded_vocab_size")}
    return {"config": config.sections(), "model": derived}


@pytest.mark.parametrize(
    ("before", "now"),
    [("--optimizer=adamw", "--optimizer=muon"), ("--optimizer=muon", "--optimizer=adamw")],
)
def test_a_checkpoint_of_the_other_optimizer_is_refused(before: str, now: str) -> None:
    saved, config = _saved(before), command_line.resolve([now]).config
    with pytest.raises(CheckpointError, match=r"optimizer: \w+ -> \w+"):
        changed_keys(saved, config)
    assert not [line for line in changed_keys(saved, config, weights_only=True) if "optimizer" in line]
    with pytest.raises(CheckpointError, match="normuon: False -> True"):
        changed_keys(_saved("--optimizer=muon"), command_line.resolve(["--optimizer=muon", "--normuon=True"]).config)


def test_the_step_decides_nothing_on_the_host() -> None:
    """Whatever the learning rate, the clipping and the gradients are, no tensor is read."""
    _, weights = _weights(torch.bfloat16)
    optimizer = Muon(weights, OptimizerConfig(optimizer="muon", normuon=True, cautious_weight_decay=True), OPS)
    forbidden: Callable[..., Any] = pytest.fail
    for value in (0.0, 1.0, math.inf):
        for bucket in weights.buckets:
            bucket.master.grad = torch.full_like(bucket.master, value)
        optimizer.grad_scale, optimizer.found_inf = clip_scale(weights.gradient_norm(), 1.0)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: forbidden(f"{name} reads a tensor"))
            optimizer.step()


def test_a_compiled_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its arguments share memory: the copy that it writes is the buffer that it reads."""
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    found = []
    for compiles in (False, True):
        _, weights = _weights(torch.bfloat16)
        optimizer = Muon(weights, OptimizerConfig(optimizer="muon", cautious_weight_decay=True), OPS)
        if compiles:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "compile", compiled)
                optimizer.compile()
        for seed in range(2):
            torch.manual_seed(seed)
            for bucket in weights.buckets:
                bucket.master.grad = torch.randn_like(bucket.master)
            optimizer.step()
        found.append([x for b in weights.buckets for x in (b.master.data, b.compute, *optimizer.states(b).values())])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-6)
