"""Helpers for the tests of races: a trainer that writes logs of made-up losses, without training."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from ablate_helpers import finish

from gptperf.config import Config, command_line
from gptperf.errors import PREEMPTED
from gptperf.experiment import runner
from gptperf.experiment.job import Job

Loss = Callable[[Config], float]


class FakeTrainer:
    """Stands in for `gptperf.train`: each run ends at once, with the loss and the checkpoints that a real one has.

    Args:
        monkeypatch: replaces the runner's processes.
        loss: configuration of a run -> its final validation loss; None: it diverges, exit code 5.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: Callable[[Config], float | None]) -> None:
        self.loss = loss
        self.ran: list[tuple[Config, str]] = []
        self.stop_at: int | None = None
        """Number of the run that is asked to stop."""

        def run(_: runner.Runner, line: list[str], gpu: str | None = None, log: Path | None = None) -> int:
            if "gptperf.train" not in line:
                return self.speed(Path(line[3]))
            return self.train(line[line.index("gptperf.train") + 1 :])

        monkeypatch.setattr(runner.Runner, "run", run)

    def speed(self, path: Path) -> int:
        arms = [{"seconds_per_token": [1e-6 * (1 + 0.01 * turn) * slow for turn in range(4)]} for slow in (1, 1.25)]
        found = {"device": "a card", "arms": [arm | {"joules_per_token": [5e-4] * 4} for arm in arms]}
        path.write_text(json.dumps(found))
        return 0

    def train(self, argv: list[str]) -> int:
        *argv, last_flag = argv
        start = last_flag.removeprefix("--init_from=")
        config = command_line.resolve(argv).config
        folder = Path(config.train.out_dir)
        self.ran.append((config, start))
        if self.stop_at == len(self.ran):
            return PREEMPTED
        if "@" in start:
            run, _, step = start.rpartition("@")
            assert (Path(run) / "checkpoints" / f"step-{int(step):08d}" / "MANIFEST.json").is_file(), start
        loss = self.loss(config)
        if loss is None:
            return 5
        job = Job(config.train.seed, folder, (), config, "")
        every, last = config.train.save_interval or 1, config.train.max_iters
        for step in sorted({*range(every, last, every), last})[-config.train.keep_checkpoints :]:
            job.checkpoint(step).mkdir(parents=True, exist_ok=True)
            (job.checkpoint(step) / "MANIFEST.json").touch()
        finish(job, loss, name=f"run_20260102_{len(list(folder.glob('*.jsonl'))):06d}")
        return 0


def power_law(config: Config, tokens_ratio: float, best_rate: float) -> float:
    """Returns the loss of a run whose data is worth `tokens_ratio` times as many tokens, tuned at `best_rate`."""
    tokens = config.train.max_iters * config.tokens_per_iter * tokens_ratio
    seed = config.train.seed % 1000
    noise = 1e-3 * math.sin(37 * seed) + 3e-4 * math.sin(101 * seed + config.model.n_layer + config.train.max_iters)
    return 2 + 3 * (tokens / 1e8) ** -0.2 + 0.05 * math.log(config.optimizer.learning_rate / best_rate) ** 2 + noise
