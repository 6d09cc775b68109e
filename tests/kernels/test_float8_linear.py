"""The linear layers in 8 bits: against a float64 model of the same quantisation, and in every way to run them."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from kernel_rule import check
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from gptperf.kernels import float8_reference, reference
from gptperf.kernels.float8 import E4M3, INVERSE, Float8
from gptperf.kernels.float8_linear import GRADIENTS, LEVELS, Float8State, float8_linear, float8_swiglu
from gptperf.model.recompute import CHECKPOINT_OPTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # fp8 matmuls on a GPU write 16 bits
M, K, N = 48, 32, 64
Rounding = Callable[[Tensor, Float8], Tensor]


def _state(level: str = "full", **options: Any) -> Float8State:
    scales = torch.zeros(3, 4, device=DEVICE)
    return Float8State(tuple(scales.unbind()), Float8State.probe_like(scales), level, **options)  # type: ignore[arg-type]


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(DEVICE, DTYPE)


def _leaves(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [_normal(seed + i, *shape).requires_grad_() for i, shape in enumerate(shapes)]


def _quantised(x: Tensor, form: Float8) -> Tensor:
    """The numbers that x has in 8 bits with its own scale, in float64."""
    q, _, factors, _ = float8_reference.quantize(x, torch.zeros(1, device=DEVICE), e5m2=form is GRADIENTS)
    return q.double() * factors[INVERSE].double()


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("keeps_input", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_linear_is_its_model(level: str, keeps_input: bool, triton: bool) -> None:
    """Each level quantises the operands of its matmuls and no others."""
    x, weight, bias = _leaves(0, (2, M // 2, K), (N, K), (N,))
    dy = _normal(5, M, N, scale=1e-4)
    y = float8_linear(x, weight, bias, _state(level, keeps_input=keeps_input, triton=triton))
    ours = [y, *torch.autograd.grad(y, (x, weight, bias), dy.view_as(y))]
    rows = x.detach().flatten(0, 1)
    x8, w8, dy8 = _quantised(rows, E4M3), _quantised(weight.detach(), E4M3), _quantised(dy, GRADIENTS)
    operands = {
        "y": (x8, w8.t()),
        "dx": (dy8, w8) if level != "forward" else (dy, weight.detach()),
        "dW": (dy8.t(), x8) if level == "full" else (dy.t(), rows),
        "db": (torch.ones(1, M, device=DEVICE), dy),
    }
    for (name, (a, b)), found in zip(operands.items(), ours, strict=True):
        wanted, eager = a.double() @ b.double(), a.float() @ b.float()
        if name == "y":
            wanted, eager = wanted + bias.detach().double(), eager + bias.detach().float()
        eager = eager.to(DTYPE)
        check(
            name,
            found.detach().reshape(wanted.shape),
            eager,
            wanted,
            kind="column" if name == "db" else "output",
            rows=M,
        )


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_swiglu_is_its_parts(level: str, triton: bool) -> None:
    """The fused FFN computes what its projections and the product do one by one; in float32 they are equally exact."""
    leaves = _leaves(0, (M, K), (2 * N, K), (2 * N,), (K, N), (K,))
    x, up, up_bias, down, down_bias = leaves
    dout = _normal(9, M, K, scale=1e-4)
    fused = float8_swiglu(x, up, up_bias, down, down_bias, _state(level, triton=triton), _state(level))
    product = reference.swiglu(float8_linear(x, up, up_bias, _state(level)))
    parts = float8_linear(product, down, down_bias, _state(level))
    ours, wanted = (torch.autograd.grad(y, leaves, dout) for y in (fused, parts))
    for a, b in zip((fused, *ours), (parts, *wanted), strict=True):
        off = (a - b).float().norm() / b.float().norm()
        assert off < (0.05 if torch.bfloat16 == DTYPE else 0.005)


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "C", "width"), [(8192, 2048, 5632), (16384, 768, 2048)])
def test_layers_of_a_model(rows: int, C: int, width: int, level: str) -> None:
    """Triton's kernels beside eager PyTorch, which quantises to the same bits but for a few ties of the product."""
    x, dy = _normal(0, rows, C).requires_grad_(), _normal(1, rows, C, scale=1e-3)
    weight, up, down = (
        _normal(2 + i, *shape, scale=0.02).requires_grad_()
        for i, shape in enumerate([(C, C), (2 * width, C), (C, width)])
    )
    found: list[list[Tensor]] = []
    for triton in (True, False):
        states = [_state(level, triton=triton) for _ in range(3)]
        y = float8_linear(x, weight, None, states[0])
        out = float8_swiglu(x, up, None, down, None, states[1], states[2])
        found.append([y, *torch.autograd.grad(y, (x, weight), dy), out, *torch.autograd.grad(out, (x, up, down), dy)])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        assert (a - b).float().norm() <= 0.01 * b.float().norm()


def test_statistics_come_out_of_backward() -> None:
    x, weight = _leaves(0, (M, K), (N, K))
    state = _state()
    y = float8_linear(x, weight, None, state)
    y.backward(_normal(5, M, N, scale=1e-4))
    assert state.probe.grad is not None
    parts = state.probe.grad
    wanted = [x.detach(), weight.detach(), _normal(5, M, N, scale=1e-4)]
    assert parts[:, 0].amax(-1).tolist() == [t.abs().max().item() for t in wanted]


def test_evaluation_leaves_no_trace() -> None:
    x, weight = _leaves(0, (M, K), (N, K))
    state = _state()
    with torch.no_grad():
        y = float8_linear(x, weight, None, state)
    assert not y.requires_grad
    assert state.probe.grad is None
    assert torch.equal(y, float8_linear(x, weight, None, state))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float, level: str) -> None:
    """A loss that overflows gives weights gradients that are not finite, so that the step is skipped."""
    x, weight = _leaves(0, (M, K), (N, K))
    dy = _normal(5, M, N)
    dy[3, 4] = bad
    y = float8_linear(x, weight, None, _state(level))
    for gradient in torch.autograd.grad(y, (x, weight), dy):
        assert not gradient.isfinite().all()


def _block(triton: bool, level: str = "full") -> tuple[Callable[[Tensor], Tensor], list[Tensor], list[Float8State]]:
    """A small network of both functions, its leaves, and its states."""
    leaves = _leaves(1, (K, K), (2 * N, K), (K, N))
    states = [_state(level, triton=triton) for _ in range(3)]

    def run(x: Tensor) -> Tensor:
        y = float8_linear(x.sin(), leaves[0], None, states[0])
        return x + float8_swiglu(y, leaves[1], None, leaves[2], None, states[1], states[2])

    return run, leaves, states


def _results(run: Callable[[Tensor], Tensor], leaves: list[Tensor], states: list[Float8State]) -> Iterator[Tensor]:
    x = _normal(0, M, K).requires_grad_()
    y = run(x)
    yield y.detach()
    yield from torch.autograd.grad(y.square().sum(), [x, *leaves, *(state.probe for state in states)])


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    """The same bits; the forward pass keeps inputs in 8 bits for backward and no weights.

    A compiler that runs an op as early as it can would quantise for backward in the forward pass, and keep the result.
    """
    forward: list[torch.fx.GraphModule] = []
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func((forward.append(graph), graph)[1]),
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    run, *rest = _block(triton=True)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for a, b in zip(_results(run, *rest), _results(compiled, *rest), strict=True):
        assert torch.equal(a, b)
    [outputs] = [node.args[0] for node in forward[0].graph.nodes if node.op == "output"]
    kept = [tuple(x.meta["val"].shape) for x in outputs if x.meta["val"].dtype == E4M3.dtype]  # type: ignore[union-attr]
    assert kept == [(K, M), (K, M)]


@pytest.mark.parametrize("how", list(CHECKPOINT_OPTIONS))
def test_recomputed(how: str) -> None:
    run, *rest = _block(DEVICE == "cuda")

    def again(x: Tensor) -> Tensor:
        return checkpoint(run, x, **CHECKPOINT_OPTIONS[how])

    for a, b in zip(_results(run, *rest), _results(again, *rest), strict=True):
        assert torch.equal(a, b)


def test_autocast_chooses_the_dtype() -> None:
    x, weight = torch.ones(16, 16, device=DEVICE), torch.ones(32, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert float8_linear(x, weight, None, _state()).dtype == torch.bfloat16


def test_what_backward_keeps() -> None:
    """x in 8 bits, not in 16 or 32; and x itself if attention keeps it anyway."""
    kept: list[Tensor] = []
    for keeps_input, level in itertools.product((False, True), LEVELS):
        x, weight = _leaves(0, (M, K), (N, K))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            float8_linear(x, weight, None, _state(level, keeps_input=keeps_input))
        quantised = any(t.dtype == E4M3.dtype and t.shape == (K, M) for t in kept)
        assert quantised == (level == "full" and not keeps_input)
        assert any(t.shape == (M, K) for t in kept) != quantised


def test_matches_pytorch_within_the_format() -> None:
    """e4m3 has 4 significant bits: an error of .04 in each result; a wrong scale or a transposed operand gives 1."""
    x, weight = _leaves(0, (M, K), (N, K))
    y, wanted = float8_linear(x, weight, None, _state()), F.linear(x, weight)
    dy = _normal(5, M, N)
    for a, b in zip(
        (y, *torch.autograd.grad(y, (x, weight), dy)),
        (wanted, *torch.autograd.grad(wanted, (x, weight), dy)),
        strict=True,
    ):
        assert (a - b).norm() / b.norm() < 0.08
