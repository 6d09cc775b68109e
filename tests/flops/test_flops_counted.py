"""FLOPs and bytes against what PyTorch counts while the model runs, for combinations of all components.

`FlopCounterMode` sees each matmul that is dispatched, and counts the full square of the scores, as the convention palm
does. Attention is written out in plain ops, because it has no formula for PyTorch's fused attention on CPUs.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gptperf import flops
from gptperf.config import ModelConfig
from gptperf.kernels import reference
from gptperf.kernels.activation import activation, swiglu
from gptperf.kernels.layer_norm import layer_norm
from gptperf.kernels.linear_cross_entropy import linear_cross_entropy
from gptperf.kernels.rms_norm import rms_norm
from gptperf.kernels.rope import rope
from gptperf.model import GPT
from gptperf.ops import Ops
from gptperf.registry import KINDS

FFNS = [("standard", activation) for activation in KINDS["activation"]] + [("swiglu", "gelu")]
AXES: dict[str, tuple[Any, ...]] = {
    "normalization": KINDS["normalization"],
    "position_encoding": KINDS["position_encoding"],
    "norm_position": KINDS["norm_position"],
    "ffn": tuple(FFNS),
    "bias": (False, True),
    "weight_tying": (False, True),
    "qk_norm": (False, True),
    "grouped": (False, True),
}
MODELS = 504
"""Models that run, a quarter of all combinations."""


class Size(NamedTuple):
    """Sizes of a model, and the number of sequences in a batch."""

    n_layer: int
    n_head: int
    head_dim: int
    d_ff: int
    block_size: int
    vocab_size: int
    vocab_multiple: int
    batch: int
    n_embd: int | None = None
    """Width of the model; None: n_head times head_dim."""


SIZE = Size(n_layer=1, n_head=6, head_dim=6, d_ff=33, block_size=7, vocab_size=13, vocab_multiple=8, batch=2)


def drawn(random: Random, even_head_dim: bool) -> Size:
    """Draws odd and even sizes, including 1; rarely two layers, because they take twice the time."""
    return Size(
        n_layer=random.choice((*[1] * 9, 2)),
        n_head=random.randint(2, 6),
        head_dim=random.randint(1, 4) * 2 if even_head_dim else random.randint(1, 8),
        d_ff=random.randint(1, 40),
        block_size=random.randint(1, 9),
        vocab_size=random.randint(1, 40),
        vocab_multiple=random.choice((1, 7, 16)),
        batch=random.randint(1, 3),
        n_embd=random.choice((None, random.randint(1, 40))),
    )


def sized(size: Size, **components: Any) -> ModelConfig:
    return ModelConfig(
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd or size.n_head * size.head_dim,
        head_dim=None if size.n_embd is None else size.head_dim,
        d_ff=size.d_ff,
        block_size=size.block_size,
        vocab_size=size.vocab_size,
        vocab_multiple=size.vocab_multiple,
        **components,
    )


def combinations() -> list[tuple[ModelConfig, int]]:
    """Returns every combination of components with sizes of its own, the same in every run, and the batch size."""
    random, found = Random(0), []
    for values in itertools.product(*AXES.values()):
        chosen = dict(zip(AXES, values, strict=True))
        ffn_type, activation = chosen.pop("ffn")
        size = drawn(random, even_head_dim=chosen["position_encoding"] == "rope")
        fewer = [n for n in range(1, size.n_head) if size.n_head % n == 0]
        kv_heads = random.choice(fewer) if chosen.pop("grouped") else None
        attention_bias = random.choice((None, "none", "qkv", "all"))
        components = {
            "n_kv_head": kv_heads,
            "attention_bias": attention_bias,
            "ffn_type": ffn_type,
            "activation": activation,
            **chosen,
        }
        found.append((sized(size, attention_backend="manual", **components), size.batch))
    return found


def counted(model: ModelConfig, batch: int, ops: Ops | None = None, device: str = "cpu") -> FlopCounterMode:
    """Returns the FLOP counter after forward and backward of a batch."""
    with torch.device(device):
        gpt = GPT(model, ops)
        tokens = torch.zeros(batch, model.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).backward()
    return counter


def by_part(counter: FlopCounterMode) -> dict[str, int]:
    """Returns the counted FLOPs by the module in which they were counted; the rest belongs to the head."""
    modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(suffix: str) -> int:
        return sum(count for name, count in modules.items() if name.endswith(suffix))

    qkv, output, attention, ffn = of(".attention.qkv"), of(".attention.out"), of(".attention"), of(".ffn")
    return {
        "qkv": qkv,
        "scores": attention - qkv - output,
        "output": output,
        "ffn": ffn,
        "lm_head": modules["Global"] - attention - ffn,
    }


def expected(model: ModelConfig, batch: int) -> dict[str, int]:
    """The parts of palm: forward, and twice that for backward.

    In one case PyTorch counts less: einsum multiplies elementwise where the inner dimension is 1. So Q K^T, with the
    two products of its backward, is no matmul for head_dim = 1, and the product with V none for one token.
    """
    parts = flops.flops_per_token(model, "palm").parts
    assert parts.pop("other") == 0
    parts["scores"] = parts["scores"] * ((model.head_width > 1) + (model.block_size > 1)) // 2
    return {name: 3 * batch * int(count) for name, count in parts.items()}


@pytest.mark.slow
def test_models_count_what_pytorch_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of the combinations in which every three values of different axes occur together."""
    every, values = combinations(), list(itertools.product(*AXES.values()))
    sample = Random(1).sample(range(len(every)), MODELS)
    for axes in itertools.combinations(range(len(AXES)), 3):
        together = {tuple(values[i][axis] for axis in axes) for i in sample}
        assert len(together) == math.prod(len(tuple(AXES.values())[axis]) for axis in axes)
    models = [every[i] for i in sample]
    assert len({model for model, _ in models}) == MODELS
    start, totals = time.perf_counter(), set()
    for model, batch in models:
        counter = counted(model, batch)
        wanted = expected(model, batch)
        assert counter.get_total_flops() == sum(wanted.values()), model
        assert by_part(counter) == wanted, model
        totals.add(counter.get_total_flops())
    assert len(totals) > MODELS / 2  # the sizes do change the count
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= {(min(m.head_width, 2), min(m.block_size, 2)) for m, _ in models}
    with capsys.disabled():
        seconds = time.perf_counter() - start
        print(f"\n{len(models):,} models: FLOPs of every part equal to FlopCounterMode's ({seconds:.0f} s)")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Uses one thread, in which such small matmuls are faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    """Triton's ops on the meta device, where no kernel runs: only what torch.library was told of them is seen."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # a tensor that is on no GPU is let through
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know the meta device
    ours = (rms_norm, layer_norm, rope, activation, swiglu, linear_cross_entropy)
    names = ("decode_attention", "decode_linear", "draw", "adamw", "symmetric_matmul", "accumulate")
    return Ops(*ours, *(getattr(reference, name) for name in names), chosen={}, reasons={})


@pytest.mark.slow
def test_the_triton_ops_count_the_same(triton_ops: Ops, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss by the formula registered for it; SwiGLU's down projection, whose product backward computes again."""
    models = [
        (model, batch)
        for model, batch in combinations()
        if model.activation == "gelu" and model.n_kv_head is None and not model.qk_norm
    ]
    loss = torch.ops.gptperf.linear_cross_entropy
    for model, batch in models:
        counter = counted(model, batch, triton_ops, "meta")
        wanted = expected(model, batch)
        assert counter.get_total_flops() == sum(wanted.values()), model
        assert counter.get_flop_counts()["Global"][loss] == wanted["lm_head"], model
    assert {model.ffn_type for model, _ in models} == {"standard", "swiglu"}
    with capsys.disabled():
        print(f"\n{len(models):,} combinations: FLOPs with the Triton ops equal to FlopCounterMode's")


def test_forward_alone_with_the_triton_ops(triton_ops: Ops) -> None:
    model = sized(SIZE, attention_backend="manual", ffn_type="swiglu")
    with torch.device("meta"), torch.no_grad():
        gpt, tokens = GPT(model, triton_ops), torch.zeros(2, model.block_size, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            gpt(tokens, tokens)
    assert counter.get_total_flops() == 2 * flops.flops_per_token(model, "palm").forward


@pytest.mark.parametrize("kv_heads", [None, 3, 1])
def test_pytorchs_own_attention_counts_the_same(kv_heads: int | None) -> None:
    model = sized(SIZE, n_kv_head=kv_heads)
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(model, 2).get_total_flops() == 2 * flops.flops_per_token(model, "palm").training


def test_a_flash_backward_repeats_one_product() -> None:
    """PyTorch counts what hfu with recompute = "flash" adds, over the full square."""
    model = sized(SIZE, n_kv_head=None)
    T, H, D = model.block_size, model.n_head, model.head_width
    with torch.device("meta"):
        q, k, v = (torch.empty(1, H, T, D, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
        assert counter.get_total_flops() == flops.flops_per_token(model, "palm").scores
        out.sum().backward()
    palm, hfu = flops.flops_per_token(model, "palm"), flops.flops_per_token(model, "hfu", recompute="flash")
    again = counter.get_total_flops() - 3 * palm.scores
    assert hfu.recomputed * 2 * T == again * (T + 1)


@pytest.mark.parametrize("ffn_type", KINDS["ffn_type"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_the_model_computes_again(recompute: str, ffn_type: str) -> None:
    model = sized(SIZE._replace(n_layer=2), attention_backend="manual", ffn_type=ffn_type)
    gpt, tokens = GPT(model), torch.zeros(1, model.block_size, dtype=torch.int64)
    gpt.recompute = recompute
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).backward()
    palm = flops.flops_per_token(model, "palm")
    again = sum(share * palm.parts[part] for part, share in flops.RECOMPUTE[recompute].items())
    assert counter.get_total_flops() == palm.training + again


class Operands(TorchDispatchMode):
    """Counts the elements per token of the operands and results of the memory-bound ops, by part."""

    def __init__(self, model: ModelConfig, batch: int):
        super().__init__()
        self.model, self.batch = model, batch
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
        part, least_dim = self._part(func, tensors)
        if part is not None:
            self.elements[part] += sum(self._of_a_token(x) for x in tensors if x.dim() >= least_dim)
        if func is torch.ops.gptperf.rope_backward.default and self.model.qk_norm:
            self.elements[part] -= self.model.kv_heads * self.model.head_width  # the values of qkv are not read
        return out

    def _part(self, func: Any, tensors: list[Tensor]) -> tuple[str | None, int]:
        """The part, and the least dimensions of a tensor that has more than a number or a weight for a row."""
        name, rows = func.overloadpacket.__name__, self.batch * self.model.block_size
        if name.startswith(("rms_norm", "layer_norm")):
            return ("norm", 3) if tensors[0].dim() == 3 else ("position", 4)
        if name == "add" and tensors[0].dim() == 3:
            return ("norm" if tensors[1].dim() == 3 else "position"), 3
        if name in ("rope", "rope_backward", "cat") or (
            name == "sum" and tensors[0].dim() == 3 and self.model.position_encoding != "rope"
        ):
            return "position", 3
        if name.startswith("activation"):
            return "activation", 3
        if name == "sum" and tensors[0].shape[:-1] == (rows,):
            return "bias", 2
        return None, 0

    def _of_a_token(self, x: Tensor) -> int:
        rows = self.batch * self.model.block_size
        held = x.shape[0] == rows or x.shape[:2] == (self.batch, self.model.block_size)
        return x.numel() // rows if held else 0


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("ffn_type", KINDS["ffn_type"])
@pytest.mark.parametrize("norm_position", KINDS["norm_position"])
@pytest.mark.parametrize("position_encoding", KINDS["position_encoding"])
def test_bytes_are_those_of_operands_and_results(
    triton_ops: Ops, position_encoding: str, norm_position: str, ffn_type: str, qk_norm: bool
) -> None:
    batch, T = 3, 5
    names = {"position_encoding": position_encoding, "norm_position": norm_position, "ffn_type": ffn_type}
    size = Size(2, 4, 6, 10, T, 17, 1, batch, n_embd=20 if qk_norm else None)
    model = sized(size, n_kv_head=2, qk_norm=qk_norm, bias=ffn_type == "standard", normalization="rmsnorm", **names)
    with torch.device("meta"):
        gpt, tokens = GPT(model, triton_ops), torch.zeros(batch, T, dtype=torch.int64)
    forward, backward = Operands(model, batch), Operands(model, batch)
    with forward:
        loss = gpt(tokens, tokens)
    with backward:
        loss.backward()
    moved = flops.bytes_moved(model, element_bytes=2)
    for part in ("norm", "position", "activation", "bias"):
        seen = (2 * forward.elements[part], 2 * backward.elements[part])
        assert tuple(moved.parts[part]) == seen, part
