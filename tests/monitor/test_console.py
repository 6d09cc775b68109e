"""The output of a run: its blocks, output to a pipe, and output whose reader is gone."""

import io
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from console_helpers import RECORD, info, on_terminal, play

from gptperf.config import ModelConfig
from gptperf.monitor.blocks import checkpoint_lines, evaluation_lines, iteration_lines, startup_lines, summary_lines
from gptperf.monitor.console import Console
from gptperf.monitor.throughput import Throughput

ROOT = Path(__file__).parents[2]


def test_startup_blocks_and_fields() -> None:
    lines = startup_lines(info())
    for expected in (
        "  Total parameters:      124,439,808 (124.44M)",
        "  Key/value heads:       4",
        "  Sequence length:       1024",
        "  FFN type:              swiglu",
        "  Kernels:               eager: rms_norm, rope (no kernel yet)",
        "  Kernels:               triton: swiglu",
        "  Tokens per iteration:  491,520",
        "  Learning rate:         6.00e-04 -> 6.00e-05 (cosine, warm-up 2,000)",
        "  Memory per GPU:        150.1 GB",
        "  Hardware peak:         989.4 TFLOPS (H200 bf16, dense)",
        "  FLOPs per token:       0.7981 GFLOPs (strict)",
        "  Attention/FFN ratio:   0.67",
        "  Expected tokens/s @50% MFU: 619,857",
        " Note: the warm-up is long",
    ):
        assert expected in lines
    blocks = [line for line in lines if line.strip().rstrip(":").isupper() and ":" in line and line[1] != " "]
    assert blocks == [
        " MODEL ARCHITECTURE:",
        " TRAINING CONFIGURATION:",
        " HARDWARE:",
        " THEORETICAL PERFORMANCE:",
    ]


def test_startup_of_an_unknown_gpu_says_how_to_give_a_peak() -> None:
    text = "\n".join(startup_lines(info(None)))
    assert "--peak_tflops=X" in text
    assert "@50% MFU" not in text


def test_iteration_block() -> None:
    assert iteration_lines(RECORD, 600, 2559.0) == [
        "-" * 80,
        " Iter      5  Loss: 10.6456  Time: 4298ms  LR: 1.50e-06",
        "-" * 80,
        " Progress: 5/600 | Time left: 42:39",
        " MFU: 9.22% strict | Achieved: 91.26 TF | Peak: 989.4 TF bf16 dense",
        " Tokens/s: 114,350 | FLOPs/token: 0.7981 GF",
        " Memory: 12.34 GB alloc  15.67 GB peak  16.00 GB reserved",
        " Gradients: norm=2.3456  mean=-1.23e-05  std=3.45e-04",
    ]


def test_iteration_block_on_a_terminal_that_shows_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    play_plain = partial(on_terminal, lambda console: console.iteration(RECORD), mode="plain")
    text = play_plain()
    rule = "\u2500" * 80
    assert text.split("\r\n")[:6] == [
        rule,
        " Iter      5  Loss: 10.6456  Time: 4298ms  LR: 1.50e-06",
        rule,
        " Progress: 5/600",
        "\u26a1 MFU: 9.22% strict \u2502 Achieved: 91.26 TF \u2502 Peak: 989.4 TF bf16 dense",
        "   Tokens/s: 114,350 \u2502 FLOPs/token: 0.7981 GF",
    ]
    assert play_plain(encoding="ascii").isascii()
    monkeypatch.setenv("TERM", "dumb")
    assert play_plain().isascii()


def test_iteration_without_peak_has_no_mfu() -> None:
    mfu = Throughput(ModelConfig(), 491_520, 1, None).record(4298.4)
    text = "\n".join(iteration_lines(RECORD | {"mfu": mfu}, 600, None))
    assert "MFU" not in text
    assert "Peak" not in text
    assert "Achieved: 91.26 TF" in text
    assert "Time left" not in text


def test_iteration_with_the_least() -> None:
    record = {"iter": 1, "loss": float("nan"), "time_ms": 1.0, "lr": 0.0, "gradients": {"grad_mean": None}}
    assert iteration_lines(record, 10, 1.0)[1:] == [
        " Iter      1  Loss: nan  Time: 1ms  LR: 0.00e+00",
        "-" * 80,
        " Progress: 1/10 | Time left: 1.0 s",
    ]


def test_evaluation_line() -> None:
    record = {"iter": 2000, "val_loss": 3.5, "best_val_loss": 3.25, "time_ms": 1250.0}
    assert evaluation_lines(record) == [" Evaluation at 2,000: loss 3.5000  best 3.2500  1.2 s"]


def test_small_figures_keep_their_digits() -> None:
    """A short step, a slow machine and a tiny model must not read as 0."""
    mfu = {"mfu_percent": 0.0012, "achieved_tflops": 3e-6, "tokens_per_sec": 0.42, "flops_per_token": 1234}
    memory = {"rss_gb": 3e-4, "peak_rss_gb": 0.34}
    record = RECORD | {"time_ms": 0.4, "mfu": mfu, "memory": memory}
    lines = iteration_lines(record, 600, 0.02, planned_gb=None)
    lines += evaluation_lines({"iter": 1, "val_loss": 1.0, "time_ms": 4.0})
    lines += checkpoint_lines({"iter": 1, "path": "x", "time_ms": 4.0})
    lines += summary_lines({"iterations": 1, "tokens_per_sec": 0.42, "mfu_percent": 0.0012, "wall_time_s": 0.004})
    lines += startup_lines({"total_parameters": 1234})
    text = "\n".join(lines)
    assert not re.search(r"(?<![\d.])0(\.0+)?(ms| s\b| GB|%|M\)|$)", text, re.MULTILINE), text
    for expected in ("Time: 0.4ms", "Time left: 20 ms", "MFU: 0.0012%", "Tokens/s: 0.42", "300.0 kB resident", "4 ms"):
        assert expected in text


def test_the_summary_of_a_resumed_run_says_what_this_start_added() -> None:
    added = {"first_iter": 11, "iterations": 10, "tokens": 2560, "wall_time_s": 3.0}
    whole = {"iterations": 20, "tokens": 5120, "starts": 2, "wall_time_s": 7.0, "this_start": added}
    text = "\n".join(summary_lines(whole | {"train_loss": 1.5, "train_loss_iterations": 5}))
    assert "  Wall time:             7.0 s in 2 starts\n" in text
    assert "  Added by this start:   10 iterations from 11 on, 2,560 tokens, 3.0 s" in text
    assert "  Training loss:         1.5000 (mean of the last 5 iterations)\n" in text


def test_a_pipe_gets_plain_ascii_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would colour
    monkeypatch.setenv("COLUMNS", "20")  # rich would wrap
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    play(Console(max_iters=600, stream=stream))
    raw = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"\x1b" not in raw
    assert b"  a\\x1b[31mb\n  c\n" in raw
    assert b"  Hardware peak:         989.4 TFLOPS (H200 bf16, dense)\n" in raw
    assert b" WARNING: disk nearly full\n" in raw
    assert b" Checkpoint at 5: out/checkpoints/step_5\n" in raw


def test_other_ranks_print_nothing() -> None:
    stream = io.StringIO()
    play(Console(max_iters=600, enabled=False, stream=stream))
    assert stream.getvalue() == ""


def test_warnings_of_other_ranks_are_said_once() -> None:
    other = Console(max_iters=9, enabled=False, stream=io.StringIO())
    for text in ("disk full", "loader is slow"):
        other.warning(text)
    texts = other.pending()
    assert texts == ["disk full", "loader is slow"]
    assert other.pending() == []
    for i in range(1000):
        other.warning(str(i))
    assert len(other.pending()) == 100
    stream = io.StringIO()
    main = Console(max_iters=9, stream=stream)
    main.warning("disk full")
    assert main.pending() == []
    main.gathered(3, texts)
    main.gathered(5, texts)
    assert stream.getvalue() == " WARNING: disk full\n WARNING: rank 3: loader is slow\n"


def test_stability_and_plan_in_a_block() -> None:
    gradients = {"global_norm": 1.0, "non_finite": 17}
    stability = {"window": 20, "loss_variance": 1.234e-3, "spike": True, "plateau": True, "non_finite": 2}
    lines = iteration_lines(RECORD | {"gradients": gradients, "stability": stability}, 600, None, planned_gb=15.5)
    assert lines[-3:] == [
        " Memory: 12.34 GB alloc  15.67 GB peak  16.00 GB reserved  15.50 GB planned",
        " Gradients: norm=1.0000",
        " Stability: loss variance=1.23e-03 of 20  LOSS SPIKE  PLATEAU  2 steps skipped  "
        "17 gradient elements not finite",
    ]
    assert iteration_lines(RECORD | {"stability": {"window": 1, "spike": False}}, 600, None)[-1][:10] == " Gradients"


def test_a_closed_stdout_does_not_end_the_run() -> None:
    code = "from gptperf.monitor.console import Console; Console(max_iters=9).message('x'); open('done', 'w')"
    with tempfile.TemporaryDirectory() as folder:
        command = f'exec {sys.executable} -c "{code}" >&-'
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(["sh", "-c", command], cwd=folder, env=env, capture_output=True, check=False)
        assert done.stderr == b""
        assert os.path.exists(os.path.join(folder, "done"))


def test_head_leaves_the_run_silent() -> None:
    code = """
from gptperf.errors import main_guard
from gptperf.monitor.console import Console
with main_guard(), Console(max_iters=9) as console:
    for _ in range(100_000):
        console.message("x" * 70)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 0
