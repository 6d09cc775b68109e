"""What a run prints: on a pipe, on a terminal, on a small one, and when the reader has gone."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptperf.config import ModelConfig
from gptperf.hardware import Peak, match_gpu, no_peak_hint, peak_flop_s
from gptperf.monitor.console import Console, _duration, evaluation_lines, iteration_lines, startup_lines
from gptperf.monitor.throughput import Throughput, theoretical

ROOT = Path(__file__).parent.parent
PEAK = peak_flop_s(match_gpu("NVIDIA H200"), "bfloat16")
RECORD = {
    "iter": 5,
    "loss": 10.64561,
    "time_ms": 4298.4,
    "lr": 1.5e-6,
    "mfu": Throughput(ModelConfig(), 491_520, 1, PEAK).record(4298.4),
    "memory": {"allocated_gb": 12.34, "peak_gb": 15.67, "reserved_gb": 16.0},
    "gradients": {"global_norm": 2.3456, "grad_mean": -1.23e-5, "grad_std": 3.45e-4},
}


def info(peak: Peak | None = PEAK) -> dict[str, Any]:
    ops = {"rms_norm": "eager", "rope": "eager", "swiglu": "triton"}
    facts: dict[str, Any] = {
        "total_parameters": 124_439_808,
        "trainable_parameters": 124_439_808,
        "n_head": 12,
        "kv_heads": 4,
        "block_size": 1024,
        "components": {"normalization": "rmsnorm", "ffn_type": "swiglu", "bias": False},
        "kernels": ops,
        "kernel_reasons": {"rms_norm": "no kernel yet", "rope": "no kernel yet"},
        "batch_size": 12,
        "gradient_accumulation_steps": 40,
        "effective_batch_size": 480,
        "tokens_per_iter": 491_520,
        "max_iters": 600,
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "lr_schedule": "cosine",
        "warmup_iters": 2000,
        "device": "NVIDIA H200",
        "num_gpus": 1,
        "memory_gb": 150.1,
        "dtype": "bfloat16",
        "parallelism": "DDP",
        "notes": ["the warm-up is long"],
    }
    if peak is None:
        facts["peak_hint"] = no_peak_hint("NVIDIA H20", "bfloat16")
    return facts | theoretical(ModelConfig(), peak, 1)


def play(console: Console) -> None:
    with console:
        console.startup(info())
        console.iteration(RECORD, eta_s=2559.0)
        console.evaluation({"iter": 5, "val_loss": 10.5, "best_val_loss": 10.25})
        console.checkpoint({"iter": 5, "path": "out/checkpoints/step_5"})
        console.warning("disk nearly full")
        console.finish({"iterations": 600, "val_loss": 3.25, "sample": "a\x1b[31mb\nc", "log_path": "out/run.json"})


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
        "  FLOPs per token:       0.7981 GFLOPs",
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
        " MFU: 9.22% | Achieved: 91.26 TF | Peak: 989.4 TF",
        " Tokens/s: 114,350 | FLOPs/token: 0.7981 GF",
        " Memory: 12.34 GB alloc  15.67 GB peak  16.00 GB reserved",
        " Gradients: norm=2.3456  mean=-1.23e-05  std=3.45e-04",
    ]


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
        " Progress: 1/10 | Time left: 0:01",
    ]


def test_evaluation_line() -> None:
    record = {"iter": 2000, "val_loss": 3.5, "best_val_loss": 3.25, "time_ms": 1250.0}
    assert evaluation_lines(record) == [" Evaluation at 2,000: validation loss 3.5000  best 3.2500  1.2 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (42, "0:42"), (59.6, "1:00"), (3600, "1:00:00"), (93784, "1d 02:03:04"), (-1, "0:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


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


def read_all(master: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO is its end of file
        while part := os.read(master, 1 << 16):
            parts.append(part)
    os.close(master)
    return b"".join(parts).decode()


def on_terminal(action: Callable[[Console], None]) -> str:
    """What a terminal gets (rich takes the width from COLUMNS, or else from the process's own streams)."""
    master, slave = pty.openpty()
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append(read_all(master)))
    reader.start()
    with os.fdopen(slave, "w") as stream:
        action(Console(max_iters=600, stream=stream))
        stream.flush()
    reader.join()
    return texts[0]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def one_iteration(console: Console) -> None:
    with console:
        console.iteration(RECORD, eta_s=2559.0)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_a_bar_that_goes_away() -> None:
    text = on_terminal(one_iteration)
    bar = text.rindex("5/600 ")
    assert "loss 10.6456  114,350 tok/s  42:39 left" in text[bar:]
    assert text.index("\x1b[?25l") < bar < text.index("\x1b[?25h")  # the cursor is hidden, and comes back
    assert "\x1b[1m Iter      5" in text


@pytest.mark.usefixtures("terminal")
def test_an_error_takes_the_bar_away_and_passes() -> None:
    def fail(console: Console) -> None:
        with console:
            console.iteration(RECORD)
            raise ZeroDivisionError

    def fail_and_survive(console: Console) -> None:
        with pytest.raises(ZeroDivisionError):
            fail(console)

    assert on_terminal(fail_and_survive).rstrip().endswith(("\x1b[?25h", "\x1b[2K"))


@pytest.mark.usefixtures("terminal")
def test_no_color_means_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = on_terminal(play_little)
    assert "\x1b[33m" not in text
    assert "\x1b[1;33m" not in text
    assert " WARNING: careful" in text
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[1;33m" in on_terminal(play_little)


def play_little(console: Console) -> None:
    with console:
        console.iteration(RECORD)
        console.warning("careful")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("columns", "encoding"), [(1, "utf-8"), (20, "ascii"), (200, "utf-8")])
def test_terminals_of_any_width(monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = f"""
from gptperf.monitor.console import Console
with Console(max_iters=600) as console:
    console.iteration({RECORD!r}, eta_s=2559.0)
    console.message("caf\\u00e9")
"""
    process = subprocess.run([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, check=False)
    os.close(slave)
    text = read_all(master)
    assert process.returncode == 0, text
    rules = re.findall(r"\n(?:\x1b\[2m)?(-+)(?:\x1b\[0m)?\r\n", text)
    assert rules == ["-" * min(columns, 80)]  # of two; the first has no line before it
    assert ("caf\u00e9" if encoding == "utf-8" else "caf?") in text


@pytest.mark.usefixtures("terminal")
def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_terminal(one_iteration)


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("terminal_stream", [True, False])
def test_a_gone_reader_does_not_end_the_run(terminal_stream: bool) -> None:
    with Console(max_iters=600, stream=Gone(terminal_stream)) as console:
        assert console.enabled
        console.iteration(RECORD)
        assert not console.enabled
        play(console)


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
