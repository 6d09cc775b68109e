"""Records of a run, and terminals that show them."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from typing import Any

from gptperf.config import ModelConfig
from gptperf.hardware import Peak, match_gpu, no_peak_hint, peak_flop_s
from gptperf.monitor.console import Console
from gptperf.monitor.throughput import Throughput, theoretical

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
        facts["peak_hint"] = no_peak_hint("NVIDIA GB10", "bfloat16")
    return facts | theoretical(ModelConfig(), peak, 1)


def play(console: Console) -> None:
    with console:
        console.startup(info())
        console.iteration(RECORD, eta_s=2559.0)
        console.evaluation({"iter": 5, "val_loss": 10.5, "best_val_loss": 10.25})
        console.checkpoint({"iter": 5, "path": "out/checkpoints/step_5"})
        console.warning("disk nearly full")
        console.finish({"iterations": 600, "val_loss": 3.25, "sample": "a\x1b[31mb\nc", "log_path": "out/run.json"})


def read_all(master: int) -> str:
    """Returns what was written to a pseudo-terminal whose other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO is the end of file of a pseudo-terminal
        while part := os.read(master, 1 << 16):
            parts.append(part)
    os.close(master)
    return b"".join(parts).decode()


def on_terminal(action: Callable[[Console], None], encoding: str = "utf-8", **keys: Any) -> str:
    """Returns what a console writes to a terminal; rich takes the width from COLUMNS or the process's own streams."""
    master, slave = pty.openpty()
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append(read_all(master)))
    reader.start()
    with os.fdopen(slave, "w", encoding=encoding) as stream:
        action(Console(max_iters=600, stream=stream, **keys))
        stream.flush()
    reader.join()
    return texts[0]


def screen(text: str, columns: int = 100, rows: int = 400) -> list[str]:
    """Returns the lines that a terminal shows after these bytes, without styles."""
    lines, y, x = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]", text):
        if part == "\n":
            y += 1
            lines += [""] * (y + 1 - len(lines))
        elif part == "\r":
            x = 0
        elif part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 1)
            if part[-1] == "A":
                y = max(0, y - count)
            elif part[-1] == "K":
                lines[y] = ""
            elif part[-1] == "J":
                del lines[y + 1 :]
                lines[y] = ""
            else:
                assert part[-1] == "m", repr(part)
        else:
            if x == columns:
                y, x = y + 1, 0
                lines += [""] * (y + 1 - len(lines))
            lines[y] = lines[y][:x].ljust(x) + part + lines[y][x + 1 :]
            x += 1
    assert len(lines) <= rows
    return [line.rstrip() for line in lines]


def in_a_terminal(code: str, columns: int = 100, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Runs Python code whose streams are a terminal; returns its exit code and output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append(read_all(master)))
    reader.start()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdin=slave, stdout=slave, stderr=slave, env=env, check=False)
    os.close(slave)
    reader.join()
    return done.returncode, texts[0]
