"""The expected time of a run, and the runs that a CPU does not start unasked."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import losses, run, run_log

from gptperf import flops
from gptperf.config import KEYS, Config, command_line
from gptperf.errors import ConfigError
from gptperf.registry import component_names
from gptperf.training import estimate, start

CPU = torch.device("cpu")
FLOP_S, PASS_S = 1e11, 1e-10


def _config(*argv: str) -> Config:
    return command_line.resolve(argv).config


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose rates are known."""
    monkeypatch.setattr(estimate, "_measure", lambda *_: (FLOP_S, PASS_S))


def _estimate(config: Config, world_size: int = 1, val_tokens: int = 10**9) -> estimate.Estimate:
    found = estimate.estimate(config, world_size, CPU, None, [val_tokens])
    assert found is not None
    return found


def test_the_default_model_is_refused_on_a_cpu_only_if_nobody_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text("[train]\nmax_iters = 5\n")
    two = str(tmp_path / "two.toml")
    for argv in ([], [two], [two, "--norm_position=pre"], ["--max_iters=5"], ["--arch_preset=llama"], ["gpt2_owt"]):
        origins = command_line.resolve(argv).origins
        with pytest.raises(ConfigError, match=r"make train.*gptperf\.train tiny"):
            estimate.check_sizes_given(origins, CPU)
        estimate.check_sizes_given(origins, torch.device("cuda"))
    for argv in (["gpt2_124m"], ["tiny"], ["--n_layer=12"], ["--batch_size=12"], [two, "quick_test"]):
        estimate.check_sizes_given(command_line.resolve(argv).origins, CPU)


@pytest.mark.slow
def test_the_command_refuses_before_anything_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptperf.train", "--device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m gptperf.train tiny" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("rate")
def test_the_times_follow_the_flops() -> None:
    config = _config("gpt2_124m")
    found = _estimate(config)
    flop = config.tokens_per_iter * flops.flops_per_token(config.model).training_per_token
    update_s = flops.parameters(config.model).total * PASS_S
    assert flop / FLOP_S < found.iteration_s < flop / FLOP_S + 200 * update_s
    assert _estimate(config, world_size=4).iteration_s == pytest.approx(found.iteration_s / 4, rel=0.01)
    # A third of the FLOPs of training, for 200 batches of 12 sequences, or for as many as the split has.
    evaluated = 200 * 12 * 1024 * flops.flops_per_token(config.model).training_per_token / 3
    assert found.evaluation_s == pytest.approx(evaluated / FLOP_S)
    assert _estimate(config, val_tokens=12 * 1024 * 20).evaluation_s == pytest.approx(found.evaluation_s / 10)
    assert found.total_s(config) == pytest.approx(
        600_000 * found.iteration_s + 300 * found.evaluation_s + found.sample_s
    )
    assert found.total_s(config, 599_999) == found.iteration_s + found.evaluation_s + found.sample_s


@pytest.mark.usefixtures("rate")
def test_a_slow_iteration_or_too_little_memory_gives_a_warning_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = _config("gpt2_124m"), _config("tiny")
    text = estimate.slow_warning(_estimate(large), large, CPU)
    assert text is not None
    for part in ("491,520 tokens", "124.4M", "minutes", "train tiny", "gradient_accumulation_steps = 40", "batch_size"):
        assert part in text
    assert estimate.slow_warning(_estimate(small), small, CPU) is None
    monkeypatch.setattr(estimate, "available_gb", lambda: 0.001)
    text = estimate.slow_warning(_estimate(small), small, CPU)
    assert text is not None
    assert "0.0 GB are available" in text
    assert estimate.slow_warning(_estimate(small), small, torch.device("cuda")) is None


sizes = st.fixed_dictionaries(
    {
        "n_head": st.integers(1, 40),
        "n_layer": st.integers(1, 100),
        "block_size": st.integers(1, 5000),
        "vocab_size": st.integers(1, 200_000),
        "d_ff": st.none() | st.integers(1, 10_000),
        "qk_norm": st.booleans(),
        "position_encoding": st.sampled_from(component_names("position_encoding")),
        "ffn_type": st.sampled_from(component_names("ffn_type")),
        "norm_position": st.sampled_from(component_names("norm_position")),
    }
)


@given(sizes, st.integers(1, 100))
def test_every_model_has_a_small_one_to_measure(values: dict[str, object], half: int) -> None:
    model = dataclasses.replace(Config().model, n_embd=2 * half * int(str(values["n_head"])), **values)
    small = estimate._smaller(model)
    assert small.head_width == model.head_width
    assert flops.parameters(small).total < 30_000_000
    assert (small.n_layer, small.block_size) <= (model.n_layer, model.block_size)


def test_the_measurement_changes_no_random_number() -> None:
    config = _config("tiny", "--n_layer=1", "--dropout=0.1", "--dtype=bfloat16")
    before = torch.get_rng_state()
    flop_s, pass_s = estimate._measure(config.model, config.system, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert flop_s > 0
    assert pass_s > 0


@pytest.mark.slow
def test_a_run_has_the_same_bits_with_and_without_an_estimate(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, tmp_path / "a", "--dropout=0.1", "--max_iters=5", "--eval_interval=2")
    info, log = run_log(tmp_path / "a")["startup_info"], run_log(tmp_path / "a")
    assert info["expected_iteration_s"] > 0
    assert info["expected_total_s"] > 5 * info["expected_iteration_s"]
    assert any(note.startswith("estimate") for note in info["notes"])
    config = _config("--max_iters=5", "--eval_interval=2")
    assert [estimate.evaluations(config, done) for done in (0, 2, 5)] == [len(log["eval_steps"]), 2, 0]
    monkeypatch.setattr(start, "estimate", lambda *_: None)
    run(corpus, tmp_path / "b", "--dropout=0.1", "--max_iters=5", "--eval_interval=2")
    assert "expected_iteration_s" not in run_log(tmp_path / "b")["startup_info"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_sizes_that_count_are_keys() -> None:
    assert set(estimate._SIZES) <= set(KEYS)
