"""The cell of a step on a CPU, with a simulated clock and profile in place of the GPU's."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from bench.measure import monitoring, step, timing
from bench.measure.models import resolve
from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.distributed.process import start_process
from gptperf.hardware import Peak
from gptperf.monitor import step_timing, trace
from gptperf.training.step import StepResult, train_step

GEMM_US, OTHER_US = 30.0, 20.0


def small(model: str, variant: str) -> Config:
    config = resolve(model, variant)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64, "d_ff": None}
    changed = dataclasses.replace(config.model, **sizes)
    train = dataclasses.replace(config.train, batch_size=2)
    system = dataclasses.replace(config.system, kernels="eager", compile=False, dtype="float32")
    return dataclasses.replace(config, model=changed, train=train, system=system)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs steps on the CPU, each of which takes 2 ms by the clock. Returns their numbers."""
    ran: list[int] = []

    def window(run: Any, watch: Any) -> step_timing.Window:
        def timed(first: int, steps: int) -> list[float]:
            for number in range(first, first + steps):
                run(number)
                ran.append(number)
            watch()
            return [2.0] * steps

        return timed

    def traced(run: Any, first: int, steps: int, *, warm_up: int) -> dict[str, Any]:
        events = []
        assert warm_up == math.ceil(step.WARM_UP_MS / 2)
        for number in range(first, first + steps):
            run(number)
            ran.append(number)
            for name, begin, dur in (("nvjet_x", 0.0, GEMM_US), ("_norm_forward_kernel", GEMM_US, OTHER_US)):
                ts = number * (GEMM_US + OTHER_US) + begin
                events.append({"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur})
        return {"traceEvents": events}

    for module in (step, monitoring):
        monkeypatch.setattr(module, "resolve", small)
        monkeypatch.setattr(module, "start_process", lambda device: start_process("cpu"))
    monkeypatch.setattr(step, "_probe_tflops", lambda: 600.0)
    monkeypatch.setattr(step, "peak_here", lambda config: Peak(1e12, "dense", "a peak"))
    monkeypatch.setattr(timing, "device_uuid", lambda: "GPU-none")
    monkeypatch.setattr(step_timing, "cuda_window", window)
    monkeypatch.setattr(trace, "trace_steps", traced)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return ran


RATES = {"gemm_flop_s": 1e11, "attention_forward_flop_s": 1e11, "attention_backward_flop_s": 1e11, "copy_byte_s": 1e10}


def test_the_cell_holds_all_that_was_asked_for(without_gpu: list[int]) -> None:
    found = step.measure("llama_124m", "eager", 5, profile=True, ceilings={**RATES, "date": "today"})
    json.dumps(found, allow_nan=False)
    cell, config = found["results"], small("llama_124m", "eager")
    assert without_gpu == list(range(len(without_gpu)))  # a step after the other: warm-up, timed, profiled
    assert len(without_gpu) == cell["warm_up_steps"] + 5 + step.PROFILED
    assert found["config"] == config.sections()
    assert found["ops"] == dict.fromkeys(found["ops"], "eager")
    tokens_s = 2 * 16 / 2e-3
    assert cell["tokens_per_sec"] == pytest.approx(tokens_s)
    assert set(cell["conventions"]) == set(flops.CONVENTIONS)
    per_token = float(flops.flops_per_token(config.model, "palm").training_per_token)
    assert cell["conventions"]["palm"]["mfu_percent"] == pytest.approx(100 * per_token * tokens_s / 1e12)
    assert cell["conventions"]["strict"]["mfu_percent"] == pytest.approx(cell["mfu_percent"])
    assert cell["peak_memory_gb"] == 3.0
    assert cell["serial"]["fraction"] == pytest.approx(cell["serial"]["roofline_ms"] / 2.0)
    assert cell["serial"]["ceilings_of"] == "today"
    assert cell["joules_per_token"] is None
    assert cell["no_joules"]
    assert cell["probe_tflops"] == {"before": 600.0, "after": 600.0}


def test_the_profile_says_where_the_step_goes(without_gpu: list[int]) -> None:
    profile = step.measure("llama_124m", "eager", 5, profile=True)["results"]["profile"]
    assert profile["profiled_step_ms"] == pytest.approx((GEMM_US + OTHER_US) / 1e3)
    assert profile["parts_ms"]["gemm"] == pytest.approx(GEMM_US / 1e3)
    assert profile["longest"][0] == {"name": "nvjet_x", "part": "gemm", "ms": pytest.approx(0.03), "calls": 1}
    assert sum(profile["waterfall"].values()) + profile["mfu_percent"] == pytest.approx(100)
    assert not profile["closes"]  # 0.05 ms under the profiler, and 2 ms by the clock


def test_without_a_peak_there_is_no_mfu(without_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "peak_here", lambda config: None)
    cell = step.measure("gpt2_124m", "eager", 5, profile=True)["results"]
    assert "mfu_percent" not in cell
    assert {row["mfu_percent"] for row in cell["conventions"].values()} == {None}
    assert cell["profile"]["waterfall"] is None
    assert "no peak" in cell["profile"]["reason"]
    assert cell["serial"] == {"reason": "no ceilings were measured in this run"}


def test_energy_is_a_tokens_share(without_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        reason = None

        def __init__(self, uuid: str) -> None:
            self.read = iter((1000.0, 1016.0))

        def joules(self) -> float:
            return next(self.read)

    monkeypatch.setattr(step_timing, "EnergyMeter", Meter)
    cell = step.measure("llama_124m", "eager", 5)["results"]
    assert cell["joules_per_token"] == pytest.approx(16.0 / (5 * 2 * 16))
    assert "profile" not in cell


def test_what_monitoring_costs_is_by_watched_steps(without_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a watched step takes 3 ms more, and the one after it 1 ms."""
    ran: list[bool] = []

    def train(*args: Any, watched: bool) -> StepResult:
        ran.append(watched)
        result = train_step(*args, watched=watched)
        assert (result.gradients is not None) is watched
        return result

    def window(run: Any) -> step_timing.Window:
        def timed(first: int, steps: int) -> list[float]:
            assert first == len(ran)
            for number in range(first, first + steps):
                run(number)
            return [10.0 + 3 * ran[n] + ran[n - 1] for n in range(first, first + steps)]

        return timed

    monkeypatch.setattr(step_timing, "cuda_window", window)
    monkeypatch.setattr(monitoring, "train_step", train)
    found = monitoring.measure("llama_124m")["results"]
    json.dumps(found, allow_nan=False)
    looked = [any(ran[first : first + monitoring.STEPS]) for first in range(0, len(ran), monitoring.STEPS)]
    assert looked == [True, False, True, True, False, False, True]  # warm-up, then a b b a a b
    assert sum(ran) == 4 * monitoring.STEPS / monitoring.INTERVAL
    assert found["unwatched"]["ms"] == 10.0
    assert found["watched"]["ms"] == pytest.approx(10.4)
    assert found["cost_percent"] == pytest.approx(4)
    assert found["watched_step_ms"] == {"ms": 4.0, "p10_ms": 4.0, "p90_ms": 4.0}


def test_recomputed_matmuls_count_in_hfu_alone() -> None:
    config = command_line.resolve(["tiny", "--recompute=full"]).config
    found = step.conventions(config, 1e6, Peak(1e12, "dense", ""))
    for name, recompute in (("strict", "none"), ("hfu", "full")):
        per_token = float(flops.flops_per_token(config.model, name, recompute=recompute).training_per_token)
        assert found[name]["tflops"] == pytest.approx(per_token * 1e6 / 1e12)
        assert found[name]["mfu_percent"] == pytest.approx(100 * per_token * 1e6 / 1e12)
