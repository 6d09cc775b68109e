"""Times the steps of two configurations in turns on one card, in a process of its own.

Both models are on the card at once. After a warm-up each arm
runs a window of steps in each turn; the arm that goes first changes from turn to turn, so that a clock that falls with
the temperature meets both alike. A window is as many steps as take about `WINDOW_S`. Batches are random tokens.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptperf.config import Config, command_line
from gptperf.distributed.process import start_process
from gptperf.files import replace_text
from gptperf.monitor.step_timing import EnergyMeter
from gptperf.training.engine import build_engine, compile_engine, open_graphs
from gptperf.training.preflight import check_plan
from gptperf.training.step import train_step

__all__ = ["TURNS", "Window", "in_turns", "measure"]

TURNS = 8
WINDOW_S = 1.0
_WARM_UP = 4
_MOST_STEPS = 200


class Window(NamedTuple):
    """Some steps of an arm."""

    seconds: float
    joules: float | None


def in_turns(run: Sequence[Callable[[int], Window]], turns: int, window_s: float) -> list[list[Window]]:
    """Runs windows of steps of several arms in turns.

    Args:
        run: For each arm, a function that runs some steps and waits for them.
        turns: Windows of each arm.
        window_s: Seconds of a window, about.

    Returns:
        For each arm the windows, each for one step.
    """
    steps = []
    for arm in run:
        arm(_WARM_UP)
        steps.append(min(_MOST_STEPS, max(1, math.ceil(window_s / arm(1).seconds))))
    found: list[list[Window]] = [[] for _ in run]
    for turn in range(turns):
        order = range(len(run)) if turn % 2 == 0 else reversed(range(len(run)))
        for place in order:
            window, count = run[place](steps[place]), steps[place]
            joules = None if window.joules is None else window.joules / count
            found[place].append(Window(window.seconds / count, joules))
    return found


def _steps_of(config: Config, process: Any, meter: EnergyMeter | None) -> Callable[[int], Window]:
    """Builds an arm, and returns a function that runs some of its steps and waits for them."""
    engine = build_engine(config, process)
    compile_engine(engine)
    planned = check_plan(config, process)
    micro_batches = config.train.gradient_accumulation_steps
    open_graphs(engine, None if planned is None else planned.step_ms / micro_batches, print)  # as training does
    batches, done = _random_batches(config, process.device), 0

    def wait() -> None:
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)

    def run(count: int) -> Window:
        nonlocal done
        wait()
        energy, start = None if meter is None else meter.joules(), time.perf_counter()
        for _ in range(count):
            train_step(engine, batches, done)
            done += 1
        wait()
        seconds = time.perf_counter() - start
        after = None if meter is None else meter.joules()
        return Window(seconds, None if energy is None or after is None else after - energy)

    return run


def _random_batches(config: Config, device: torch.device) -> Iterator[Tensor]:
    shape = (config.train.batch_size, config.model.block_size + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, device=device)
        yield torch.stack([tokens[:, :-1], tokens[:, 1:]])


def measure(argv: Sequence[str]) -> int:
    """Times both arms, and writes seconds and joules of a token for each arm and turn, with the name of the device.

    Args:
        argv: The path of the result, and for each arm a JSON list of arguments for `gptperf.train`.
    """
    path, *arms = argv
    configs = [command_line.resolve(json.loads(arm)).config for arm in arms]
    process = start_process(configs[0].system.device)
    on_gpu = process.device.type == "cuda"
    name = "CPU"
    meter = None
    if on_gpu:
        properties = torch.cuda.get_device_properties(process.device)
        name, meter = properties.name, EnergyMeter(f"GPU-{properties.uuid}")
    try:
        run = [_steps_of(config, process, meter) for config in configs]
        windows = in_turns(run, TURNS, WINDOW_S if on_gpu else WINDOW_S / 10)
    finally:
        process.close()
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "arms": []}
    for config, arm in zip(configs, windows, strict=True):
        tokens = config.tokens_per_iter
        joules = [None if window.joules is None else window.joules / tokens for window in arm]
        seconds = [window.seconds / tokens for window in arm]
        found["arms"].append({"seconds_per_token": seconds, "joules_per_token": joules})
    replace_text(Path(path), json.dumps(found, indent=2, allow_nan=False) + "\n")
    return 0
