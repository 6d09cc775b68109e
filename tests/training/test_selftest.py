"""The self-test before training: working kernels pass, and a broken one is replaced or refused, with the reason."""

import importlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.errors import TritonError

from gptperf.config import command_line
from gptperf.distributed.process import start_process
from gptperf.errors import DeviceError
from gptperf.kernels import decode_linear, draw, reference
from gptperf.ops import OPS, Ops, keeping_ffn, resolve_ops, without_triton
from gptperf.registry import KINDS
from gptperf.training import engine as engine_module
from gptperf.training import selftest
from gptperf.training.step import train_step

SIZES = ["--n_layer=1", "--n_head=4", "--n_embd=48", "--vocab_size=300", "--d_ff=100", "--arch_preset=llama"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter; the GPU's is in test_gpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts fewer numbers at once, and runs fewer programs, which takes the interpreter seconds."""
    monkeypatch.setattr(draw, "CHUNK", 64)
    monkeypatch.setattr(decode_linear, "PROGRAMS", 4)


def _ops(**broken: Any) -> Ops:
    """Returns Triton's ops, which run in the interpreter."""
    ours = {op: getattr(importlib.import_module(module), op) for op, module in OPS.items()}
    return Ops(**ours | broken, chosen=dict.fromkeys(ours, "triton"), reasons={})


def _broken(ops: Ops, *flags: str) -> dict[str, str]:
    return selftest.broken_ops(
        ops, command_line.resolve([*SIZES, *flags]).config.model, torch.device("cpu"), torch.float32
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--qk_norm=True", "--rope_pairs=interleaved", "--n_kv_head=2"],
        ["--normalization=layernorm", "--position_encoding=none", "--ffn_type=standard", "--activation=relu_squared"],
        ["--normalization=layernorm_nobias"],
    ],
)
def test_what_works_passes(flags: list[str]) -> None:
    assert _broken(_ops(), *flags) == {}


def test_every_op_is_run_for_some_model() -> None:
    """The cards of the components name the ops, and every op that they name has arguments here."""
    found: set[str] = set()
    kinds = ("normalization", "position_encoding", "ffn_type")
    for names in itertools.product(*(KINDS[kind] for kind in kinds)):
        flags = [f"--{kind}={name}" for kind, name in zip(kinds, names, strict=True)]
        model = command_line.resolve([*SIZES, *flags]).config.model
        found |= {op for op, _ in selftest._runs(model, torch.device("cpu"), torch.float32)}
    assert found == {*OPS, "packed_attention"}


def test_eager_ops_are_not_run() -> None:
    assert _broken(resolve_ops("eager", "cpu")) == {}


def test_ops_that_keep_the_activation_are_run_so() -> None:
    ran: list[bool] = []

    def swiglu(*tensors: Tensor, recompute: bool = True) -> Tensor:
        ran.append(recompute)
        return reference.swiglu(*tensors)

    assert _broken(keeping_ffn(_ops(swiglu=swiglu))) == {}
    assert ran == [False]


def test_a_wrong_result_is_found() -> None:
    def forgets_the_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Any:
        y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return y if residual is None else (y, x + residual)

    def drops_the_tail(x: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> Tensor:
        return reference.linear_cross_entropy(x, torch.cat([weight[:-40], weight[-40:].detach()]), targets)

    wrong = {"rms_norm": forgets_the_residual, "linear_cross_entropy": drops_the_tail, "adamw": lambda *_: None}
    wrong["accumulate"] = lambda total, gradient: total.copy_(gradient)
    wrong["symmetric_matmul"] = lambda x, *_: reference.symmetric_matmul(x)
    found = _broken(_ops(**wrong))
    assert set(found) == set(wrong)
    assert "off eager PyTorch by" in found["rms_norm"]


@pytest.mark.parametrize(
    ("micro_batches", "dtype", "wanted"),
    [(1, "bfloat16", "bfloat16"), (2, "bfloat16", "float32"), (1, "float16", "float32"), (1, "float32", "float32")],
)
def test_adamw_is_run_with_the_dtypes_of_the_step(
    micro_batches: int, dtype: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dtype has a kernel of its own, and a kernel that does not compile has to be found before the first step."""
    kinds: list[tuple[torch.dtype, ...]] = []

    def adamw(master: Tensor, *others: Any) -> None:
        kinds.append(tuple(x.dtype for x in (master, *others[:4]) if x is not None))
        reference.adamw(master, *others)

    ops = replace(resolve_ops("eager", "cpu"), adamw=adamw, chosen={"adamw": "triton"})
    monkeypatch.setattr(engine_module, "resolve_ops", lambda *_: ops)
    flags = [*SIZES, f"--dtype={dtype}", f"--gradient_accumulation_steps={micro_batches}", "--block_size=16"]
    config = command_line.resolve([*flags, "--batch_size=1", "--device=cpu", "--compile=False"]).config
    engine = engine_module.build_engine(config, start_process("cpu"))
    assert engine.ops.reasons == {}
    (tested,) = kinds
    assert tested[1] == getattr(torch, wanted)
    train_step(engine, iter(torch.zeros(micro_batches, 2, 1, 16, dtype=torch.int64)), 0)
    assert tested in kinds[1:]


def _packed(scale: float) -> Any:
    """The reference times a factor; None for a factor of 0, as where the op cannot run."""
    return lambda *given: scale * reference.packed_attention(*given) if scale else None


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_packed_attention_is_compared_where_it_runs(preset: str) -> None:
    """What fails leaves rope and attention as they are, with kernels = "triton" too."""

    def fails(*_: object) -> None:
        raise RuntimeError("cuDNN has no backward of attention")

    flags = (f"--arch_preset={preset}",)
    for packed, wanted in ((_packed(1.0), ""), (_packed(0.0), ""), (_packed(1.2), "off eager"), (fails, "no backward")):
        ops = replace(_ops(), packed_attention=packed)
        found = _broken(ops, *flags)
        assert set(found) == ({"packed_attention"} if wanted else set())
        assert wanted in found.get("packed_attention", "")
        left = without_triton(ops, "triton", found)
        assert (left.packed_attention is None) is (wanted != "")
        assert left.not_packed == found.get("packed_attention", "")
        assert set(left.chosen.values()) == {"triton"}


def test_a_kernel_that_fails_is_named() -> None:
    def fails(*_: object) -> None:
        raise TritonError("out of resource: shared memory")

    def finds_no_cache(*_: object) -> None:
        raise PermissionError("read-only file system")

    assert "PermissionError: read-only" in _broken(_ops(rope=finds_no_cache))["rope"]
    assert "out of resource: shared memory" in _broken(_ops(swiglu=fails))["swiglu"]


def test_auto_leaves_a_broken_op_to_eager_and_triton_refuses() -> None:
    ops = without_triton(_ops(), "auto", {"rope": "its kernel failed"})
    assert ops.chosen["rope"] == "eager"
    assert ops.chosen["swiglu"] == "triton"
    assert ops.rope is reference.rope
    assert ops.reasons == {"rope": "its kernel failed"}
    with pytest.raises(DeviceError, match="rope: its kernel failed"):
        without_triton(_ops(), "triton", {"rope": "its kernel failed"})
