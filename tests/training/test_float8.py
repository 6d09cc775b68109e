"""Runs with fp8 matmuls: which layers, scales and what decides them, resume, refusals, what the log says."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_helpers import hashes, losses, run, run_log

from gptperf.config import Config, command_line
from gptperf.errors import ConfigError, DeviceError
from gptperf.kernels.float8 import E4M3, PROGRAMS
from gptperf.kernels.float8_linear import GRADIENTS
from gptperf.model import GPT
from gptperf.model.linear import Linear
from gptperf.plan import find_gpu, plan
from gptperf.training import float8, startup_info
from gptperf.training.float8 import HISTORY, Float8Layers, check_float8

FP8 = ("--matmul_dtype=fp8", "--dtype=bfloat16", "--kernels=eager")
SIZES = ("llama_124m", "--n_layer=3", "--n_head=2", "--n_embd=32", "--vocab_size=97", "--block_size=16")
CPU = torch.device("cpu")


def _config(*flags: str) -> Config:
    return command_line.resolve([*SIZES, "--batch_size=2", *FP8, *flags]).config


def _layers(*flags: str) -> Float8Layers:
    config = _config(*flags)
    return Float8Layers(GPT(config.model), config, triton=False)


PROCESS: Any = SimpleNamespace(world_size=1)


def _micro_batch(layers: Float8Layers, *statistics: float) -> None:
    """A micro-batch in which every tensor has this amax and these clamped and flushed elements of a thousand."""
    for state in layers._states:
        parts = torch.zeros_like(state.probe)
        parts[:, :, 3] = torch.tensor([*statistics, 1000.0])
        parts[:, 0, 1] = parts[:, 0, 3] / 2  # what another program saw
        state.probe.grad = parts
    layers.collect()


def _scales(layers: Float8Layers) -> list[float]:
    return [scale[0].item() for scale in layers._states[0].scales]


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ("", lambda layer: False),
        ("first,last", lambda layer: layer.startswith(("blocks.0.", "blocks.2."))),
        ("1", lambda layer: layer.startswith("blocks.1.")),
        ("attention", lambda layer: ".attention." in layer),
        ("blocks.1.ffn,blocks.2.ffn.out", lambda layer: layer.startswith(("blocks.1.ffn", "blocks.2.ffn.out"))),
    ],
)
def test_the_layers(skip: str, left_out: Callable[[str], bool]) -> None:
    """The linear layers of the blocks but for those that are skipped; never lm_head."""
    config = _config(f"--fp8_skip={skip}")
    model = GPT(config.model)
    linears = {name: x for name, x in model.named_modules() if isinstance(x, Linear)}
    layers = Float8Layers(model, config, triton=False)
    assert layers.names == [name for name in linears if name.startswith("blocks.") and not left_out(name)]
    assert {name for name, x in linears.items() if x.float8 is not None} == set(layers.names)


@pytest.mark.parametrize("skip", ["", "blocks.0.ffn.out", "blocks.0.ffn.{up}", "ffn"])
@pytest.mark.parametrize(("kind", "up"), [("swiglu", "gate_up"), ("standard", "up")])
def test_an_ffn_in_part(kind: str, up: str, skip: str) -> None:
    """An FFN computes the same, up to the format, whichever of its layers are in 8 bits."""
    skip = skip.format(up=up)
    config = _config(f"--fp8_skip={skip}", f"--ffn_type={kind}")
    model = GPT(config.model)
    ffn: Any = model.blocks[0].ffn
    x = torch.randn(2, 16, 32)
    wanted = ffn(x)
    Float8Layers(model, config, triton=False)
    found = ffn(x)
    off = ((found - wanted).norm() / wanted.norm()).item()
    assert (off == 0) == (skip == "ffn")
    assert off < 0.1


def test_scales_follow_the_largest_values() -> None:
    """A tensor in an iteration has a scale that leaves room for its largest value in each of the last iterations."""
    layers = _layers()
    assert _scales(layers) == [0, 0, 0]
    for amax in (3.0, 0.1, *[0.01] * HISTORY):
        layers.start_step()
        before = _scales(layers)
        _micro_batch(layers, amax / 2, 0, 0)
        _micro_batch(layers, amax, 0, 0)
        assert _scales(layers) == before, "scales must not change in an iteration"
        layers.update(PROCESS)
        largest = max(layers.history[0, 0].tolist())
        if layers.history[0, 0].count_nonzero() == 1:
            largest *= 4  # nothing is known of its growth
        for scale, form in zip(_scales(layers), (E4M3, E4M3, GRADIENTS), strict=True):
            assert math.frexp(scale)[0] == 0.5
            assert 1.75 <= form.largest / (largest * scale) <= 3.5
    assert largest == pytest.approx(0.01), "values that are too old do not count"


@pytest.mark.parametrize("zeros", [0, 1, 5, HISTORY + 3])
@pytest.mark.parametrize("warmup", [1, 2, 10, 700])
def test_what_begins_as_zero_and_grows_with_the_warm_up_is_not_clamped(zeros: int, warmup: int) -> None:
    """A weight is the sum of the updates; its largest value lies anywhere between two powers of two."""
    for first in (1.0, 1.3, 1.6, 1.99):
        layers, weight = _layers(), 0.0
        for _ in range(zeros):
            _micro_batch(layers, 0.0, 0, 0)
            layers.update(PROCESS)
        for i in range(1, 30):
            weight += first * min(i, warmup) / warmup
            for scale, form in zip(_scales(layers), (E4M3, E4M3, GRADIENTS), strict=True):
                assert weight * scale <= form.largest, f"iteration {i}"
            _micro_batch(layers, weight, 0, 0)
            layers.update(PROCESS)


def test_growth_counts_only_while_a_tensor_is_new() -> None:
    """Later a scale follows the largest values alone, so that one outlier does not take range from small values."""
    layers = _layers()
    for amax in [1.0] * HISTORY:
        _micro_batch(layers, amax, 0, 0)
        layers.update(PROCESS)
    _micro_batch(layers, 3.0, 0, 0)
    layers.update(PROCESS)
    assert E4M3.largest / (3.0 * _scales(layers)[0]) <= 3.5


def test_a_run_whose_projections_begin_as_zero_does_not_saturate(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path, *FP8, "--residual_init=zero", "--max_iters=8", "--warmup_iters=8", "--eval_interval=100")
    assert [entry["float8"]["saturated_share"] for entry in run_log(tmp_path)["training_iterations"]] == [0.0] * 8
    assert "saturates" not in "".join(capsys.readouterr())


def test_scales_of_the_tensor_itself() -> None:
    layers = _layers("--fp8_scaling=current")
    _micro_batch(layers, 3.0, 0, 0)
    layers.update(PROCESS)
    assert _scales(layers) == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_does_not_decide_scales(bad: float) -> None:
    layers = _layers()
    for _ in range(2):
        _micro_batch(layers, 3.0, 0, 0)
        layers.update(PROCESS)
    before = _scales(layers)
    _micro_batch(layers, bad, 0, 0)
    _micro_batch(layers, 1.0, 0, 0)
    layers.update(PROCESS)
    assert _scales(layers) == before
    assert layers.history.isfinite().all()


def test_a_dropped_iteration_leaves_nothing() -> None:
    layers = _layers()
    _micro_batch(layers, 1e9, 7, 7)
    layers.start_step()
    _micro_batch(layers, 3.0, 0, 0)
    layers.update(PROCESS)
    assert layers.history[..., 0].unique().tolist() == [3.0]
    assert layers.record()[0]["saturated_share"] == 0


def test_the_record() -> None:
    """Shares are those of the elements since the last record; a layer that saturates is named once."""
    layers = _layers()
    for _ in range(2):
        _micro_batch(layers, 1.0, 30, 6)
        _micro_batch(layers, 1.0, 0, 0)
        layers.update(PROCESS)
    record, warning = layers.record()
    assert record["saturated_share"] == pytest.approx(0.015), "30 of two thousand"
    assert record["flushed_share"] == pytest.approx(record["saturated_share"] / 5)
    assert set(record["saturated_layers"]) == set(layers.names)
    assert record["stale_scales"] == 0
    assert warning is not None
    named = next(name for name in layers.names if f"fp8: {name} saturates" in warning)
    assert f"--fp8_skip={named} keeps" in warning
    _micro_batch(layers, 1e-4, 0, 0)
    layers.update(PROCESS)
    record, warning = layers.record()
    assert (record["saturated_share"], record["saturated_layers"], warning) == (0, {}, None)
    assert record["stale_scales"] == 3 * len(layers.names), "the scales leave room for values 10,000 times as large"


def test_the_warning_keeps_what_is_skipped() -> None:
    layers = _layers("--fp8_skip=first,attention")
    _micro_batch(layers, 1.0, 30, 6)
    layers.update(PROCESS)
    assert re.search(r"--fp8_skip=first,attention,blocks\.[12]\.ffn\.\w+ keeps", str(layers.record()[1]))


def test_refused() -> None:
    """Before anything is built: the reason, and the nearest value."""
    with pytest.raises(DeviceError, match=r"needs a GPU, found cpu; nearest: --matmul_dtype=dtype.*bfloat16"):
        check_float8(_config("--kernels=auto"), CPU)
    with pytest.raises(ConfigError, match=r"batch_size, block_size: .*multiple of 16 tokens.*found 34"):
        check_float8(_config("--block_size=17"), CPU)
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.gate_up: .*multiples of 16, found a weight \(72, 32\)"):
        _layers("--d_ff=36")
    with pytest.raises(ConfigError, match=r"blocks\.1\.ffn\.gate_up: .*nearest: --fp8_skip=0,ffn$"):
        _layers("--d_ff=36", "--fp8_skip=0")
    assert all(".attention." in name for name in _layers("--d_ff=36", "--fp8_skip=0,ffn").names)
    with pytest.raises(ConfigError, match=r"blocks\.0\.attention\.qkv: .*nearest: --matmul_dtype=dtype$"):
        _layers("--n_embd=36", "--n_head=2")
    with pytest.raises(
        ConfigError, match=r"fp8_skip: found 'blocks\.1\.ffn\.gateup'.*nearest: blocks\.1\.ffn\.gate_up"
    ):
        _layers("--fp8_skip=blocks.1.ffn.gateup")
    for flags, message in {
        ("--dtype=float16",): "matmul_dtype = 'fp8' needs dtype = 'bfloat16', found 'float16'",
        ("--fp8_skip=3",): "found '3', wanted first, last, a block below n_layer = 3",
        ("--fp8_skip=firts",): "nearest: first",
        ("--matmul_dtype=dtype", "--fp8_level=forward"): "applies to matmul_dtype = 'fp8' only",
    }.items():
        with pytest.raises(ConfigError, match=message):
            _config(*flags)


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_the_gpus(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    if runs:
        check_float8(_config(), torch.device("cuda", 0))
        return
    with pytest.raises(DeviceError, match=r"needs sm_89 or higher, found NVIDIA A100 \(sm_80\); nearest"):
        check_float8(_config(), torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*FP8, "--d_ff=36"), "multiples of 16"),
        ((*FP8, "--fp8_skip=blocks.0.ffn.none"), "fp8_skip: found"),
        (("--cuda_graph=True",), "CUDA graphs need a GPU"),
    ],
)
def test_a_refused_run_moves_no_checkpoint(flags: tuple[str, ...], message: str, corpus: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "checkpoints/step-00000002"
    earlier.mkdir(parents=True)
    with pytest.raises((ConfigError, DeviceError), match=message):
        run(corpus, tmp_path, "--overwrite=True", "--device=cpu", *flags)
    assert earlier.exists()


MUON = ("--optimizer=muon", "--optimizer_state_dtype=bfloat16")


def test_resume_is_bitwise(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the state of the scales, and, as a control, not without it; Muon and bfloat16 moments change nothing."""
    flags = (*FP8, *MUON, "--max_iters=6", "--save_interval=2")
    run(corpus, tmp_path / "a", *flags, "--keep_checkpoints=9")
    found = tmp_path / "a/checkpoints"
    for name in ("b", "control"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (found / "step-00000002").rename(tmp_path / "b/checkpoints/step-00000002")
    (found / "step-00000004").rename(tmp_path / "control/checkpoints/step-00000004")
    run(corpus, tmp_path / "b", *flags, "--init_from=resume")
    assert hashes(found / "step-00000006") == hashes(tmp_path / "b/checkpoints/step-00000006")
    monkeypatch.setattr(float8.Float8Layers, "restore", lambda *_: None)
    run(corpus, tmp_path / "control", *flags, "--init_from=resume")
    assert hashes(found / "step-00000006") != hashes(tmp_path / "control/checkpoints/step-00000006")


def test_a_run_may_change_its_precision(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in bfloat16 goes on in fp8, with other layers, and in bfloat16 again; each change is a warning."""
    flags = ("--dtype=bfloat16", "--init_from=auto", "--eval_interval=100")
    for iterations, more in ((1, ()), (2, FP8), (3, (*FP8, "--fp8_skip=first")), (4, ())):
        run(corpus, tmp_path, *flags, f"--max_iters={iterations}", *more)
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "matmul_dtype: dtype -> fp8" in text
    assert "fp8_skip:  -> first" in text
    assert "matmul_dtype: fp8 -> dtype" in text
    recorded = ["float8" in entry for entry in run_log(tmp_path)["training_iterations"]]
    assert recorded == [False, True, True, False]


def test_levels_train_alike(corpus: Path, tmp_path: Path) -> None:
    """On a tiny model every level reaches the loss of bfloat16, by other numbers."""
    flags = ("--dtype=bfloat16", "--max_iters=4", "--eval_interval=100")
    run(corpus, tmp_path / "bfloat16", *flags)
    seen = [losses(tmp_path / "bfloat16")]
    for level in ("forward", "forward+dgrad", "full"):
        run(corpus, tmp_path / level, *flags, *FP8, f"--fp8_level={level}")
        seen.append(losses(tmp_path / level))
    assert len({str(found) for found in seen}) == len(seen)
    last = [float.fromhex(found[-1][1]) for found in seen]
    assert max(last) - min(last) < 0.05


def test_the_start_says_what_to_expect() -> None:
    """The planned time relative to bfloat16; a model whose matmuls take little of its time gets a note."""
    for model, says in (
        ("llama_1.36b", r"fp8 takes 0\.[67]\d of the time of bfloat16$"),
        ("tiny", "it does not pay here"),
    ):
        flags = ["--n_embd=128"] if model == "tiny" else []
        config = command_line.resolve([model, *flags, "--device=cuda", "--dtype=bfloat16", "--matmul_dtype=fp8"]).config
        [line] = startup_info._float8_pays(config, plan(config, find_gpu("H200")))
        assert re.search(says, line), line
        usual = dataclasses.replace(config, system=config.system.without_fp8())
        assert startup_info._float8_pays(usual, plan(usual, find_gpu("H200"))) == []


def test_the_probe_is_no_parameter() -> None:
    """It is neither trained, counted, saved nor sent to other ranks."""
    config = _config()
    model = GPT(config.model)
    before = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    Float8Layers(model, config, triton=False)
    assert (list(model.state_dict()), sum(p.numel() for p in model.parameters())) == before
    linear: Any = model.blocks[0].attention.qkv
    assert linear.float8.probe.shape == (3, 4, PROGRAMS)
    assert all(scale.data_ptr() % 16 == 0 for scale in linear.float8.scales)
