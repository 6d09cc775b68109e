"""One training of a command that trains many: its folder, its flags, and what its log says. Does not import torch."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptperf.config import KEYS, Config
from gptperf.errors import DataError
from gptperf.monitor.journal import find_journal
from gptperf.monitor.runs import LoggedRun, read_run

__all__ = ["LEARNING_RATES", "Job", "differing_keys", "flag_keys", "held_by_others"]

LEARNING_RATES = ("learning_rate", "min_lr", "muon_lr")
"""Keys that a command sets if it finds the learning rate of every arm."""
OF_NO_EFFECT = frozenset(
    {
        *("out_dir", "init_from", "overwrite", "data_dir", "plugins", "debug", "collective_timeout_s", "ignore_plan"),
        *("prefetch", "loader_timeout_s", "async_save", "keep_checkpoints", "save_interval", "peak_tflops"),
        "peak_basis",
        *(name for name, key in KEYS.items() if key.section == "log"),
    }
)
"""Keys that do not change the trained model: an interrupted run may continue with other values of them."""


class Job(NamedTuple):
    """One training."""

    seed: int
    out_dir: Path
    argv: tuple[str, ...]
    """Arguments for `gptperf.train`, without `init_from`."""
    config: Config
    label: str
    """What distinguishes the run from the others of its arm: the seed, or the learning rate."""
    fork: tuple[Path, int] | None = None
    """The run and the iteration whose checkpoint this run starts from; None: it starts from scratch."""
    keeps: tuple[int, ...] = ()
    """Iterations whose checkpoints other runs start from: without them this run is not finished."""

    def command(self) -> list[str]:
        """Returns the arguments for `gptperf.train`.

        A run that has a checkpoint of its own continues from it. It starts again if it has passed an iteration whose
        checkpoint another run needs and that is no longer there, for example because only logs were copied.
        """
        own = [int(path.name[5:]) for path in (self.out_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
        if own and any(step <= max(own) and not self.has_checkpoint(step) for step in self.keeps):
            return [*self.argv, "--overwrite=True", "--init_from=scratch"]
        start = "auto" if self.fork is None or own else f"{self.fork[0]}@{self.fork[1]}"
        return [*self.argv, f"--init_from={start}"]

    def log(self) -> LoggedRun | None:
        """Returns the log of this run, or None if it has not written one yet."""
        path = find_journal(self.out_dir)
        if path is None:
            return None
        found = path.stat()
        return _read(path, f"{self.out_dir.parent.name}, {self.label}", found.st_mtime_ns, found.st_size)

    def val_loss(self) -> float | None:
        """Returns the validation loss of the last iteration, or None if the run is not finished."""
        run = self.log()
        if run is None or not self._ended(run):
            return None
        last = run.evals[-1] if run.evals else None
        return last.loss if last is not None and last.iter == run.iterations else None

    def finished(self) -> bool:
        """Returns whether the run has trained to its last iteration, logged its end, and has what others start from."""
        run = self.log()
        return run is not None and self._ended(run) and all(map(self.has_checkpoint, self.keeps))

    def has_checkpoint(self, iteration: int) -> bool:
        """Returns whether the checkpoint of an iteration is there; a checkpoint is complete or absent."""
        return (self.checkpoint(iteration) / "MANIFEST.json").is_file()

    def checkpoint(self, iteration: int) -> Path:
        """Returns the folder of the checkpoint of an iteration."""
        return self.out_dir / "checkpoints" / f"step-{iteration:08d}"

    def _ended(self, run: LoggedRun) -> bool:
        return run.state == "finished" and run.iterations == self.config.train.max_iters

    def state(self) -> str:
        """Returns in words how far the run is."""
        run = self.log()
        if run is not None and self._ended(run):
            return "finished"
        return "-" if run is None else f"at iteration {run.iterations:,}"


@functools.lru_cache(1024)
def _read(path: Path, name: str, changed_ns: int, size: int) -> LoggedRun | None:
    """Reads a log, once for each of its states, because a command asks for every log after every run."""
    try:
        return read_run(path, name)
    except DataError:
        return None


def flag_keys(argv: Iterable[str]) -> set[str]:
    """Returns the keys that the flags of a command line set."""
    return {text[2:].partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}


def differing_keys(values: Mapping[str, Any], config: Config) -> list[str]:
    """Returns the differing keys that change the trained model; a key that is missing in `values` has its default."""
    now = config.flat()
    return [key for key in now if key not in OF_NO_EFFECT and values.get(key, KEYS[key].default) != now[key]]


def held_by_others(jobs: Iterable[Job], ignore: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
    """Returns a line for each folder that holds a run of another configuration.

    Args:
        jobs: The runs that are to be trained.
        ignore: Beginning of a label -> keys that do not count for the runs with such labels.
    """
    lines = []
    for job in jobs:
        run = job.log()
        keys = [] if run is None or not run.config else differing_keys(run.config, job.config)
        for begin, known_later in (ignore or {}).items():
            keys = [key for key in keys if not (job.label.startswith(begin) and key in known_later)]
        if run is not None and keys:
            told = [f"{key}: {run.config.get(key)} there, {job.config.flat()[key]} here" for key in keys]
            lines.append(f"{job.out_dir}: holds a run of another configuration ({'; '.join(told)})")
    return lines
