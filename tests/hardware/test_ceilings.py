"""Measured ceilings: the list of measurements, the arithmetic, the protocol and the command, without a GPU."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ceiling_helpers import ARGV, GPT, LLAMA, MACHINE, FakeRunner, measured, rate_of
from torch.utils.flop_counter import FlopCounterMode

from gptperf import flops, hardware
from gptperf.config import ModelConfig
from gptperf.errors import ConfigError, DeviceError, OutOfMemoryError
from gptperf.hardware import cuda_runner
from gptperf.hardware.__main__ import main
from gptperf.hardware.ceilings import ceiling_flop_s
from gptperf.hardware.measure import _window, measure
from gptperf.hardware.workload import CausalAttention, Copy, gemm_list, workload


@pytest.mark.parametrize("model", [LLAMA, GPT, ModelConfig()])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_works_are_the_flops_of_a_step(model: ModelConfig, batch_size: int) -> None:
    """Counted from shapes on one side, from the formula on the other: equal integers."""
    count = flops.flops_per_token(model)
    gemms = sum(gemm.count * gemm.amount for gemm in gemm_list(model, batch_size))
    assert gemms == 3 * batch_size * (count.qkv + count.output + count.ffn + count.lm_head)
    by_name = {work.name: work for work in workload(model, batch_size)}
    assert model.n_layer * by_name["attention_forward"].amount == batch_size * count.scores
    assert by_name["attention_backward"].amount == 2 * by_name["attention_forward"].amount
    assert by_name["square"].amount == 2 * 8192**3
    assert by_name["copy_2000mb"].amount == 4_000_000_000


def test_names_are_unique() -> None:
    names = [work.name for work in workload(LLAMA, 2)]
    assert len(set(names)) == len(names) == 15 + 1 + 2 + 2


def test_each_gemm_is_a_matmul_of_the_step() -> None:
    """The (m, n, k) of a linear's three matmuls are permutations of tokens, columns out and columns in."""
    by_name = {gemm.name: (gemm.m, gemm.n, gemm.k) for gemm in gemm_list(LLAMA, 4)}
    tokens, out, into = 4 * 32, 2 * 176, 64
    assert by_name["ffn_gate_up_forward"] == (tokens, out, into)
    assert by_name["ffn_gate_up_dgrad"] == (tokens, into, out)
    assert by_name["ffn_gate_up_wgrad"] == (out, into, tokens)
    assert by_name["qkv_forward"] == (tokens, 64 + 2 * 2 * 8, 64)
    assert by_name["lm_head_forward"] == (tokens, 112, 64)


def test_a_plugins_ffn_has_no_gemm_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptperf.registry._components", {("ffn_type", "moe"): object})
    with pytest.raises(ConfigError, match="component ffn_type = 'moe' has no card"):
        gemm_list(ModelConfig(ffn_type="moe"), 1)


def test_rates_come_out_as_they_are_and_the_warm_up_does_not_count() -> None:
    result = measured()
    for work in workload(LLAMA, 4):
        spread = result.spreads[work.name]
        assert (spread.p10, spread.median, spread.p90) == pytest.approx((rate_of(work),) * 3, rel=1e-9), work.name
    assert result.gemm_square_flop_s == pytest.approx(690e12)
    assert (result.attention_forward_flop_s, result.attention_backward_flop_s) == pytest.approx((509e12, 407e12))
    assert (result.copy_byte_s, result.copy_small_byte_s) == pytest.approx((4.25e12, 4.12e12))
    assert (result.device, result.driver, result.power_cap_w) == ("NVIDIA H200", "575.57.08", 700.0)


def test_the_mean_of_the_gemms_is_their_flops_over_their_time() -> None:
    result, gemms = measured(), gemm_list(LLAMA, 4)
    total = sum(gemm.count * gemm.amount for gemm in gemms)
    step_s = sum(gemm.count * gemm.amount / rate_of(gemm) for gemm in gemms)
    assert result.gemm_flop_s == pytest.approx(total / step_s, rel=1e-9)
    assert min(map(rate_of, gemms)) < result.gemm_flop_s < max(map(rate_of, gemms))


def test_protocol_windows_are_long_and_kinds_alternate() -> None:
    runner = FakeRunner(scatter=0.05)
    result = measure(LLAMA, 4, "bfloat16", runner=runner)
    names = [work.name for work in workload(LLAMA, 4)]
    long_ones = [name for name, _, elapsed_ms in runner.windows if elapsed_ms >= 300]
    assert long_ones == names * 6  # one of warm-up, five that count, in turn
    assert all(launches == int(launches) for _, launches, _ in runner.windows)
    assert max(elapsed_ms for _, _, elapsed_ms in runner.windows) < 20 * 300
    for name, spread in result.spreads.items():
        assert spread.p10 < spread.median < spread.p90, name
        assert spread.p90 / spread.p10 == pytest.approx(1.05 / 0.95, rel=1e-9)


def test_a_slow_first_call_does_not_shorten_the_windows() -> None:
    calls = []

    def timer(launches: int) -> float:
        calls.append(launches)
        return 250.0 if len(calls) == 1 else launches * 1e-3

    call_ms, launches = _window(timer, 1)
    assert call_ms == pytest.approx(1e-3)
    assert launches * 1e-3 >= 300


def test_ceiling_is_the_flops_over_the_time_of_the_matmuls() -> None:
    count = flops.FlopCount("strict", tokens=8, qkv=100, scores=60, output=40, ffn=200, lm_head=60)
    result = measured(gemm_flop_s=4.0, attention_forward_flop_s=2.0, attention_backward_flop_s=1.0)
    step_s = 3 * 400 / 4.0 + 60 / 2.0 + 2 * 60 / 1.0
    assert ceiling_flop_s(result, count) == pytest.approx(3 * 460 / step_s)


@pytest.mark.parametrize("rate", [1.0, 989.4e12])
def test_ceiling_of_equal_rates_is_that_rate(rate: float) -> None:
    rates = ("gemm_flop_s", "attention_forward_flop_s", "attention_backward_flop_s")
    result = measured(**dict.fromkeys(rates, rate))
    assert ceiling_flop_s(result, flops.flops_per_token(LLAMA)) == pytest.approx(rate, rel=1e-12)
    for name in rates:
        slower = dataclasses.replace(result, **{name: rate / 2})  # type: ignore[arg-type]
        assert rate / 2 < ceiling_flop_s(slower, flops.flops_per_token(LLAMA)) < rate


def test_ceiling_refuses_another_convention() -> None:
    with pytest.raises(ValueError, match="found 'palm', wanted 'strict'"):
        ceiling_flop_s(measured(), flops.flops_per_token(LLAMA, "palm"))


def test_command_measures_once_and_then_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runners = []

    def runner(*_: Any) -> FakeRunner:
        runners.append(FakeRunner())
        return runners[-1]

    monkeypatch.setattr(cuda_runner, "CudaRunner", runner)
    monkeypatch.setattr(cuda_runner, "current_machine", lambda: MACHINE)
    assert main(["--measure", *ARGV]) == 0
    first = capsys.readouterr()
    assert "NVIDIA H200, bfloat16, power cap 700 W, driver 575.57.08, torch 2.11.0+cu130" in first.out
    assert "measured ceiling: the model's matmuls" in first.out
    assert "4.250 TB/s" in first.out
    assert f"690.0 TFLOP/s{690 / 989.4:>8.1%} of peak" in first.out
    assert "kept in" in first.out
    assert main(["--measure", *ARGV]) == 0
    assert "  from " in capsys.readouterr().out
    assert len(runners) == 1
    assert main(["--measure", "--json", "--again", *ARGV]) == 0
    page = json.loads(capsys.readouterr().out)
    assert len(runners) == 2
    assert page["gemm_square_flop_s"] == pytest.approx(690e12)
    next(tmp_path.glob("gptperf/ceilings/*.json")).write_bytes(b"{}")
    assert main(["--measure", *ARGV]) == 0
    assert "must be measured again" in capsys.readouterr().err
    assert len(runners) == 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_there_is_one_clear_error() -> None:
    command = [sys.executable, "-m", "gptperf.hardware", "--measure", *ARGV]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == DeviceError.exit_code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "torch sees none; nearest: python -m gptperf.hardware" in done.stderr
    with pytest.raises(DeviceError, match="measured on a GPU"):
        measure(LLAMA, 4, "bfloat16")


@pytest.fixture
def cpu_runner(monkeypatch: pytest.MonkeyPatch) -> cuda_runner.CudaRunner:
    """The runner of the GPU, with its operands on the CPU."""
    monkeypatch.setattr(cuda_runner, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_runner, "current_machine", lambda: MACHINE)
    works = [work for work in workload(LLAMA, 2) if work.name != "square"]
    return cuda_runner.CudaRunner(LLAMA, works, "float32")


def test_the_runners_gemms_are_those_of_the_list(cpu_runner: cuda_runner.CudaRunner) -> None:
    """As many FLOPs as PyTorch counts, and operands in the layout that the step has them in."""
    for gemm in gemm_list(LLAMA, 2):
        call = cpu_runner._gemm(gemm)
        with FlopCounterMode(display=False) as counter:
            result: Any = call()
        assert counter.get_total_flops() == gemm.amount, gemm.name
        assert result.shape == (gemm.m, gemm.n)
        assert result.is_contiguous()
        layout = {"forward": "mk,nk->mn", "dgrad": "mk,kn->mn", "wgrad": "km,kn->mn"}[gemm.kind]
        sizes = {"m": gemm.m, "n": gemm.n, "k": gemm.k}
        shapes = [[sizes[axis] for axis in axes] for axes in layout.partition("->")[0].split(",")]
        pools = zip((cpu_runner.a, cpu_runner.b), shapes, strict=True)
        a, b = (pool[: math.prod(shape)].view(*shape).double() for pool, shape in pools)
        # float32 sums of k products of normal numbers: k units in the last place of the largest sum at most.
        torch.testing.assert_close(result.double(), torch.einsum(layout, a, b), rtol=0, atol=gemm.k * 2.0**-23 * 100)


def test_the_runners_attention_and_copies(cpu_runner: cuda_runner.CudaRunner) -> None:
    by_name = {work.name: work for work in workload(LLAMA, 2)}
    forward, backward = by_name["attention_forward"], by_name["attention_backward"]
    assert isinstance(forward, CausalAttention)
    assert isinstance(backward, CausalAttention)
    y: Any = cpu_runner._attention(forward)()
    assert y.shape == (2, 32, 8, 8)
    assert y.requires_grad
    call = cpu_runner._attention(backward)
    for _ in range(2):  # again and again
        gradients: Any = call()
    assert [tuple(g.shape) for g in gradients] == [(2, 32, 8, 8), (2, 32, 2, 8), (2, 32, 2, 8)]
    copies: Any = [copy() for copy in cpu_runner._copies(Copy("copy", 4096))]
    assert [tuple(copy.shape) for copy in copies] == [(1024,)] * 3
    assert torch.equal(copies[0], copies[1]) or torch.equal(-copies[0], copies[1])


def test_a_gpu_that_is_too_small_says_so(cpu_runner: cuda_runner.CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(cuda_runner.CudaRunner, "_random", full)
    with pytest.raises(OutOfMemoryError, match=r"operands need 270\.3 kB; lower --batch_size"):
        cuda_runner.CudaRunner(LLAMA, gemm_list(LLAMA, 2), "float32")
    with pytest.raises(OutOfMemoryError, match="attention_forward does not fit"):
        cpu_runner.prepare(workload(LLAMA, 2)[-4])


def test_bfloat16_needs_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "current_machine", lambda: dataclasses.replace(MACHINE, device="Tesla V100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(DeviceError, match=r"Tesla V100 has no bfloat16 units; nearest: --dtype=float16"):
        cuda_runner.CudaRunner(LLAMA, gemm_list(LLAMA, 2), "bfloat16")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Rates are positive, below what the data sheet allows, and bounded by each other."""
    model = ModelConfig(n_layer=2, n_head=8, n_embd=1024, block_size=1024)
    dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    result = measure(model, 4, dtype, rounds=3)
    peak = hardware.peak_flop_s(hardware.match_gpu(result.device), dtype)
    for name in ("gemm_flop_s", "gemm_square_flop_s", "attention_forward_flop_s", "attention_backward_flop_s"):
        assert 1e10 < getattr(result, name) < (math.inf if peak is None else peak.flop_s), name
    ceiling = ceiling_flop_s(result, flops.flops_per_token(model))
    slowest = min(result.attention_forward_flop_s, result.attention_backward_flop_s, result.gemm_flop_s)
    assert slowest <= ceiling <= max(result.attention_forward_flop_s, result.gemm_flop_s)
