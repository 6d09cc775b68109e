"""Changes that are tried from a checkpoint or the start of a run, in pairs, until they are decided. Loads no torch.

A pair has a seed of its own, and every arm of it reads the same data in the same order with the same dropout: the run
as it is, and each change. A fork ends with a cooldown, because a loss at a high learning rate says little about the
loss after it. The differences of the pairs are independent given the checkpoint, as their seeds are; nothing is assumed
about how the losses of one fork follow one another, because each fork counts as one block. What is estimated is the
mean difference, over data orders, at the end of forks of this length from this checkpoint.

A fork inherits moments, the norms of the weights and an early phase that went well, which another learning rate or
optimizer would not have in a whole run. From iteration 0 a pair is two short runs from an initialization of its own.
Their differences include the early phase and vary more, and they end before a change that gains late has gained.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptperf.config import KEYS, Config, command_line
from gptperf.config.flags import Taken, split
from gptperf.errors import ConfigError, mistakes
from gptperf.experiment.changes import change_text, folder_name, new_problems, parse_changes
from gptperf.experiment.job import Job, differing_keys
from gptperf.experiment.significance import LEVEL
from gptperf.files import delete
from gptperf.monitor.run_log import find_log
from gptperf.monitor.runs import read_run
from gptperf.race.arms import SET_HERE, Chain, flags_text
from gptperf.race.sequence import Bounds, bounds

__all__ = ["Decision", "ForkArm", "Forks", "alternatives", "forks_of"]

_COOLDOWN = 0.6
"""Share of a fork that is its cooldown: a fifth of the whole, if the fork is half as long as the run before it."""
_OF_THE_RUN = (*SET_HERE, "seed", "max_iters", "plugins", "debug", "profile", "console", "warmup_iters")
_RACE_COOLDOWN = 0.2
"""Share of a pair from iteration 0 that is its cooldown, as in a race."""
_RACE_PART = 4
"""A pair from iteration 0 is this much shorter than the run: it ends where the shortest runs of a race end."""
CONTROL = "as it is"
NOTHING_FOUND = "no difference found"


@dataclass(frozen=True)
class ForkArm:
    """The run as it is, or with a change."""

    name: str
    argv: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Decision:
    """What is known about a change."""

    differences: tuple[float, ...]
    """Final validation loss minus the loss of the unchanged run, one value for each pair, in nats per token."""
    bounds: Bounds
    verdict: str
    """better, worse, the same, no difference found (after the last pair), or undecided."""


@dataclass
class Forks:
    """Pairs of forks from one checkpoint."""

    run: Path
    step: int
    end: int
    """Iteration at which every fork ends."""
    arms: tuple[ForkArm, ...]
    """The run as it is, then the changes."""
    pairs: int
    """Most pairs."""
    tolerance: float
    """Differences up to this one count as none."""
    out: Path
    failed: dict[Path, str] = field(default_factory=dict)
    """Folder -> how the fork in it failed."""

    def job(self, arm: ForkArm, pair: int) -> Job:
        """Returns the fork of an arm in a pair, counted from 0."""
        seed = arm.config.train.seed + 1 + pair
        folder = self.out / folder_name({"arm": arm.name}).removeprefix("arm=") / f"pair{pair + 1}"
        keys: dict[str, Any] = {
            "seed": seed,
            "max_iters": self.end,
            "lr_schedule": "wsd",
            "lr_decay_iters": "none",
            "wsd_decay_fraction": f"{_cooldown(self.step, self.end):.6f}",
            "eval_interval": self.end,
            "save_interval": self.end,
            "keep_checkpoints": 1,
            "sample_tokens": 0,
        }
        argv = (*arm.argv, *(f"--{key}={value}" for key, value in keys.items()), "--overwrite=False")
        argv = (*argv, f"--out_dir={folder}")
        fork = (self.run, self.step) if self.step else None
        return Job(seed, folder, argv, _config(argv), f"pair {pair + 1}", fork=fork)

    def decision(self, arm: ForkArm) -> Decision:
        """Returns what is known about a change, from the pairs that are complete up to the first one that is not."""
        differences: list[float] = []
        for pair in range(self.pairs):
            control, changed = (self.job(one, pair) for one in (self.arms[0], arm))
            losses = control.val_loss(), changed.val_loss()
            if changed.out_dir in self.failed:
                found = bounds(differences, self.level)
                return Decision(tuple(differences), found, f"worse: {self.failed[changed.out_dir]}")
            if losses[0] is None or losses[1] is None:
                break
            differences.append(losses[1] - losses[0])
        found = bounds(differences, self.level)
        verdict = "undecided"
        if found.low >= -self.tolerance and found.high <= self.tolerance:
            verdict = "the same"
        elif found.high < 0:
            verdict = "better"
        elif found.low > 0:
            verdict = "worse"
        elif len(differences) == self.pairs:
            verdict = NOTHING_FOUND
        return Decision(tuple(differences), found, verdict)

    @property
    def inherited(self) -> list[str]:
        """Returns the names of the changes of the optimizer whose forks begin with what the unchanged run has done."""
        if not self.step:
            return []
        before = self.arms[0].config.flat()
        return [arm.name for arm in self.arms[1:] if any(map(_of_optimizer, differing_keys(before, arm.config)))]

    @property
    def level(self) -> float:
        """Chance that a true difference ever leaves its interval, shared by all changes."""
        return LEVEL / (len(self.arms) - 1)

    def next_pair(self) -> list[Chain]:
        """Returns the forks of the first pair that is not complete, without decided changes; none at the end."""
        open_arms = [arm for arm in self.arms[1:] if self.decision(arm).verdict == "undecided"]
        done = [len(self.decision(arm).differences) for arm in open_arms]
        if not open_arms or min(done) >= self.pairs:
            return []
        jobs = [(arm, self.job(arm, min(done))) for arm in (self.arms[0], *open_arms)]
        return [[(f"{arm.name}, {job.label}", job)] for arm, job in jobs]

    def remove_unneeded(self) -> None:
        """Deletes the checkpoints of forks that are finished."""
        for arm in self.arms:
            for pair in range(self.pairs):
                job = self.job(arm, pair)
                if (job.out_dir / "checkpoints").exists() and job.finished():
                    delete(job.out_dir / "checkpoints")

    @property
    def tokens(self) -> int:
        """Tokens of all forks that are finished."""
        jobs = [self.job(arm, pair) for arm in self.arms for pair in range(self.pairs)]
        return sum((self.end - self.step) * job.config.tokens_per_iter for job in jobs if job.finished())


def _cooldown(step: int, end: int) -> float:
    """Returns the share of the iterations up to `end` that is the cooldown of a fork."""
    return _COOLDOWN * (end - step) / end if step else _RACE_COOLDOWN


def _of_optimizer(key: str) -> bool:
    return KEYS[key].section == "optimizer"


@functools.cache
def _config(argv: tuple[str, ...]) -> Config:
    return command_line.resolve(argv).config


def alternatives(vary: Sequence[str]) -> list[str]:
    """Returns one change for each value: `learning_rate=1e-3,2e-3` is two, and so is `a=1,learning_rate=1e-3,2e-3`."""
    changes = []
    for text in vary:
        *head, last = _keys(text)
        key, equals, values = last.partition("=")
        changes += [",".join([*head, f"{key}{equals}{value}"]) for value in values.split(",")]
    return changes


def _keys(text: str) -> list[str]:
    """Splits `key=value,value2,key2=value3` before every key."""
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    return parts


def forks_of(
    run: Path,
    step: int,
    words: Sequence[str],
    vary: Sequence[str],
    pairs: int,
    tolerance: float,
    out: Path,
    taken: Taken[Any] | None = None,
) -> Forks:
    """Resolves the run as it is and every change.

    Args:
        run: Folder of a run.
        step: Iteration of one of its checkpoints, or 0 for its start.
        words: Flags for all forks, `--key=value ...`.
        vary: Changes, each `key=value[,value2 ...]`.
        pairs: Most pairs.
        tolerance: Differences up to this one count as none.
        out: Folder of the forks.
        taken: The command's own flags, whose mistakes are reported with those of the forks.

    Raises:
        ConfigError: A change is wrong, or the checkpoint is not one to fork from.
        DataError: The run has no log.
    """
    logged = read_run(find_log(run), run.name)
    given, others, problems = split(words, KEYS)
    problems += [f"command line: found {word!r}, wanted flags after {run}@{step}" for word in others]
    own = (*SET_HERE, "seed", "warmup_iters")
    problems += [f"command line: {one.name} is set by the race" for one in given if one.name in own]
    problems += [] if vary else ["command line: found no --vary, wanted one, such as learning_rate=1e-3,2e-3"]
    argv = (*_flags_of(logged.config), *flags_text(given))
    length = max(2, step // 2) if step else (logged.config.get("max_iters") or 0) // _RACE_PART
    end, arms, of_run = step + length, list[ForkArm](), list[str]()
    try:
        arms.append(ForkArm(CONTROL, argv, command_line.resolve(argv, taken=taken).config))
        end = arms[0].config.train.max_iters if any(one.name == "max_iters" for one in given) else end
    except ConfigError as error:
        of_run += error.problems
    problems += (_problems_of_checkpoint if step else _problems_of_start)(logged.config, run, step, end)
    changes, wrong = parse_changes(alternatives(vary), (*own, "max_iters"), "the race")
    problems += of_run + wrong
    for change in changes:
        problems += _add_arm(arms, argv, change, of_run, taken)
    if problems:
        raise mistakes(problems)
    return Forks(run, step, end, tuple(arms), pairs, tolerance, out)


def _add_arm(
    arms: list[ForkArm],
    argv: tuple[str, ...],
    change: dict[str, str],
    of_run: Sequence[str],
    taken: Taken[Any] | None,
) -> list[str]:
    """Appends the arm of a change, and returns what is wrong with it but not with the run as it is."""
    name, flags = change_text(change), tuple(f"--{key}={value}" for key, value in change.items())
    try:
        changed = command_line.resolve((*argv, *flags), taken=taken).config
    except ConfigError as error:
        return new_problems(error, change, of_run)
    same = next((arm.name for arm in arms if not differing_keys(arm.config.flat(), changed)), None)
    arms.append(ForkArm(name, (*argv, *flags), changed))
    if same is not None:
        return [f"--vary {name}: the same configuration as {same}"]
    if changed.tokens_per_iter != arms[0].config.tokens_per_iter:
        return [f"--vary {name}: found another number of tokens per iteration, wanted the same data"]
    return []


def _flags_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the flags that give a logged configuration."""
    kept = {key: value for key, value in values.items() if key in KEYS and key not in _OF_THE_RUN}
    kept |= {key: values[key] for key in ("seed", "warmup_iters") if key in values}
    return tuple(f"--{key}={'none' if value is None else value}" for key, value in kept.items() if value != "")


def _problems_of_start(values: Mapping[str, Any], run: Path, step: int, end: int) -> list[str]:
    """Returns whether pairs from iteration 0 end before the learning rate has reached its peak."""
    warmup = values.get("warmup_iters") or 0
    least = max(2, math.ceil(warmup / (1 - _RACE_COOLDOWN)))
    if end >= least:
        return []
    return [
        f"max_iters: found {end}, wanted {least} or more: {run}@{step} has a warm-up of {warmup} iterations, and "
        f"the last {_RACE_COOLDOWN:.0%} are a cooldown; nearest: {least}"
    ]


def _problems_of_checkpoint(values: Mapping[str, Any], run: Path, step: int, end: int) -> list[str]:
    """Returns whether a checkpoint is missing, or its learning rate is not the peak."""
    problems = []
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        near = f"; nearest: {run}@{min(steps, key=lambda one: abs(one - step))}" if steps else ""
        problems.append(f"{run}: found no checkpoint of iteration {step}, wanted one of {there}{near}")
    schedule, warmup = values.get("lr_schedule"), values.get("warmup_iters") or 0
    last = values.get("lr_decay_iters") or values.get("max_iters") or step
    start = last if schedule == "constant" else round(last * (1 - (values.get("wsd_decay_fraction") or 0)))
    if schedule not in ("constant", "wsd") or not warmup <= step <= start:
        problems.append(
            f"{run}@{step}: found lr_schedule = {schedule}, where the rate of iteration {step} is not the peak; wanted "
            "a checkpoint of a run with lr_schedule = wsd or constant, after its warm-up and before its decay"
        )
    if end <= step + 1:
        problems.append(
            f"max_iters: found {end}, wanted more than {step + 1}: forks begin at {step}; nearest: {step + step // 2}"
        )
    return problems
