"""Attention of a packed projection: packing and rotation in place anywhere, with cuDNN on a GPU."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, Result, rope_case, run
from kernel_rule import check
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gptperf.config import command_line
from gptperf.distributed.process import Process
from gptperf.kernels import packed_attention as module
from gptperf.kernels import reference
from gptperf.kernels.packed_attention import packed_attention
from gptperf.kernels.rope import rope
from gptperf.model import GPT
from gptperf.ops import resolve_ops, why_not_packed
from gptperf.plan.packing import packing_problem
from gptperf.training import engine

HAS_CUDNN = DEVICE == "cuda" and why_not_packed(torch.cuda.get_device_capability()) is None
VARIANTS = ["none", "rope", "rope_interleaved", "rope_qk_norm", "rope_qk_norm_interleaved"]
HEADS = [(3, 3), (4, 2), (6, 1)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As cuDNN, without the statistics."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), q.new_empty(0)


def _attend_backward(
    dy: Tensor, qkv: tuple[Tensor, ...], y: Tensor, statistics: Tensor, out: tuple[Tensor, ...]
) -> None:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    with torch.enable_grad():
        found = torch.autograd.grad(_attend(*leaves)[0], leaves, dy)
    for place, gradient in zip(out, found, strict=True):
        place.copy_(gradient)


@pytest.fixture(autouse=True)
def _without_cudnn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces cuDNN by PyTorch's attention, except in tests that need a GPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(module, "_attend", _attend)
        monkeypatch.setattr(module, "_attend_backward", _attend_backward)


def _case(variant: str, heads: tuple[int, int], T: int, D: int, dtype: torch.dtype) -> Any:
    case = rope_case(variant, (2, T), heads, D, dtype, DEVICE, torch.float32)
    return case.having(cos=None, sin=None) if variant == "none" else case


def _op(qkv: Tensor, **others: Any) -> Tensor:
    """The op on a copy of qkv, which it overwrites."""
    y = packed_attention(qkv.clone(), **others)
    assert y is not None
    return y


def _by_parts(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **others: Any) -> Tensor:
    """The op `rope`, then attention."""
    if cos is None or sin is None:
        return reference.packed_attention(qkv, cos, sin, **others)
    q, k, v = rope(qkv, cos, sin, **others)
    return _attend(q, k, v)[0]


def _results(function: Any, case: Any, incoming: Tensor, dtype: torch.dtype | None = None) -> Result:
    return run(function, case, (incoming,), dtype)


def _incoming(case: Any) -> Tensor:
    B, T, width = case.tensors["qkv"].shape
    H = case.others["n_head"]
    D = width // (H + 2 * case.others["n_kv_head"])
    make = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn((B, T, H, D), generator=make, device=DEVICE).to(case.tensors["qkv"].dtype)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bits_are_those_of_rope_and_attention(variant: str, heads: tuple[int, int]) -> None:
    """Rotation in place, and gradients side by side."""
    case = _case(variant, heads, 21, 24, torch.float16)
    incoming = _incoming(case)
    ours, parts = _results(_op, case, incoming), _results(_by_parts, case, incoming)
    for (name, mine), wanted in zip(ours.tensors().items(), parts.tensors().values(), strict=True):
        if "weight" in name:  # the partial sums are of other heads
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(mine, wanted), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_overwritten(variant: str) -> None:
    """Queries and keys that are rotated without QK-norm; never the values."""
    case = _case(variant, (4, 2), 9, 16, torch.float16)
    qkv = case.tensors["qkv"].clone()
    weights = {name: x for name, x in case.tensors.items() if name != "qkv"}
    assert packed_attention(qkv, **weights, **case.others) is not None
    before, after = (x.unflatten(-1, (8, 16)) for x in (case.tensors["qkv"], qkv))
    assert torch.equal(before[:, :, 6:], after[:, :, 6:])
    assert torch.equal(before, after) is (variant == "none" or "qk_norm" in variant)


def test_an_op_that_kept_the_projection_is_refused() -> None:
    """Its backward would read rotated queries."""
    case = _case("rope", (2, 2), 9, 16, torch.float16)
    qkv = case.tensors["qkv"].clone().requires_grad_().exp()  # exp keeps its output
    y = packed_attention(qkv, **case.others)
    assert y is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_may_be_recomputed(variant: str) -> None:
    """As with `recompute = "full"`: backward computes the projection again, which the op overwrites again."""
    case = _case(variant, (4, 2), 9, 16, torch.float16)
    others = case.others | {name: x for name, x in case.tensors.items() if name != "qkv"}
    found = []
    for again in (False, True):
        x = case.tensors["qkv"].clone().requires_grad_()
        function = lambda x: packed_attention(x * 2, **others)  # noqa: E731
        y = checkpoint(function, x, use_reentrant=False) if again else function(x)
        y.backward(_incoming(case))
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("variant", "D", "T", "dtype"),
    [
        ("rope", 16, 9, torch.float32),
        ("rope", 12, 9, torch.float16),
        ("rope", 136, 9, torch.float16),
        ("rope", 16, 1, torch.float16),
    ],
)
def test_what_cudnn_does_not_have_is_left_alone(variant: str, D: int, T: int, dtype: torch.dtype) -> None:
    case = _case(variant, (2, 2), T, D, dtype)
    qkv = case.tensors["qkv"].clone()
    assert packed_attention(qkv, **case.others) is None
    assert torch.equal(qkv, case.tensors["qkv"])


def test_it_is_not_for_deterministic_runs_or_for_tracers() -> None:
    case = _case("rope", (2, 2), 9, 16, torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        assert packed_attention(case.tensors["qkv"].clone(), **case.others) is None
    finally:
        torch.use_deterministic_algorithms(False)
    with FlopCounterMode(display=False):
        assert packed_attention(case.tensors["qkv"].clone(), **case.others) is None
    weight = torch.ones(16, device=DEVICE)
    none = case.others | {"cos": None, "sin": None}
    assert packed_attention(case.tensors["qkv"].clone(), **none, q_weight=weight, k_weight=weight) is None


SIZES = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=32", "--vocab_size=64", "--device=cpu"]


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("flags", "calls"), [([], 2), (["--dropout=0.1"], 0), (["--attention_backend=manual"], 0), (["--window=8"], 0)]
)
def test_the_model_calls_it_where_it_applies(
    preset: str, flags: list[str], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation too; not with dropout, a mask or another backend; the losses are the same."""
    config = command_line.resolve([*SIZES, f"--arch_preset={preset}", *flags]).config
    called = []

    def packed(*arguments: Any) -> Tensor:
        called.append(1)
        return reference.packed_attention(*arguments)

    ops = resolve_ops("eager", "cpu")
    plain = GPT(config.model, ops)
    model = GPT(config.model, dataclasses.replace(ops, packed_attention=packed))
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:])
    assert len(called) == calls
    model.eval(), plain.eval()
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), plain(tokens[:, :-1], tokens[:, 1:]))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDNN, reason="needs cuDNN's attention and nvidia-cudnn-frontend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "T", "D"), [((3, 3), 37, 24), ((12, 12), 1024, 64), ((8, 2), 515, 128), ((6, 1), 130, 80)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cudnn_is_as_exact_as_eager(variant: str, heads: tuple[int, int], T: int, D: int, dtype: torch.dtype) -> None:
    case = _case(variant, heads, T, D, dtype)
    incoming = _incoming(case)
    ours, eager = _results(_op, case, incoming), _results(reference.packed_attention, case, incoming)
    exact = _results(reference.packed_attention, case, incoming, torch.float64)
    for name, found in ours.tensors().items():
        wanted = exact.tensors()[name].double()
        kind = "column" if "weight" in name else "output"
        check(f"{variant} {name}", found, eager.tensors()[name], wanted, kind=kind, rows=2 * T * heads[0])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], None),
        (["--arch_preset=gpt2"], None),
        (["--recompute=full", "--compile=False"], None),
        (["--dropout=0.1"], "dropout"),
        (["--window=8"], "a window"),
        (["--document_mask=True"], "document_mask"),
        (["--attention_backend=manual"], "attention_backend = 'manual'"),
        (["--kernels=eager", "--compile=False"], "kernels = 'eager'"),
        (["--dtype=float32"], "dtype = 'float32'"),
        (["--deterministic=True"], "deterministic"),
        (["--compile=True"], "torch.compile"),
        (["--recompute=full"], "torch.compile"),
        (["--recompute=selective", "--compile=False"], "recompute = 'selective'"),
        (["--arch_preset=gpt2", "--qk_norm=True"], "qk_norm without rope"),
        (["--n_embd=48"], "head_dim = 12"),
    ],
)
def test_a_run_knows_why_attention_is_not_packed(
    flags: list[str], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [flag for flag in SIZES if flag != "--device=cpu"]
    config = command_line.resolve([*sizes, "--batch_size=1", "--arch_preset=llama", *flags]).config
    assert packing_problem(config, (9, 0), config.system.recompute) == problem
    assert packing_problem(config, (8, 0), config.system.recompute) == "this GPU"
    assert packing_problem(config, None, config.system.recompute) == "this GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ops = dataclasses.replace(resolve_ops("eager", "cpu"), packed_attention=reference.packed_attention, not_packed="")
    monkeypatch.setattr(engine, "resolve_ops", lambda *_: ops)
    built = engine.build_engine(config, Process(0, 1, torch.device("cpu"))).ops
    assert built.not_packed == (problem or "")
    assert (built.packed_attention is None) is (problem is not None)


def test_what_cudnn_refuses_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test, which expects that class, then leaves rope and attention as they are."""

    class Refusal(Exception):
        pass

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

        def sdpa_backward(self, **_: Any) -> list[Any]:
            return [self, self, self]

        def build(self, plans: Any) -> None:
            raise Refusal("no plan")

    kinds = SimpleNamespace(HALF=0, FLOAT=1)
    cudnn = SimpleNamespace(
        data_type=kinds,
        heur_mode=SimpleNamespace(A=0),
        pygraph=lambda **_: Anything(),
        cudnnGraphNotSupportedError=Refusal,
    )
    monkeypatch.setattr(module.importlib, "import_module", lambda name: cudnn)
    monkeypatch.setattr(module, "_handle", lambda device: None)
    layout = (((1, 2, 8, 16), (256, 128, 16, 1)),) * 9
    with pytest.raises(RuntimeError, match="no backward of attention for these tensors: no plan"):
        module._backward_graph(layout, torch.float16, 0)
