"""The runs of an ablation: variants at equal tokens or FLOPs, each with several seeds. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.config.flags import Taken
from gptperf.errors import ConfigError, mistakes
from gptperf.experiment.changes import LENGTHS, change_text, folder_name, new_problems, parse_changes, with_length
from gptperf.experiment.job import LEARNING_RATES, Job, differing_keys, flag_keys, held_by_others
from gptperf.experiment.rates import TUNING_SEED, scaled_rates

__all__ = ["BASELINE", "Variant", "changed_runs", "variants", "with_jobs"]

BASELINE = "baseline"
_SET_HERE = ("seed", "out_dir", "init_from", "overwrite", "max_iters")
"""Keys that the ablation sets; no change may name them."""


@dataclass(frozen=True)
class Variant:
    """The baseline, or the baseline with changes."""

    name: str
    changes: dict[str, str]
    config: Config
    """Configuration of the run with the first seed."""
    jobs: tuple[Job, ...] = ()
    """The runs that are compared."""
    tuning: tuple[Job, ...] = ()
    """The runs that find the learning rate; empty if it is not tuned."""

    @property
    def tokens(self) -> int:
        """Tokens that each run of this variant trains on."""
        return self.config.train.max_iters * self.config.tokens_per_iter

    @property
    def flops_per_token(self) -> float | None:
        """Strict training FLOPs per token; None if the matmuls of a plugin's component are unknown."""
        model = self.config.model
        if flops.uncountable_flops(model) is not None:
            return None
        return float(flops.flops_per_token(model).training_per_token)

    @property
    def parameters(self) -> int | None:
        """Number of parameters; None if those of a plugin's component are unknown."""
        model = self.config.model
        return None if flops.uncountable_parameters(model) else flops.parameters(model).total


def variants(
    argv: Sequence[str],
    vary: Sequence[str],
    seeds: int,
    equal: str,
    out: Path,
    factors: Sequence[float] = (),
    taken: Taken[Any] | None = None,
) -> list[Variant]:
    """Resolves the baseline and every change, with a run for each seed.

    Args:
        argv: Arguments of the baseline, `[CONFIG.toml ...] [--key=value ...]`.
        vary: Changes, each `key=value[,key2=value2 ...]`.
        seeds: Number of runs per variant. The first has the seed of the configuration, the others the numbers after it.
        equal: "tokens" or "flops": every run gets as many as the baseline.
        out: Folder of all runs.
        factors: Learning rates to try for each variant, as multiples of its own; none: it is not tuned.
        taken: The command's own flags, whose mistakes are reported with those of the variants.

    Raises:
        ConfigError: A variant is wrong; the message lists everything that is wrong with any of them.
    """
    given = flag_keys(argv)
    problems = [f"command line: {key} is set by the ablation" for key in _SET_HERE[1:4] if key in given]
    found: list[Variant] = []
    of_baseline: Sequence[str] = ()
    try:
        found.append(Variant(BASELINE, {}, _resolve(argv, {}, out / BASELINE, taken)))
    except ConfigError as error:
        of_baseline = error.problems
    changes, wrong = parse_changes(vary, (*_SET_HERE, *(LEARNING_RATES if factors else ())), "the ablation")
    problems += [*of_baseline, *wrong]
    for change in changes:
        name = folder_name(change)
        try:
            config = _resolve(argv, change, out / name, taken)
        except ConfigError as error:
            problems += new_problems(error, change, of_baseline)
            continue
        same = next((v for v in found if _same(v.config, config)), None)
        if same is not None:
            problems.append(f"--vary {change_text(change)}: the same configuration as {same.name}")
        else:
            found.append(Variant(name, change, config))
    if problems:
        raise mistakes(problems)
    scaled = [_scaled(variant, found[0], equal) for variant in found]
    return [with_jobs(_with_tuning(variant, argv, out, factors), argv, seeds, out) for variant in scaled]


def _flags(change: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in change.items()]


def _argv(argv: Sequence[str], change: dict[str, Any], folder: Path) -> list[str]:
    return [*argv, *_flags(change), "--overwrite=False", f"--out_dir={folder}"]


def _resolve(argv: Sequence[str], change: dict[str, Any], folder: Path, taken: Taken[Any] | None) -> Config:
    return command_line.resolve(_argv(argv, change, folder), taken=taken).config


def _same(a: Config, b: Config) -> bool:
    return not differing_keys(a.flat(), b)


def _scaled(variant: Variant, baseline: Variant, equal: str) -> Variant:
    """Gives a variant as many tokens or FLOPs as the baseline, and scales the lengths of its schedule to match.

    Raises:
        ConfigError: The FLOPs cannot be counted.
    """
    ratio = baseline.config.tokens_per_iter / variant.config.tokens_per_iter
    if equal == "flops":
        counts = [v.flops_per_token for v in (baseline, variant)]
        if counts[0] is None or counts[1] is None:
            raise ConfigError(f"{variant.name}: the FLOPs of a plugin's component are not known; wanted --equal tokens")
        ratio *= counts[0] / counts[1]
    before = variant.config
    iters = max(1, round(ratio * baseline.config.train.max_iters))
    config = with_length(before, iters, ratio, keep=variant.changes)
    return replace(variant, config=config)


def with_jobs(variant: Variant, argv: Sequence[str], seeds: int, out: Path, best: Job | None = None) -> Variant:
    """Returns a variant with its runs, one for each seed; with `best`, at the learning rate of that run."""
    rates = {} if best is None else scaled_rates(best.config, 1)
    first = variant.config.train.seed
    jobs = [
        _job(variant, argv, out / variant.name / f"seed{seed}", seed, rates, f"seed {seed}")
        for seed in range(first, first + seeds)
    ]
    return replace(variant, jobs=tuple(jobs), config=jobs[0].config)


def _with_tuning(variant: Variant, argv: Sequence[str], out: Path, factors: Sequence[float]) -> Variant:
    """Returns a variant with the runs that find its learning rate, all with a seed that the comparison does not use."""
    seed = variant.config.train.seed + TUNING_SEED
    jobs = []
    for factor in factors:
        rates = scaled_rates(variant.config, factor)
        rate = rates["learning_rate"]
        folder = out / variant.name / "tuning" / f"lr{rate:g}"
        jobs.append(_job(variant, argv, folder, seed, rates, f"learning rate {rate:g}"))
    return replace(variant, tuning=tuple(jobs))


def _job(variant: Variant, argv: Sequence[str], folder: Path, seed: int, rates: dict[str, float], label: str) -> Job:
    lengths = {"max_iters": variant.config.train.max_iters}
    lengths |= {key: value for key in LENGTHS if (value := getattr(variant.config.optimizer, key)) is not None}
    flags = _argv(argv, {**variant.changes, **lengths, **rates, "seed": seed}, folder)
    return Job(seed, folder, tuple(flags), command_line.resolve(flags).config, label)


def changed_runs(found: Sequence[Variant], *, rates_are_known: bool = True) -> list[str]:
    """Returns a line for each folder that holds a run of another configuration.

    Args:
        found: The variants.
        rates_are_known: Whether the runs that are compared have their final learning rate.
    """
    jobs = [job for variant in found for job in (*variant.tuning, *variant.jobs)]
    return held_by_others(jobs, {} if rates_are_known else {"seed": LEARNING_RATES})
