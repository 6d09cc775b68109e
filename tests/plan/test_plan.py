"""The plan of a run: consistent with itself, close to measured runs, and used by the trainer."""

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptperf import flops, hardware, plan
from gptperf.config import Config, command_line
from gptperf.errors import ConfigError, DeviceError, OutOfMemoryError
from gptperf.hardware import GPUS
from gptperf.plan.__main__ import main
from gptperf.training import preflight

LLAMA = ["configs/llama_1.36b.toml", "--batch_size=16", "--gradient_accumulation_steps=1"]
GPT2 = ["configs/gpt2_124m.toml", "--norm_position=pre", "--batch_size=64", "--gradient_accumulation_steps=1"]


def config_of(*argv: str) -> Config:
    return command_line.resolve(list(argv)).config


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_mfu_is_flops_over_time_and_peak(gpu: Any) -> None:
    config = config_of(*LLAMA, "--gradient_accumulation_steps=8", "--dtype=float16")
    planned = plan.plan(config, gpu, num_gpus=4)
    assert planned.mfu is not None
    rate = float(flops.flops_per_token(config.model).training_per_token) * planned.tokens_per_sec / 4
    assert planned.mfu == pytest.approx(rate / (gpu.dense_tflops["float16"] * 1e12))
    assert 0 < planned.mfu < 1
    assert set(planned.parts_ms) == {"gemm", "attention", "memory_bound", "optimizer", "communication", "other", "host"}
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


@pytest.mark.parametrize("gpu", ["RTX 4090", "RTX 3090", "A10", "A10G", "A30", "L4"])
def test_the_configuration_for_24_gb_fits_one_card_of_24_gb(gpu: str) -> None:
    config, card = config_of("llama_0.41b_24gb"), plan.find_gpu(gpu)
    planned = plan.plan(config, card)
    assert card.memory_gb == 24
    assert planned.memory.total_gb < 0.9 * planned.limit_gb  # with room for a desktop
    assert planned.memory.total_gb > 0.5 * planned.limit_gb


@pytest.mark.parametrize("name", ["A100 SXM 40", "H200"])
@pytest.mark.parametrize("own", ["--recompute_ffn=True", "--recompute_ffn=False"])
def test_remedies_fit_and_their_flags_make_them(own: str, name: str) -> None:
    config, gpu, reported_gb = config_of("configs/llama_1.36b.toml", own), plan.find_gpu(name), 42.3
    given = plan.plan(config, gpu, reported_gb=reported_gb)
    assert not given.fits
    found = plan.remedies(config, gpu, given, reported_gb)
    assert found
    assert any("--recompute=" in x.flags for x in found)
    assert [x.plan.step_ms for x in found] == sorted(x.plan.step_ms for x in found)
    for remedy in found:
        changed = config_of("configs/llama_1.36b.toml", own, *remedy.flags.split())
        assert changed.tokens_per_iter == config.tokens_per_iter
        again = plan.plan(changed, gpu, recompute=changed.system.recompute, reported_gb=reported_gb)
        assert again.fits
        assert again.step_ms == remedy.plan.step_ms
        assert remedy.flags in plan.refusal(config, gpu, given, reported_gb)


def test_an_activation_that_is_kept_takes_memory_and_saves_time() -> None:
    config, gpu = config_of(*LLAMA, "--recompute_ffn=True"), plan.find_gpu("H200")
    kept = config_of(*LLAMA)
    moved = 16 * 2048 * config.model.ffn_width * config.model.n_layer * 2  # bytes that backward does not write
    less, more = plan.plan(config, gpu), plan.plan(kept, gpu)
    assert 1e9 * (more.memory.activations_gb - less.memory.activations_gb) == pytest.approx(moved)
    assert 0 < less.step_ms - more.step_ms < 1.2e3 * moved / gpu.hbm_byte_s
    for recompute in ("selective", "full"):
        one, other = (plan.plan(c, gpu, recompute=recompute) for c in (config, kept))  # type: ignore[arg-type]
        assert (one.step_ms, one.memory) == (other.step_ms, other.memory)
    one, other = (
        plan.plan(config_of(*LLAMA, "--matmul_dtype=fp8", f"--recompute_ffn={x}"), gpu) for x in (True, False)
    )
    assert (one.step_ms, one.memory) == (other.step_ms, other.memory)


def test_what_fsdp_keeps_can_be_given_back() -> None:
    flags = [
        "--use_fsdp=True",
        "--fsdp_gather_once=True",
        "--fsdp_reduce_once=True",
        "--gradient_accumulation_steps=16",
        "--recompute_ffn=True",
    ]
    config = command_line.resolve([*LLAMA[:2], *flags], world_size=2).config
    gpu = plan.find_gpu("H100")
    given = plan.plan(config, gpu, num_gpus=2, strategy="fsdp", reported_gb=64.5)
    assert not given.fits
    found = {x.flags: x.plan for x in plan.remedies(config, gpu, given, 64.5, most=9)}
    for remedy in ("--fsdp_gather_once=False", "--fsdp_reduce_once=False"):
        assert found[remedy].fits
        assert given.step_ms < found[remedy].step_ms


def test_fsdp_on_one_gpu_takes_what_one_gpu_takes() -> None:
    """But for the gradients of a single micro-batch, which one process without FSDP keeps in their own dtype."""
    twice = "--gradient_accumulation_steps=2"
    alone = plan.plan(config_of(*LLAMA, twice), plan.find_gpu("H200"))
    for flags in ([], ["--fsdp_gather_once=True"], ["--fsdp_reduce_once=True"]):
        config = config_of(*LLAMA, twice, "--use_fsdp=True", *flags)
        assert plan.plan(config, plan.find_gpu("H200"), strategy="fsdp").memory == alone.memory


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


def test_a_gpu_without_a_row_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    """NVIDIA states no rate of the GB10 in bfloat16; the message proposes the flags that give the figures."""
    with pytest.raises(ConfigError, match=r"'NVIDIA GB10', which is not in the table; .* its figures: ") as e:
        plan.find_gpu("NVIDIA GB10")
    words = [word for word in re.findall(r"(--\w+)=X", str(e.value).partition("wanted one of")[0])]
    figures = [f"{word}={value}" for word, value in zip(words, (100, 128, 273), strict=True)]
    assert main(["configs/tiny.toml", "--gpu=NVIDIA GB10", *figures]) == 0
    assert "NVIDIA GB10" in capsys.readouterr().out


FIGURES = ["--gpu_tflops=989.4", "--gpu_memory_gb=141", "--gpu_bandwidth_gb_s=4800"]


def test_a_gpu_that_is_not_in_the_table_is_described_by_three_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/gpt2_124m.toml", "--gpu=A card", *FIGURES, "--num_gpus=2", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert main(["configs/gpt2_124m.toml", "--gpu=H200", "--num_gpus=2", "--json"]) == 0
    h200 = json.loads(capsys.readouterr().out)
    for key in ("memory_gb", "memory_parts_gb", "limit_gb", "hardware_peak_tflops", "peak_dtype", "convention"):
        assert card[key] == h200[key], key
    assert (card["gpu"], card["peak_basis"], h200["peak_basis"]) == ("A card", "given", "dense")
    assert card["step_ms"] == pytest.approx(h200["step_ms"], rel=card["band"])
    assert main(["configs/gpt2_124m.toml", *FIGURES, "--gpu_tflops=98.94", "--json"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert slow["parts_ms"]["gemm"] == pytest.approx(20 * card["parts_ms"]["gemm"])
    assert slow["parts_ms"]["memory_bound"] == pytest.approx(2 * card["parts_ms"]["memory_bound"])


WRONG = {
    "gpu_tflops": {"120e12": 120, "120000": 120, "0.05": 50, "1e30": 100_000, "-3": 0.1, "0": 0.1, "inf": 100_000},
    "gpu_memory_gb": {"24576": 24, "24e9": 24, "0": 1, "-24": 1},
    "gpu_bandwidth_gb_s": {"3.35": 3350, "900e9": 900, "9e5": 900, "-1": 10},
}


@pytest.mark.parametrize(("flag", "text"), [(flag, text) for flag, texts in WRONG.items() for text in texts])
def test_a_wrong_figure_has_a_nearest_one_that_is_right(flag: str, text: str) -> None:
    others = [given for given in FIGURES if not given.startswith(f"--{flag}=")]
    with pytest.raises(
        ConfigError, match=rf"{flag}: found .*wanted a number of .* from .* to .*; nearest: --{flag}="
    ) as e:
        main([*others, f"--{flag}={text}"])
    advice = str(e.value).rpartition("nearest: ")[2]
    assert float(advice.partition("=")[2]) == pytest.approx(WRONG[flag][text])
    assert main([*others, advice, "--batch_size=1", "--json"]) in (0, OutOfMemoryError.exit_code)


def test_all_wrong_figures_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        main(["--gpu=RTX 3090", "--gpu_tflops=fast", "--gpu_memory_gb=nan"])
    lines = str(e.value).splitlines()
    assert lines[0] == "3 mistakes"
    assert "gpu_bandwidth_gb_s: found none" in lines[3]
    assert lines[3].endswith("nearest: --gpu_bandwidth_gb_s=936")  # that of the row


@pytest.mark.parametrize(
    ("flag", "basis", "factor"), [("--peak_basis=sparse", "sparse", 2), ("--peak_tflops=500", "given", 500 / 989.4)]
)
def test_the_peak_is_that_of_the_run(flag: str, basis: str, factor: float) -> None:
    gpu = plan.find_gpu("H200")
    dense, other = (plan.plan(config_of(*LLAMA, *flags), gpu) for flags in ([], [flag]))
    assert dense.mfu is not None
    assert other.mfu == pytest.approx(dense.mfu / factor, rel=1e-3)
    assert (dense.peak["peak_basis"], other.peak["peak_basis"]) == ("dense", basis)
    assert f"TFLOP/s bf16 {basis}): gemm" in plan.plan_lines(other)[1]
    assert other.step_ms == dense.step_ms


def test_more_gpus_train_faster_and_not_more_than_in_proportion() -> None:
    config, gpu = config_of(*LLAMA, "--gradient_accumulation_steps=8"), plan.find_gpu("H200")
    for strategy in ("ddp", "zero1", "fsdp"):
        speeds = [plan.plan(config, gpu, num_gpus=n, strategy=strategy).tokens_per_sec for n in (1, 2, 4, 8)]
        assert speeds == sorted(speeds)
        assert speeds[-1] < 8.05 * speeds[0]  # ZeRO-1 and FSDP share out the optimizer's time too


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/llama_1.36b.toml", "--gpu=H200", "--num_gpus=4", "--use_fsdp=True", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["strategy"] == "fsdp"
    assert sum(record["parts_ms"].values()) == pytest.approx(record["step_ms"])
    assert sum(record["memory_parts_gb"].values()) == pytest.approx(record["memory_gb"])
    assert main(["configs/llama_1.36b.toml", "--gpu=RTX 4090"]) == OutOfMemoryError.exit_code
    assert "does NOT fit" in capsys.readouterr().out
    for gpu in ("V100 SXM2 16", "T4"):
        with pytest.raises(ConfigError, match="has no bfloat16 units; nearest: --dtype=float16"):
            main([f"--gpu={gpu}"])
        for dtype in ("float16", "float32"):
            assert main([f"--gpu={gpu}", f"--dtype={dtype}"]) == 0
        assert "MFU: strict, of " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="num_gpus"):
        main(["--num_gpus=0"])


def test_the_command_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["llama_1.36b", "--gpu=H200", "--batch_size=1"]
    said = []
    dense = (["--window=512", "--dropout=0.1"], ["--window=512", "--block_size=2000"])
    for flags in ([], ["--document_mask=True"], *dense):
        main([*command, *flags])
        said.append(capsys.readouterr().out)
    assert ["assume that a sequence is one document" in text for text in said] == [False, True, False, False]
    assert ["block_size x block_size" in text for text in said] == [False, False, True, True]
    assert "dropout > 0: " in said[2]
    assert "block_size = 2000 is not a multiple of 128: " in said[3]


def test_without_a_name_it_is_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Any] = [SimpleNamespace(name="NVIDIA H100 PCIe", memory_gb=85.0)]
    monkeypatch.setattr(hardware, "gpu_states", lambda: (here, None))
    assert plan.find_gpu(None).name == "H100 PCIe"
    here.clear()
    with pytest.raises(ConfigError, match="no known GPU in this machine; wanted --gpu=NAME"):
        main([])


def test_a_run_that_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=42_300_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    process: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(OutOfMemoryError, match=r"(?s)needs 52.* GB of the .*--batch_size=.*--ignore_plan=True"):
        preflight.check_plan(config_of("configs/llama_1.36b.toml"), process)
    ignored = preflight.check_plan(config_of("configs/llama_1.36b.toml", "--ignore_plan=True"), process)
    assert ignored is not None
    assert not ignored.fits
    small = preflight.check_plan(config_of("configs/llama_1.36b.toml", "--batch_size=1"), process)
    assert small is not None
    assert small.fits
    card.name = "NVIDIA GB10"
    assert preflight.check_plan(config_of("configs/llama_1.36b.toml"), process) is None


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100S-PCIE-32GB", (7, 0))])
def test_a_run_on_a_card_without_bfloat16_is_told_the_dtype_that_works(
    name: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = SimpleNamespace(name=name, total_memory=1e9 * hardware.match_gpu(name).memory_gb)  # type: ignore[union-attr]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    process: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(DeviceError, match=f"{name} .*does not support bfloat16; nearest: --dtype=float16$") as e:
        preflight.check_device(config_of().system, process.device)
    config = config_of(str(e.value).rpartition("nearest: ")[2])
    preflight.check_device(config.system, process.device)
    planned, peak = preflight.check_plan(config, process), preflight.find_peak(config, process.device)
    assert planned is not None
    assert peak is not None
    assert (peak.dtype, planned.peak["peak_dtype"]) == ("float16", "float16")
