"""The two arms of a race and their trainings. This module does not import torch.

An arm is a configuration at one length, `max_iters` = H. For a seed it trains a trunk of 0.8 H iterations at a constant
learning rate. For h = H/4, H/2 and H, a cooldown forks from the trunk after 0.8 h iterations and ends at h, as the
schedule wsd does in the last fifth of a run. So each end equals the end of a whole run of h iterations, and the trunk
is trained only once.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptperf.config import KEYS, Config, command_line
from gptperf.config.flags import Given, Taken, split
from gptperf.errors import ConfigError, mistakes
from gptperf.experiment.changes import folder_name, new_problems, parse_changes, with_length
from gptperf.experiment.job import Job
from gptperf.experiment.rates import TUNING_SEED, scaled_rates
from gptperf.formats import counted

__all__ = [
    "HORIZONS",
    "MULTIPLE",
    "SET_HERE",
    "Arm",
    "Chain",
    "arms_of",
    "flags_text",
    "full_runs",
    "quarter_runs",
    "seed_chain",
]

HORIZONS = (4, 2, 1)
"""A cooldown ends at H divided by each of these."""
MULTIPLE = 20
"""H is a multiple of this, so that every trunk and every cooldown has whole iterations."""
COOLDOWN = 0.2
_SCHEDULE = ("lr_schedule", "lr_decay_iters", "wsd_decay_fraction")
SET_HERE = ("out_dir", "init_from", "overwrite", *_SCHEDULE, "eval_interval", "save_interval", "keep_checkpoints")
"""Keys that a race sets; no flag and no change may name them."""
_KEPT = 1000

Chain = list[tuple[str, Job]]
"""Trainings with their names, one after another."""


@dataclass(frozen=True)
class Arm:
    """A configuration that takes part in a race."""

    name: str
    argv: tuple[str, ...]
    """Arguments of the configuration."""
    config: Config
    """The configuration, of the length H."""
    out: Path
    """Folder of all trainings of the arm."""

    @property
    def length(self) -> int:
        """H, iterations of the longest run."""
        return self.config.train.max_iters

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens at the end of each cooldown, rising."""
        return tuple(self.length // part * self.config.tokens_per_iter for part in HORIZONS)


def arms_of(words: Sequence[str], vary: Sequence[str], out: Path, taken: Taken[Any] | None = None) -> tuple[Arm, Arm]:
    """Resolves both arms.

    Args:
        words: `A.toml B.toml [--key=value ...]`, or one configuration and a change; the flags are for both.
        vary: At most one change of the configuration, `key=value[,key2=value2 ...]`.
        out: Folder of the race.
        taken: The command's own flags, whose mistakes are reported with those of the arms.

    Raises:
        ConfigError: An arm is wrong; the message has a line for each mistake.
    """
    given, files, problems = split(words, KEYS)
    problems += [f"command line: {one.name} is set by the race" for one in given if one.name in SET_HERE]
    flags, of_base = flags_text(given), list[str]()
    try:
        command_line.resolve([*files[:1], *flags], taken=taken)
    except ConfigError as error:
        of_base += error.problems
    changes, wrong = parse_changes(vary, (*SET_HERE, "seed", "max_iters"), "the race")
    problems += of_base + wrong
    if (len(files), len(vary)) not in ((2, 0), (1, 1)):
        problems.append(
            f"command line: found {counted(len(files), 'configuration')} and {counted(len(vary), 'change')}, wanted "
            "two configurations, such as gpt2_124m llama_124m, or one and a --vary, such as "
            "gpt2_124m --vary optimizer=muon"
        )
        raise mistakes(problems)
    if vary:
        chosen = [(files[0], "baseline", {}), *((files[0], folder_name(change), change) for change in changes)]
    else:
        names = [Path(file).stem for file in files]
        names = names if names[0] != names[1] else [f"{names[0]}-1", f"{names[1]}-2"]
        chosen = [(file, name, {}) for file, name in zip(files, names, strict=True)]
    found: list[Arm] = []
    for file, name, change in chosen:
        argv = (file, *flags, *(f"--{key}={value}" for key, value in change.items()))
        try:
            found.append(Arm(name, argv, command_line.resolve(argv, taken=taken).config, out / name))
        except ConfigError as error:
            if change:
                problems += new_problems(error, change, of_base)
            else:
                problems += [line for line in error.problems if line not in problems]
    if problems:
        raise mistakes(problems)
    first, second = _of_equal_tokens(found)
    _check(first, second)
    return first, second


def flags_text(given: Sequence[Given]) -> list[str]:
    """Returns flags as words of a command line."""
    return [f"--{one.name}={one.value}" for one in given]


def _of_equal_tokens(found: Sequence[Arm]) -> tuple[Arm, Arm]:
    """Gives the second arm as many tokens as the first one, to the nearest valid length."""
    first, second = found
    ratio = first.config.tokens_per_iter / second.config.tokens_per_iter
    length = max(MULTIPLE, round(first.length * ratio / MULTIPLE) * MULTIPLE) if ratio != 1 else first.length
    return first, replace(second, config=with_length(second.config, length, ratio))


def _check(first: Arm, second: Arm) -> None:
    """Checks that the arms can be compared.

    Raises:
        ConfigError: They cannot; the message has a line for each reason.
    """
    problems = []
    if first.length % MULTIPLE:
        near = max(MULTIPLE, round(first.length / MULTIPLE) * MULTIPLE)
        problems.append(f"max_iters: found {first.length}, wanted a multiple of {MULTIPLE}; nearest: {near}")
    for arm in (first, second):
        warmup, most = arm.config.optimizer.warmup_iters, arm.length // 10
        if warmup > most:
            problems.append(
                f"{arm.name}: warmup_iters: found {warmup}, wanted at most a tenth of its {arm.length:,} iterations: "
                f"the first cooldown begins at {arm.length // 5}; nearest: {most}"
            )
    for key, a, b in (
        ("dataset", first.config.data.dataset, second.config.data.dataset),
        ("validation tokens (batch_size x eval_iters x block_size)", *map(_validation, (first, second))),
        ("seed", first.config.train.seed, second.config.train.seed),
    ):
        if a != b:
            problems.append(f"{key}: found {a} in {first.name} and {b} in {second.name}, wanted the same in both")
    if first.config.flat() | {"max_iters": 0} == second.config.flat() | {"max_iters": 0}:
        problems.append(f"{second.name}: the same configuration as {first.name}")
    if problems:
        raise mistakes(problems)


def _validation(arm: Arm) -> int:
    config = arm.config
    return config.train.batch_size * config.train.eval_iters * config.model.block_size


def _job(arm: Arm, folder: Path, iters: int, label: str, keys: Mapping[str, Any], **more: Any) -> Job:
    """Returns a training of an arm: its flags are those of the arm, then the ones that the race sets."""
    every: dict[str, Any] = {
        "max_iters": iters,
        "warmup_iters": arm.config.optimizer.warmup_iters,
        "lr_decay_iters": "none",
        "lr_schedule": "wsd",
        "wsd_decay_fraction": COOLDOWN,
        "eval_interval": iters,
        "save_interval": max(iters // 4, 1),
        "keep_checkpoints": 1,
        "sample_tokens": 0,
        **keys,
    }
    flags = (*arm.argv, *(f"--{key}={value}" for key, value in every.items()), "--overwrite=False")
    argv = (*flags, f"--out_dir={folder}")
    return Job(int(every["seed"]), folder, argv, _config(argv), label, **more)


@functools.cache
def _config(argv: tuple[str, ...]) -> Config:
    return command_line.resolve(argv).config


def _tuning_run(arm: Arm, stage: str, iters: int, factor: float) -> Job:
    rates = scaled_rates(arm.config, factor)
    rate = f"{rates['learning_rate']:g}"
    keys = rates | {"seed": arm.config.train.seed + TUNING_SEED}
    return _job(arm, arm.out / stage / f"lr{rate}", iters, f"{stage}, learning rate {rate}", keys)


def quarter_runs(arm: Arm, factors: Sequence[float]) -> list[Job]:
    """Returns the runs that try learning rates at a quarter of the horizon, with a seed that is not compared."""
    return [_tuning_run(arm, "quarter", arm.length // HORIZONS[0], factor) for factor in factors]


def full_runs(arm: Arm, factors: Sequence[float]) -> list[Job]:
    """Returns the runs that try learning rates over the whole horizon, with the same seed."""
    return [_tuning_run(arm, "full", arm.length, factor) for factor in factors]


def seed_chain(arm: Arm, factor: float, seed: int) -> Chain:
    """Returns the trainings of a seed: the trunk, then the cooldowns, which begin at checkpoints of the trunk.

    The trunk is not finished before it has the checkpoint of every cooldown that is not finished.
    """
    keys = scaled_rates(arm.config, factor) | {"seed": seed}
    folder = arm.out / f"seed{seed}"
    ends = [arm.length // part for part in HORIZONS]
    trunk_iters = 4 * ends[-1] // 5
    cooldowns = []
    for end in ends:
        fork, label = (folder / "trunk", 4 * end // 5), f"seed {seed}, cooldown at {end}"
        cooldowns.append(_job(arm, folder / f"cooldown{end}", end, label, keys, fork=fork))
    needed = tuple(job.fork[1] for job in cooldowns if job.fork is not None and not job.finished())
    trunk_keys = keys | {
        "lr_schedule": "constant",
        "eval_interval": max(arm.length // 20, 1),
        "save_interval": ends[0] * 4 // 5,
        "keep_checkpoints": _KEPT,
    }
    label = f"seed {seed}, trunk"
    trunk = _job(arm, folder / "trunk", trunk_iters, label, trunk_keys, keeps=needed)
    return [(f"{arm.name}, {job.label}", job) for job in (trunk, *cooldowns)]
