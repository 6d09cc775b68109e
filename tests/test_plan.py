"""The plan of a run: against itself, against what was measured, and in the trainer."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import models
from gptperf import cli, flops, plan, startup
from gptperf.config import Config
from gptperf.errors import ConfigError, OutOfMemoryError
from gptperf.hardware import GPUS

LLAMA = ["configs/llama_1.36b.toml", "--batch_size=16", "--gradient_accumulation_steps=1"]
GPT2 = ["configs/gpt2_124m.toml", "--norm_position=pre", "--batch_size=64", "--gradient_accumulation_steps=1"]
# Milliseconds a step and peak GB on one H200 (700 W), PyTorch 2.11.0, Triton 3.6.0, 2026-11-26: `python -m bench --only
# plan`. The last one's time is left out: its rows of logits were not padded yet.
MEASURED: dict[str, tuple[float | None, float]] = {
    "llama_1.36b/batch_16": (492.6, 69.78),
    "llama_1.36b/batch_8": (255.0, 47.58),
    "llama_1.36b/accumulated": (997.2, 47.6),
    "llama_1.36b/selective": (502.1, 66.42),
    "llama_1.36b/full": (644.4, 34.09),
    "gpt2_124m/batch_64": (113.7, 23.00),
    "gpt2_124m/selective": (115.6, 16.98),
    "gpt2_124m/full": (139.6, 6.52),
    "llama_0.46b_grouped/batch_16": (190.2, 30.36),
    "gpt2_openai_124m/batch_32": (None, 13.16),
}
MEASURED_EAGER = [(LLAMA, 503.3, 86.0), (GPT2, 115.9, 28.7)]  # `python -m bench --only step`, compiled as one graph


def config_of(*argv: str) -> Config:
    return cli.resolve(list(argv)).config


@pytest.mark.parametrize("name", models.PLANNED)
def test_what_was_measured_is_what_is_planned(name: str) -> None:
    step_ms, peak_gb = MEASURED[name]
    config = models.planned(name)
    planned = plan.plan(config, plan.find_gpu("H200"), recompute=config.system.recompute)
    assert planned.memory.total_gb == pytest.approx(peak_gb, rel=0.05)
    assert step_ms is None or planned.step_ms == pytest.approx(step_ms, rel=0.1)


@pytest.mark.parametrize(("model", "step_ms", "peak_gb"), MEASURED_EAGER)
def test_eager_ops_take_what_is_planned(model: list[str], step_ms: float, peak_gb: float) -> None:
    planned = plan.plan(config_of(*model, "--kernels=eager"), plan.find_gpu("H200"))
    assert planned.step_ms == pytest.approx(step_ms, rel=0.05)
    assert planned.memory.total_gb == pytest.approx(peak_gb, rel=0.06)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_mfu_is_flops_over_time_and_peak(gpu: Any) -> None:
    config = config_of(*LLAMA, "--gradient_accumulation_steps=8", "--dtype=float16")
    planned = plan.plan(config, gpu, num_gpus=4)
    assert planned.mfu is not None
    rate = float(flops.flops_per_token(config.model).training_per_token) * planned.tokens_per_sec / 4
    assert planned.mfu == pytest.approx(rate / (gpu.dense_tflops["float16"] * 1e12))
    assert 0 < planned.mfu < 1
    assert set(planned.parts_ms) == {"gemm", "attention", "memory_bound", "optimizer", "communication", "other"}
    assert planned.days(planned.tokens_per_sec * 86400) == pytest.approx(1)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_largest_batch_fits_and_one_more_does_not(strategy: Any, recompute: Any) -> None:
    config, gpu = config_of(*LLAMA), plan.find_gpu("A100 SXM 80")
    how = {"num_gpus": 4, "strategy": strategy, "recompute": recompute}
    limit_gb = plan.plan(config, gpu, **how).limit_gb
    most = plan.largest_batch(config, limit_gb, **how)
    assert most > 0
    for batch, fits in ((most, True), (most + 1, False)):
        train = dataclasses.replace(config.train, batch_size=batch)
        assert plan.plan(dataclasses.replace(config, train=train), gpu, **how).fits == fits


def test_remedies_fit_and_their_flags_make_them() -> None:
    config, gpu = config_of("configs/llama_1.36b.toml"), plan.find_gpu("A100 SXM 40")
    given = plan.plan(config, gpu)
    assert not given.fits
    found = plan.remedies(config, gpu, given)
    assert found
    assert [x.plan.step_ms for x in found] == sorted(x.plan.step_ms for x in found)
    for remedy in found:
        changed = config_of("configs/llama_1.36b.toml", *remedy.flags.split())
        assert changed.tokens_per_iter == config.tokens_per_iter
        again = plan.plan(changed, gpu, recompute=changed.system.recompute)
        assert again.fits
        assert again.step_ms == remedy.plan.step_ms
        assert remedy.flags in plan.refusal(config, gpu, given)


def test_sharding_is_a_remedy_where_there_are_gpus() -> None:
    config, gpu = config_of("configs/llama_1.36b.toml"), plan.find_gpu("A100 SXM 40")
    given = plan.plan(config, gpu, num_gpus=4)
    assert any("--use_fsdp=True" in x.flags for x in plan.remedies(config, gpu, given))
    assert not any("--use_" in x.flags for x in plan.remedies(config, gpu, given, strategies=("ddp",)))


@pytest.mark.parametrize(
    ("name", "row"),
    [("h200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("a100 pcie 80", "A100 PCIe 80 GB"), ("L4", "L4")],
)
def test_gpus_by_name(name: str, row: str) -> None:
    assert plan.find_gpu(name).name == row


@pytest.mark.parametrize("name", ["H1000", "A100", ""])
def test_no_gpu_or_several(name: str) -> None:
    with pytest.raises(ConfigError, match=r"gpu: found .* wanted one of .*A100 SXM 80 GB"):
        plan.find_gpu(name)


def test_more_gpus_train_faster_and_not_more_than_in_proportion() -> None:
    config, gpu = config_of(*LLAMA, "--gradient_accumulation_steps=8"), plan.find_gpu("H200")
    for strategy in ("ddp", "zero1", "fsdp"):
        speeds = [plan.plan(config, gpu, num_gpus=n, strategy=strategy).tokens_per_sec for n in (1, 2, 4, 8)]
        assert speeds == sorted(speeds)
        assert speeds[-1] < 8.05 * speeds[0]  # ZeRO-1 and FSDP share out the optimizer's time too


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["configs/llama_1.36b.toml", "--gpu=H200", "--num_gpus=4", "--use_fsdp=True", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["strategy"] == "fsdp"
    assert sum(record["parts_ms"].values()) == pytest.approx(record["step_ms"])
    assert sum(record["memory_parts_gb"].values()) == pytest.approx(record["memory_gb"])
    assert plan.main(["configs/llama_1.36b.toml", "--gpu=RTX 4090"]) == OutOfMemoryError.exit_code
    assert "does NOT fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="bfloat16 peak of V100"):
        plan.main(["--gpu=V100 SXM2 16"])
    with pytest.raises(ConfigError, match="num_gpus"):
        plan.main(["--num_gpus=0"])


def test_without_a_name_it_is_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Any] = [SimpleNamespace(name="NVIDIA H100 PCIe", memory_gb=85.0)]
    monkeypatch.setattr(plan.hardware, "gpu_states", lambda: (here, None))
    assert plan.find_gpu(None).name == "H100 PCIe"
    here.clear()
    with pytest.raises(ConfigError, match="no known GPU here; wanted --gpu=NAME"):
        plan.main([])


def test_a_run_that_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=42_300_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    process: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(OutOfMemoryError, match=r"(?s)needs 47.* GB of the .*--batch_size=.*--ignore_plan=True"):
        startup.check_plan(config_of("configs/llama_1.36b.toml"), process)
    ignored = startup.check_plan(config_of("configs/llama_1.36b.toml", "--ignore_plan=True"), process)
    assert ignored is not None
    assert not ignored.fits
    small = startup.check_plan(config_of("configs/llama_1.36b.toml", "--batch_size=1"), process)
    assert small is not None
    assert small.fits
    card.name = "NVIDIA H20"
    assert startup.check_plan(config_of("configs/llama_1.36b.toml"), process) is None


NCCL = "--communication=process_group"


@pytest.mark.parametrize(
    ("flags", "micro_batches", "step_ms"),
    [  # four H200s, PyTorch 2.11, 16 x 2048 a GPU and micro-batch (bench/NOTES.md)
        ([], 1, 509.0),
        (["--use_zero1=True"], 1, 500.6),
        (["--use_fsdp=True"], 1, 503.3),
        (["--use_fsdp=True"], 8, 4010.7),
        ([NCCL], 1, 521.1),
        ([NCCL, "--use_zero1=True"], 1, 508.8),
        ([NCCL, "--use_fsdp=True"], 1, 517.4),
        ([NCCL], 8, 3972.5),
        ([NCCL, "--use_zero1=True"], 8, 3966.3),
        ([NCCL, "--use_fsdp=True"], 8, 4083.8),
    ],
)
def test_several_gpus_against_measured_runs(flags: list[str], micro_batches: int, step_ms: float) -> None:
    steps = f"--gradient_accumulation_steps={4 * micro_batches}"
    config = cli.resolve(["configs/llama_1.36b.toml", "--batch_size=16", steps, *flags], world_size=4).config
    strategy = plan.strategy_of(config)
    planned = plan.plan(config, plan.find_gpu("H200"), num_gpus=4, strategy=strategy)
    assert planned.step_ms == pytest.approx(step_ms, rel=0.05)
    if NCCL not in flags:
        return
    once = dataclasses.replace(config.system, fsdp_reduce_once=True, reduce_dtype="bfloat16")
    less = plan.plan(dataclasses.replace(config, system=once), plan.find_gpu("H200"), num_gpus=4, strategy=strategy)
    assert less.parts_ms["communication"] < planned.parts_ms["communication"]
