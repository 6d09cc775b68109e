"""What is counted and predicted of fp8: the FLOPs of the layers that run in it, MFU of both kinds, the plan."""

import dataclasses

import pytest
from torch import nn

from gptperf.config import Config, command_line
from gptperf.flops import flops_per_token
from gptperf.flops.float8 import float8_bytes, float8_flops
from gptperf.hardware import GPUS, Peak
from gptperf.model import GPT
from gptperf.monitor.throughput import Throughput
from gptperf.monitor.waterfall import step_flops
from gptperf.plan import find_gpu, plan, unplannable
from gptperf.training.float8 import Float8Layers

SIZES = ("--n_layer=3", "--n_head=2", "--n_embd=32", "--vocab_size=97", "--block_size=16", "--batch_size=2")
MATMULS = {"forward": 1, "forward+dgrad": 2, "full": 3}


def _config(model: str, *flags: str) -> Config:
    return command_line.resolve([model, *SIZES, "--matmul_dtype=fp8", *flags]).config


@pytest.mark.parametrize("skip", ["", "first", "attention,2", "blocks.1.ffn.out", "0,1,2"])
@pytest.mark.parametrize("model", ["llama_124m", "gpt2_124m"])
def test_flops_are_those_of_the_layers(model: str, skip: str) -> None:
    """Counted again from the layers of a model that has them."""
    for level, matmuls in MATMULS.items():
        config = _config(model, f"--fp8_skip={skip}", f"--fp8_level={level}")
        built = GPT(config.model)
        names = set(Float8Layers(built, config, triton=False).names)
        found = [x.weight.numel() for name, x in built.named_modules() if name in names and isinstance(x, nn.Linear)]
        assert float8_flops(config) == 2 * matmuls * sum(found)
        assert float8_bytes(config)[1] == (3 if level == "forward" else 6) * sum(found)


def test_without_fp8_nothing_is_counted() -> None:
    config = command_line.resolve(["llama_124m", *SIZES]).config
    assert (float8_flops(config), float8_bytes(config)) == (0, (0, 0))


def test_blended_mfu_is_the_ideal_time_over_the_time() -> None:
    config = _config("llama_124m")
    total, in_float8 = float(flops_per_token(config.model, "strict").training_per_token), float8_flops(config)
    tokens, peak = config.tokens_per_iter, Peak(1e12, "dense", "", "bfloat16", 2e12)
    ideal_s = tokens * ((total - in_float8) / peak.flop_s + in_float8 / 2e12)
    speed = Throughput(config.model, tokens, 1, peak, float8_flops=in_float8)
    record = speed.record(1e3 * ideal_s)
    assert record["blended_mfu_percent"] == pytest.approx(100)
    assert record["mfu_percent"] == pytest.approx(100 * tokens * total / peak.flop_s / ideal_s)
    assert sum(step_flops(config, peak=peak)) / peak.flop_s == pytest.approx(ideal_s)
    for other in (
        Throughput(config.model, tokens, 1, peak),
        Throughput(config.model, tokens, 1, peak._replace(float8_flop_s=None)),
    ):
        assert "blended_mfu_percent" not in other.record(1.0)


def test_the_plan_of_fp8() -> None:
    """On a GPU that has fp8 a large model is faster and smaller, the more of its matmuls run in it."""
    config = command_line.resolve(["llama_1.36b", "--batch_size=16", "--gradient_accumulation_steps=1"]).config
    gpu = find_gpu("H200")
    plans = [plan(config, gpu)]
    for level in MATMULS:
        system = dataclasses.replace(config.system, matmul_dtype="fp8", fp8_level=level)
        plans.append(plan(dataclasses.replace(config, system=system), gpu))
    # The profile that the rates are fitted to: 197.6 ms of matmuls. A step took 357.3 ms on 2026-12-01, on a card that
    # was 2% slower than the plan in bfloat16.
    assert plans[-1].parts_ms["gemm"] == pytest.approx(197.6, rel=0.02)
    assert plans[-1].step_ms == pytest.approx(357.3, rel=0.05)
    times, memory = [one.step_ms for one in plans], [one.memory.total_gb for one in plans]
    assert times == sorted(times, reverse=True)
    assert memory[-1] < memory[0]
    assert plans[0].band < plans[-1].band == plan(config, find_gpu("A100 SXM 80 GB")).band  # its rate is assumed
    fp8 = dataclasses.replace(config, system=system)
    for row in GPUS:
        assert (unplannable(fp8, row) is not None) == ("fp8" not in row.dense_tflops), row.name
    assert "nearest: --matmul_dtype=dtype" in str(unplannable(fp8, find_gpu("A100 SXM 80 GB")))
