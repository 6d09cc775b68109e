"""`python -m gptperf.ablate CONFIG.toml --vary key=value[,key2=value2] ... --seeds 3`: compares changes over seeds.

The baseline and every change are trained with every seed, and each run gets the tokens or the FLOPs of the baseline.
Runs are trained one after another, or N at a time with --parallel N, each on one GPU; if there are fewer GPUs than
runs, runs share them. The same command continues an interrupted ablation: it skips finished runs and resumes the
others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from gptperf.ablate import page
from gptperf.ablate.results import results
from gptperf.ablate.tuning import tuned, tuning_runs, without_rate
from gptperf.ablate.variants import Variant, changed_runs, variants
from gptperf.config.flags import COMMAND_LINE, Flags, take
from gptperf.config.keys import Range
from gptperf.errors import PREEMPTED, ConfigError, run_main
from gptperf.experiment.job import Job
from gptperf.experiment.rates import FACTORS, factors_of
from gptperf.experiment.runner import Runner, gpus_for, run_all
from gptperf.files import replace_text
from gptperf.formats import counted
from gptperf.report.page import check_packages

__all__ = ["main"]

_AFTER = """A result is DIR/<variant>/seed<k>; DIR/ablation.md and DIR/ablation.json have the table. With --tune_lr the
learning rate of every variant is found first, with another seed, in DIR/<variant>/tuning.
Exit codes: 0 all compared runs finished, 1 some failed, 75 asked to stop.
"""


@dataclass(frozen=True, kw_only=True)
class _AblateFlags(Flags):
    """What to compare. All other flags are keys of the baseline."""

    vary: tuple[str, ...] = ()
    """A change, key=value, or several that belong together, key=value,key2=value2. Repeat the flag for each change."""
    seeds: Annotated[int, Range(1)] = 3
    """Runs of each variant."""
    tune_lr: bool = False
    """Find the learning rate of every variant first."""
    lr_factors: str | None = None
    """Learning rates to try, as multiples of the variant's own; default: 0.5,1,2."""
    parallel: Annotated[int, Range(1)] = 1
    """Runs at a time."""
    equal: Literal["tokens", "flops"] = "tokens"
    """What every run gets as much of."""
    out: Path = Path("out/ablation")
    """Folder of the runs and the table."""
    html: Path | None = None
    """Write a page with the curves."""
    list: bool = False
    """Print the runs with their tokens, and end."""

    @property
    def factors(self) -> tuple[float, ...]:
        """Multiples of the learning rate that are tried; none without `tune_lr`."""
        return factors_of(FACTORS if self.lr_factors is None else self.lr_factors) if self.tune_lr else ()

    def problems(self) -> Sequence[str]:
        """Returns whether a change is missing, or the learning rates are wrong."""
        wanted = "wanted one or more, such as --vary position_encoding=rope"
        found = [] if self.vary else [f"{COMMAND_LINE}: found no --vary, {wanted}"]
        if self.lr_factors is not None and not self.tune_lr:
            found.append(f"{COMMAND_LINE}: lr_factors: found {self.lr_factors!r} without --tune_lr; nearest: --tune_lr")
        try:
            self.factors  # noqa: B018 - raises an error for a wrong list
        except ConfigError as error:
            found += error.problems
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ablation and reports it.

    Returns:
        0, 1 if a run failed, or `PREEMPTED` after a request to stop.
    """
    taken = take(_AblateFlags, argv, "gptperf.ablate", __doc__.partition("\n\n")[2], _AFTER)
    args = taken.flags
    if taken.problems:
        args = replace(args, lr_factors=None)  # which may be wrong
    found = variants(taken.rest, args.vary, args.seeds, args.equal, args.out, args.factors, taken)
    gpus = gpus_for(min(args.parallel, len(found) * max(args.seeds, len(args.factors))))
    _check_folders(found, rates_are_known=not args.factors)
    if args.list:
        print(page.listing(found))
        return 0
    if len(set(gpus)) < len(gpus) and "" not in gpus:
        print(
            f"ablate: {len(gpus)} runs at a time share {counted(len(set(gpus)), 'GPU')}: each run has lower tokens/s "
            "and MFU than alone, and its plan assumes the whole memory of the GPU"
        )
    if args.html is not None:
        check_packages()
    with Runner(len(gpus) or 1).listening() as runner:
        found, failed = _train(found, args, taken.rest, runner, gpus)
    reached = results(found)
    paths = page.write(reached, args.equal, failed, args.out)
    print(f"\n{page.text(reached, args.equal, failed)}\nreport: {paths[0]}, {paths[1]}")
    if args.html is not None:
        replace_text(args.html, page.html(reached, args.equal, failed))
        print(f"page: {args.html}")
    if runner.asked() and not all(job.finished() for variant in found for job in variant.jobs):
        print("ablate: asked to stop; run the same command again to continue", flush=True)
        return PREEMPTED
    compared = [job.out_dir for variant in found for job in variant.jobs]
    return 1 if without_rate(found) or any(folder in failed for folder in compared) else 0


def _check_folders(found: Sequence[Variant], *, rates_are_known: bool) -> None:
    changed = changed_runs(found, rates_are_known=rates_are_known)
    if changed:
        raise ConfigError("; ".join([*changed, "wanted another --out, or these folders moved away"]))


def _in_turn(found: Sequence[Variant]) -> list[list[tuple[str, Job]]]:
    """Returns the runs with their names: the first run of every variant, then the second, and so on."""
    return [[(f"{v.name}, {v.jobs[i].label}", v.jobs[i])] for i in range(len(found[0].jobs)) for v in found]


def _train(
    found: list[Variant], args: _AblateFlags, rest: Sequence[str], runner: Runner, gpus: Sequence[str]
) -> tuple[list[Variant], dict[Path, str]]:
    """Trains all runs, first those that find the learning rates.

    Returns:
        The variants with the learning rates that were found, and folder -> how the run in it failed.
    """
    tried: dict[Path, str] = {}
    if args.factors:

        def after_try(so_far: dict[Path, str]) -> None:
            page.write(results(found), args.equal, so_far, args.out)

        tried = run_all(_in_turn(tuning_runs(found)), runner, after_try, gpus, "ablate")
        lacking = without_rate(found)
        if lacking and not runner.asked():
            print(f"ablate: no learning rate works for {', '.join(lacking)}; nothing is compared", file=sys.stderr)
        if lacking or runner.asked():
            return found, tried
        found = tuned(found, rest, args.seeds, args.out)
        _check_folders(found, rates_are_known=True)
    compared = found

    def after(so_far: dict[Path, str]) -> None:
        page.write(results(compared), args.equal, tried | so_far, args.out)

    return found, tried | run_all(_in_turn(found), runner, after, gpus, "ablate")


if __name__ == "__main__":
    run_main(main)
