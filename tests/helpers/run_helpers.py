"""A small run for the tests of whole runs."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gptperf.config import command_line
from gptperf.distributed.replicated import Replicated
from gptperf.training import trainer

ROOT = Path(__file__).parents[2]


SMALL = """
[model]
arch_preset = "llama"
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
block_size = 32
vocab_size = 257
vocab_multiple = 8
[data]
dataset = "text"
[train]
batch_size = 2
gradient_accumulation_steps = 4
max_iters = 20
eval_interval = 10
eval_iters = 4
save_interval = 5
[optimizer]
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 3
[system]
device = "cpu"
dtype = "float32"
compile = false
[log]
log_interval = 1
sample_tokens = 8
"""


def masters(weights: Replicated) -> list[tuple[str, Tensor]]:
    """Returns the name and the master weight of each parameter, of weights that are not sharded."""
    pieces = weights.pieces(lambda bucket: bucket.master.data, to_save=False)
    return [(name, values.view(shape)) for name, shape, _, values in pieces]


def run_argv(corpus: Path, out: Path, *flags: str) -> list[str]:
    return [str(corpus / "small.toml"), f"--data_dir={corpus / 'data'}", f"--out_dir={out}", *flags]


def run(corpus: Path, out: Path, *flags: str) -> int:
    resolved = command_line.resolve(run_argv(corpus, out, *flags))
    return trainer.train(resolved.config, resolved.origins, resolved.changes)


def run_command(corpus: Path, out: Path, *flags: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *(launcher or ["-m"]), "gptperf.train", *run_argv(corpus, out, *flags)]


def run_log(out: Path) -> dict[str, Any]:
    (path,) = out.glob("run_*.json")
    return json.loads(path.read_text())


def losses(out: Path) -> list[tuple[int, str]]:
    return [(entry["iter"], float(entry["loss"]).hex()) for entry in run_log(out)["training_iterations"]]


def hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
