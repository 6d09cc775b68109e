"""Measured ceilings: the list of works, the arithmetic, the protocol and the cache, without a GPU."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptperf import flops, hardware
from gptperf.config import ModelConfig, command_line
from gptperf.errors import ConfigError, DeviceError, DiskError, OutOfMemoryError
from gptperf.hardware import ceiling_cache, cuda_runner
from gptperf.hardware.__main__ import main
from gptperf.hardware.ceilings import Ceilings, Machine, ceiling_flop_s
from gptperf.hardware.measure import _window, measure
from gptperf.hardware.workload import CausalAttention, Copy, Gemm, Timer, Work, gemm_list, workload

LLAMA = ModelConfig(
    n_layer=3,
    n_head=8,
    n_kv_head=2,
    n_embd=64,
    d_ff=176,
    block_size=32,
    vocab_size=100,
    vocab_multiple=16,
    ffn_type="swiglu",
    position_encoding="rope",
    weight_tying=False,
)
GPT = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=90)
MACHINE = Machine(
    device="NVIDIA H200",
    driver="575.57.08",
    versions={"torch": "2.11.0+cu130", "cuda": "13.0", "cudnn": "91900"},
    power_cap_w=700.0,
    power_default_w=700.0,
)
WHERE = ("bfloat16", "NVIDIA H200", "575.57.08", "2.11.0+cu130")


def rate_of(work: Work) -> float:
    """A rate of its own for every work, in FLOP/s or byte/s."""
    base = {"forward": 700e12, "dgrad": 650e12, "wgrad": 600e12}
    if isinstance(work, Gemm):
        return 690e12 if work.name == "square" else base[work.kind] - len(work.name) * 1e12
    if isinstance(work, Copy):
        return 4.25e12 if work.buffer_bytes > 1e9 else 4.12e12
    return 509e12 if work.name == "attention_forward" else 407e12


class FakeRunner:
    """Works at known rates; the first round is ten times as slow, later ones scatter by `scatter` up and down."""

    def __init__(self, rate: Callable[[Work], float] = rate_of, scatter: float = 0.0):
        self.rate, self.scatter = rate, scatter
        self.windows: list[tuple[str, int, float]] = []

    def machine(self) -> Machine:
        return MACHINE

    def prepare(self, work: Work) -> Timer:
        long_windows = 0

        def timer(launches: int) -> float:
            nonlocal long_windows
            slower = 10.0 if long_windows == 0 else 1 + self.scatter * (long_windows % 3 - 1)
            elapsed_ms = launches * work.amount / self.rate(work) * 1e3 * slower
            self.windows.append((work.name, launches, elapsed_ms))
            long_windows += elapsed_ms >= 300
            return elapsed_ms

        return timer


def measured(model: ModelConfig = LLAMA, batch_size: int = 4, **changed: Any) -> Ceilings:
    return dataclasses.replace(measure(model, batch_size, "bfloat16", runner=FakeRunner()), **changed)


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


def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changed: Any) -> tuple[Ceilings, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result, path = measured(**changed), ceiling_cache.cache_path(LLAMA, 4, *WHERE)
    ceiling_cache.save(result, path)
    return result, path


def loaded(*where: Any, **more: Any) -> tuple[Ceilings | None, list[str]]:
    said: list[str] = []
    return ceiling_cache.load(*where, **more, say=said.append), said


def test_what_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, path = kept(monkeypatch, tmp_path)
    assert path.parent == tmp_path / "gptperf" / "ceilings"
    assert path.name.startswith("NVIDIA_H200-bfloat16-driver_575.57.08-torch_2.11.0+cu130-")
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=700.0) == (result, [])
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary one is left
    ceiling_cache.save(dataclasses.replace(result, gemm_flop_s=1.0), path)
    again, _ = loaded(LLAMA, 4, *WHERE)
    assert again is not None
    assert again.gemm_flop_s == 1.0


def test_whatever_changes_the_ceilings_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheres: list[Any] = [
        (LLAMA, 4, *WHERE),
        (LLAMA, 5, *WHERE),
        (GPT, 4, *WHERE),
        (dataclasses.replace(LLAMA, n_kv_head=4), 4, *WHERE),
        (dataclasses.replace(LLAMA, attention_backend="manual"), 4, *WHERE),
        (LLAMA, 4, "float16", *WHERE[1:]),
        (LLAMA, 4, "bfloat16", "NVIDIA H200 NVL", *WHERE[2:]),
        (LLAMA, 4, *WHERE[:2], "580.1", WHERE[3]),
        (LLAMA, 4, *WHERE[:3], "2.12.0"),
    ]
    assert len({ceiling_cache.cache_path(*where) for where in wheres}) == len(wheres)
    same = dataclasses.replace(LLAMA, dropout=0.1, norm_eps=1e-6)
    assert ceiling_cache.cache_path(same, 4, *WHERE) == ceiling_cache.cache_path(LLAMA, 4, *WHERE)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):  # a relative one is not to be used, says the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert ceiling_cache.cache_path(LLAMA, 4, *WHERE).parent == tmp_path / ".cache" / "gptperf" / "ceilings"
    assert ceiling_cache.cache_path(LLAMA, 4, "bfloat16", "../../etc/x", None, "/").parent.name == "ceilings"


def damages(data: bytes) -> dict[str, bytes]:
    page = json.loads(data)
    other_version = page | {"version": 0}
    fewer = page["ceilings"].copy()
    del fewer["protocol"]
    return {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "bit": data.replace(b'"gemm_square_flop_s": 69', b'"gemm_square_flop_s": 99', 1),
        "not utf-8": b"\xff" + data,
        "list": b"[]",
        "version": json.dumps(other_version).encode(),
        "field": json.dumps({"version": 1, "sha256": ceiling_cache._digest(fewer), "ceilings": fewer}).encode(),
    }


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "not utf-8", "list", "version", "field"])
def test_a_damaged_file_is_refused_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    _, path = kept(monkeypatch, tmp_path)
    data = path.read_bytes()
    changed = damages(data)[damage]
    assert changed != data
    path.write_bytes(changed)
    found, said = loaded(LLAMA, 4, *WHERE)
    assert found is None
    assert len(said) == 1
    assert said[0].startswith(f"{path}: not used, the ceilings have to be measured again: ")


def test_a_link_and_a_strangers_file_are_refused_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, path = kept(monkeypatch, tmp_path)
    stranger = ceiling_cache.cache_path(GPT, 4, *WHERE)
    path.rename(stranger)
    found, said = loaded(GPT, 4, *WHERE)
    assert (found, len(said)) == (None, 1)
    assert "not used: found ceilings of" in said[0]
    path.symlink_to(stranger)
    found, said = loaded(LLAMA, 4, *WHERE)
    assert (found, len(said)) == (None, 1)


def test_another_power_cap_is_another_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = kept(monkeypatch, tmp_path)
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=700.4)[0] == result
    found, said = loaded(LLAMA, 4, *WHERE, power_cap_w=500.0)
    assert found is None
    assert "measured at 700 W, and the power cap is 500 W now" in said[0]
    assert loaded(LLAMA, 4, *WHERE, power_cap_w=None)[0] == result


def test_no_file_is_no_ceilings_and_no_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loaded(LLAMA, 4, *WHERE) == (None, [])


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        ceiling_cache.save(measured(), tmp_path / "file" / "x.json")


ARGV = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=16", "--vocab_size=90", "--batch_size=4"]


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
    assert "have to be measured again" in capsys.readouterr().err
    assert len(runners) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_there_is_one_clear_error() -> None:
    command = [sys.executable, "-m", "gptperf.hardware", "--measure", *ARGV]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == DeviceError.exit_code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "torch sees none here; nearest: python -m gptperf.hardware" in done.stderr
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
    with pytest.raises(OutOfMemoryError, match=r"operands need 0.0 GB; lower --batch_size"):
        cuda_runner.CudaRunner(LLAMA, gemm_list(LLAMA, 2), "float32")
    with pytest.raises(OutOfMemoryError, match="attention_forward does not fit"):
        cpu_runner.prepare(workload(LLAMA, 2)[-4])


def test_bfloat16_needs_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "current_machine", lambda: dataclasses.replace(MACHINE, device="Tesla V100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(DeviceError, match=r"Tesla V100 has no bfloat16 units; nearest: --dtype=float16"):
        cuda_runner.CudaRunner(LLAMA, gemm_list(LLAMA, 2), "bfloat16")


def test_load_needs_no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept(monkeypatch, tmp_path)
    config = command_line.resolve(ARGV).config
    ceiling_cache.save(measured(config.model), ceiling_cache.cache_path(config.model, 4, *WHERE))
    code = (
        "import sys\nfrom gptperf.config import command_line\nfrom gptperf.hardware import ceiling_cache\n"
        f"model = command_line.resolve({ARGV!r}).config.model\n"
        f"found = ceiling_cache.load(model, 4, *{WHERE!r})\n"
        "sys.exit(found is None or 'torch' in sys.modules)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


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
