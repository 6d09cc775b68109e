"""Times starts and saves: `python -m bench.measure.start [--models tiny llama_1.36b]`.

`gptperf.train` runs in a process of its own on the built-in data set, which is prepared before. The time from the start
of the process to the line of its first iteration counts: once with empty caches of compiled kernels, and once with
filled ones. The second run saves four times, and its log says for how long training waited for each save. Then
`gptperf.sample` generates one token with that checkpoint, again with empty and with filled caches; the time to its end
counts.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bench.measure.models import MODELS, STARTED
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice
from gptperf.errors import DeviceError, run_main

__all__ = ["PROTOCOL", "line", "main", "measure"]

PROTOCOL = __doc__
_SAVES, _APART = 4, 40
_ITERATION = re.compile(r"^ ?Iter +1 ")


def measure(model: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Measures one model on the device that a run takes by default.

    Args:
        model: one of `STARTED`.
        flags: more flags of the run.

    Returns:
        iteration_s and token_s, each with cold and warm; stalls_ms, one for each save; save_ms, the median time to the
        last byte on disk.

    Raises:
        DeviceError: A command failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = f"--data_dir={folder / 'data'}"
        _run(folder, "data", "gptperf.prepare", "python_stdlib", data)
        shared = [*MODELS[model], data, "--gradient_accumulation_steps=1"]
        shared += ["--warmup_iters=1", "--log_interval=1", "--console=plain", "--sample_tokens=0", "--eval_iters=1"]
        shared += ["--eval_interval=100000", "--keep_checkpoints=1"]
        found: dict[str, Any] = {"model": model, "iteration_s": {}, "token_s": {}}
        for caches, iterations in (("cold", 2), ("warm", _SAVES * _APART)):
            own = [f"--out_dir={folder / caches}", f"--max_iters={iterations}", f"--save_interval={_APART}"]
            found["iteration_s"][caches] = _run(folder, "train", "gptperf.train", *shared, *own, *flags)
        for caches in ("cold", "warm"):
            one = (str(folder / "warm"), "--tokens=1", "--prompt=def")
            found["token_s"][caches] = _run(folder, "sample", "gptperf.sample", *one)
        (log,) = (folder / "warm").glob("run_*.json")
        saves = json.loads(log.read_text())["checkpoints"]
    found["stalls_ms"] = [save["stall_ms"] for save in saves]
    return found | {"save_ms": statistics.median(save["time_ms"] for save in saves)}


def _run(folder: Path, caches: str, command: str, *arguments: str) -> float:
    """Runs a command, with its compiled kernels in a folder of that name.

    Returns:
        The seconds to the line of the first iteration, or to the end if there is none.
    """
    variables = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    environment = os.environ | {name: str(folder / "caches" / caches / name) for name in variables}
    begun, lines, seconds = time.perf_counter(), [], None
    run = [sys.executable, "-m", command, *arguments]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(text)
            if seconds is None and _ITERATION.match(text):
                seconds = time.perf_counter() - begun
    if process.returncode:
        raise DeviceError(f"{command} ended with exit code {process.returncode}: {''.join(lines[-5:])}")
    return time.perf_counter() - begun if seconds is None else seconds


def line(found: Mapping[str, Any]) -> str:
    """Returns the row of the table for a result of `measure`."""
    first, *later = found["stalls_ms"]
    times = [*found["iteration_s"].values(), *found["token_s"].values()]
    stalls = f"{first:>12.1f}{max(later, default=math.nan):>12.1f}{found['save_ms']:>10.0f}"
    return f"{found['model']:<14}{''.join(f'{seconds:>9.2f}' for seconds in times)}{stalls}"


@dataclass(frozen=True, kw_only=True)
class _StartFlags(Flags):
    """What to time."""

    models: tuple[Annotated[str, Choice(STARTED)], ...] = STARTED
    """Models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each model."""
    args = parse(_StartFlags, argv, "bench.measure.start", __doc__)
    columns = f"{'s to iter. 1':>9}{'warm':>6}{'s to token 1':>14}{'warm':>7}"
    print(f"{'':<14}{columns}{'1st stall ms':>14}{'most later':>12}{'save ms':>9}")
    for model in args.models:
        print(line(measure(model)), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
