"""The state of a race: its trainings, their results, and the work that is left. This module does not import torch.

Everything is read from the logs of the trainings, so that a race may be continued anywhere with a copy of its folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptperf.config import Config
from gptperf.data import documents
from gptperf.data.mixture import open_tokens, parts_of
from gptperf.errors import DataError
from gptperf.experiment.job import Job
from gptperf.experiment.rates import at_the_edge, best_of
from gptperf.files import delete, replace_text
from gptperf.race.arms import HORIZONS, Arm, Chain, full_runs, quarter_runs, seed_chain

__all__ = ["STAGES", "Race", "Tuning", "bytes_per_token"]

STAGES = ("quarter", "full", "seeds")
"""The stages of a race: learning rates at a quarter of the horizon, then over all of it, then the seeds."""


@dataclass(frozen=True)
class Tuning:
    """How far the learning rate of an arm is known."""

    quarter: list[Job]
    full: list[Job]
    """The best one at a quarter and its neighbours; empty until that one is known."""
    factor: float | None
    """Multiple of the arm's own learning rate that is compared; None until it is known."""
    problem: str | None
    """The reason why there is none, which voids the verdict."""


@dataclass
class Race:
    """Two arms and their trainings."""

    arms: tuple[Arm, Arm]
    factors: tuple[float, ...]
    """Learning rates that are tried, as multiples of the arm's own, rising."""
    seeds: int
    out: Path
    failed: dict[Path, str] = field(default_factory=dict)
    """Folder -> how the training in it failed."""

    def tuning(self, arm: Arm) -> Tuning:
        """Returns how far the learning rate of an arm is known."""
        quarter = quarter_runs(arm, self.factors)
        best, problem = self._best(arm, quarter, "at a quarter of the horizon")
        if best is None:
            return Tuning(quarter, [], None, problem)
        place = quarter.index(best)
        near = self.factors[place - 1 : place + 2]
        full = full_runs(arm, near)
        best, problem = self._best(arm, full, "over the whole horizon")
        return Tuning(quarter, full, None if best is None else near[full.index(best)], problem)

    def _best(self, arm: Arm, jobs: Sequence[Job], where: str) -> tuple[Job | None, str | None]:
        """Returns the best of some learning rates, if all of them were tried, or the reason why none can be used."""
        if not all(job.finished() or job.out_dir in self.failed for job in jobs):
            return None, None
        best = best_of(jobs)
        if best is None:
            return None, f"{arm.name}: no learning rate works {where}"
        if at_the_edge(jobs, best):
            rate = best.config.optimizer.learning_rate
            return None, (
                f"{arm.name}: the best learning rate {where}, {rate:g}, is at the edge of those tried, so a better one "
                f"may lie beyond: the verdict is void. Set learning_rate = {rate:g} in its configuration, and run the "
                "race again: what is trained already counts"
            )
        return best, None

    def problems(self) -> list[str]:
        """Returns why there cannot be a verdict."""
        return [problem for arm in self.arms if (problem := self.tuning(arm).problem) is not None]

    def chains(self, stage: str) -> list[Chain]:
        """Returns the trainings of a stage, those of both arms by turns; none if the stage before it is not done."""
        tunings = [self.tuning(arm) for arm in self.arms]
        if stage != "seeds":
            columns = zip(*(getattr(tuning, stage) for tuning in tunings), strict=False)
            return [
                [(f"{arm.name}, {job.label}", job)] for row in columns for arm, job in zip(self.arms, row, strict=True)
            ]
        if any(tuning.factor is None for tuning in tunings):
            return []
        return [
            seed_chain(arm, tuning.factor, seed)
            for seed in self.seed_numbers
            for arm, tuning in zip(self.arms, tunings, strict=True)
            if tuning.factor is not None
        ]

    @property
    def seed_numbers(self) -> range:
        """The seeds that are compared."""
        first = self.arms[0].config.train.seed
        return range(first, first + self.seeds)

    def losses(self) -> dict[int, tuple[list[float], list[float]]]:
        """Returns the losses at the ends of the cooldowns, of both arms, for each seed that is complete."""
        found: dict[int, tuple[list[float], list[float]]] = {}
        chains = self.chains("seeds")
        for seed, pair in zip(self.seed_numbers, zip(chains[::2], chains[1::2], strict=True), strict=False):
            both = [[job.val_loss() for _, job in chain[1:]] for chain in pair]
            known = [[loss for loss in losses if loss is not None] for losses in both]
            if all(len(losses) == len(HORIZONS) for losses in known):
                found[seed] = (known[0], known[1])
        return found

    def finished(self) -> bool:
        """Returns whether every cooldown of every seed is finished."""
        return len(self.losses()) == self.seeds

    def remove_unneeded(self) -> None:
        """Deletes the checkpoints that no training of this race needs any more."""
        tuning = [job for arm in self.arms for one in (self.tuning(arm),) for job in (*one.quarter, *one.full)]
        for job in tuning:
            if job.finished():
                _remove(job.out_dir / "checkpoints")
        for chain in self.chains("seeds"):
            (_, trunk), *cooldowns = chain
            left = [job for _, job in cooldowns if job.val_loss() is None]
            for _, job in cooldowns:
                if job not in left:
                    _remove(job.out_dir / "checkpoints")
                    if job.fork is not None and trunk.state() == "finished":
                        _remove(trunk.checkpoint(job.fork[1]))
            if not left:
                _remove(trunk.out_dir / "checkpoints")

    def write_plan(self) -> Path:
        """Writes `plan.json`, the state of every training, and returns its path.

        Raises:
            DiskError: The file cannot be written.
        """
        rows: list[dict[str, Any]] = []
        for stage in STAGES:
            chains = self.chains(stage)
            rows += [self._row(stage, name, job) for chain in chains for name, job in chain]
            if not chains:
                rows.append({"stage": stage, "state": "not planned before the stage before it is done"})
        path = self.out / "plan.json"
        replace_text(path, json.dumps({"trainings": rows}, indent=2, allow_nan=False) + "\n")
        return path

    def _row(self, stage: str, name: str, job: Job) -> dict[str, Any]:
        return {
            "stage": stage,
            "name": name,
            "folder": str(job.out_dir.relative_to(self.out)),
            "iterations": job.config.train.max_iters,
            "learning_rate": job.config.optimizer.learning_rate,
            "seed": job.seed,
            "state": "failed" if job.out_dir in self.failed else job.state(),
            "val_loss": job.val_loss(),
            "failed": self.failed.get(job.out_dir),
        }


def _remove(path: Path) -> None:
    if path.exists():
        delete(path)


def bytes_per_token(config: Config) -> float | None:
    """Returns the bytes of text of a validation token, in the mean; None if the data set does not know its text."""
    try:
        parts = parts_of(open_tokens(config.data.dataset, config.data.data_dir, "val", vocab_size=2**32))
        source = parts[0].source
        return None if len(parts) > 1 else documents.bytes_per_token(source.manifest, source.path, "val")
    except DataError:
        return None
