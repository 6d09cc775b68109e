"""`python -m gptperf.race A.toml B.toml --seeds 5`: the tokens and the time that two arms need to equal losses.

With one configuration and `--vary key=value`, the arms are the configuration and its change. For each arm, learning
rates are tried at a quarter of the length, and the best one and its neighbours over all of it, with a seed that is not
compared. Then each seed trains a trunk at a constant rate, and cooldowns of it that end at 1/4, 1/2 and 1 of the
length. `python -m gptperf.race RUN@STEP --vary key=value,value2` tries changes from a checkpoint instead, in pairs of
forks, and stops when they are decided; RUN@0 tries them from the start, in short runs.
The same command continues: in parts, and on another card with a copy of DIR.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gptperf.config import KEYS
from gptperf.config.flags import COMMAND_LINE, Flags, split, take
from gptperf.config.keys import Range
from gptperf.errors import PREEMPTED, ConfigError, run_main
from gptperf.experiment.job import held_by_others
from gptperf.experiment.rates import factors_of
from gptperf.experiment.runner import Runner, gpus_for, run_all
from gptperf.files import replace_text
from gptperf.race import fork_page, page
from gptperf.race.arms import arms_of
from gptperf.race.fork import Forks, forks_of
from gptperf.race.outcome import outcome_of
from gptperf.race.state import STAGES, Race
from gptperf.report.page import check_packages

__all__ = ["main"]

_AFTER = """DIR/race.json has the result, DIR/plan.json the state of every training. Checkpoints are deleted when no
training of the race needs them any more, unless --keep_models is given.
Exit codes: 0 all trainings are finished, 1 some failed, the verdict is void or a change is undecided (the report says
why), 75 stopped with more to do.
"""
_FACTORS = "0.25,0.5,1,2,4"
_SEEDS, _PAIRS = 5, 12
_MEASURE = "from gptperf.errors import run_main; from gptperf.race.speed import measure; run_main(measure)"
_FORK = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True, kw_only=True)
class _RaceFlags(Flags):
    """What to compare. All other flags are keys of both arms."""

    vary: tuple[str, ...] = ()
    """The change that is the second arm; after RUN@STEP, changes with all their values."""
    seeds: Annotated[int, Range(1)] | None = None
    """Seeds of each arm, default 5; after RUN@STEP the most pairs, default 12."""
    lr_factors: str = _FACTORS
    """Learning rates to try, as multiples of the arm's own."""
    tolerance: Annotated[float, Range(0)] = 0.01
    """After RUN@STEP: differences up to this, in nats per token, count as none."""
    parallel: Annotated[int, Range(1)] = 1
    """Trainings at a time, each on one GPU."""
    minutes: Annotated[float, Range(0, exclude_low=True)] | None = None
    """Stop after so many minutes; the same command continues."""
    price: Annotated[float, Range(0)] | None = None
    """Dollars of a GPU hour."""
    keep_models: bool = False
    """Keep all checkpoints."""
    out: Path = Path("out/race")
    """Folder of the trainings and the result."""
    html: Path | None = None
    """Write a page with curves, envelopes and ratios."""
    list: bool = False
    """Print the trainings with their state, and end."""

    @property
    def factors(self) -> tuple[float, ...]:
        """Multiples of the learning rate that are tried."""
        return factors_of(self.lr_factors, _FACTORS)

    def problems(self) -> Sequence[str]:
        """Returns whether the learning rates are wrong."""
        try:
            few = len(self.factors) < 3
        except ConfigError as error:
            return error.problems
        wanted = f"wanted 3 or more, because the best one must not be at the edge; nearest: --lr_factors={_FACTORS}"
        return [f"{COMMAND_LINE}: lr_factors: found {self.lr_factors!r}, {wanted}"] if few else []


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a race or forks, and reports them.

    Returns:
        0, 1 without a verdict, or `PREEMPTED` if there is more to do.
    """
    taken = take(_RaceFlags, argv, "gptperf.race", __doc__.partition("\n\n")[2], _AFTER)
    args = taken.flags
    _, words, _ = split(taken.rest, KEYS)
    fork = next((found for word in words if (found := _FORK.fullmatch(word))), None)
    race: Race | None = None
    forks: Forks | None = None
    if fork is not None:
        rest = [word for word in taken.rest if word != fork[0]]
        pairs = args.seeds or _PAIRS
        forks = forks_of(Path(fork[1]), int(fork[2]), rest, args.vary, pairs, args.tolerance, args.out, taken)
    else:
        race = Race(arms_of(taken.rest, args.vary, args.out, taken), args.factors, args.seeds or _SEEDS, args.out)
    if args.html is not None:
        check_packages()
    return _race(race, args) if race is not None else _fork(forks, args) if forks is not None else 1


def _race(race: Race, args: _RaceFlags) -> int:
    jobs = [job for stage in STAGES for chain in race.chains(stage) for _, job in chain]
    _check_folders(held_by_others(jobs))
    if args.list:
        print(page.listing(race))
        return 0
    gpus = gpus_for(args.parallel)

    def after(failed: dict[Path, str]) -> None:
        race.failed |= failed
        race.write_plan()
        if not args.keep_models:
            race.remove_unneeded()

    with Runner(len(gpus) or 1).listening(args.minutes) as runner:
        _measure_speed(race, runner, gpus)
        for stage in STAGES:
            chains = race.chains(stage)
            _check_folders(held_by_others(job for chain in chains for _, job in chain))
            if runner.asked() or race.problems() or not chains:
                break
            after(run_all(chains, runner, after, gpus, "race"))
    after({})
    found = outcome_of(race, args.price)
    page.write(found)
    print(f"\n{page.text(found)}\nreport: {race.out / 'race.json'}, {race.out / 'plan.json'}")
    _write_page(args.html, lambda: page.html(found))
    if race.problems():
        return 1
    return _ended(race.finished(), runner)


def _measure_speed(race: Race, runner: Runner, gpus: Sequence[str]) -> None:
    """Times both arms in turns in a process of its own, unless that was done before."""
    path = race.out / "speed.json"
    if path.exists() or runner.asked():
        return
    print(f"race: the steps of both arms in turns -> {path}", flush=True)
    arms = [json.dumps([*arm.argv, f"--max_iters={arm.length}"]) for arm in race.arms]
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _MEASURE, str(path), *arms]
    code = runner.run(command, gpus[0] if gpus else None)
    if code and not runner.asked():
        print(f"race: the speed was not measured: exit code {code}", file=sys.stderr)


def _fork(forks: Forks, args: _RaceFlags) -> int:
    jobs = [forks.job(arm, pair) for arm in forks.arms for pair in range(forks.pairs)]
    _check_folders(held_by_others(jobs))
    if args.list:
        print("\n".join(f"{job.out_dir}  {job.state()}" for job in jobs))
        return 0
    gpus = gpus_for(min(args.parallel, len(forks.arms)))

    def after(failed: dict[Path, str]) -> None:
        forks.failed |= failed
        fork_page.write(forks)
        if not args.keep_models:
            forks.remove_unneeded()

    with Runner(len(gpus) or 1).listening(args.minutes) as runner:
        while (chains := forks.next_pair()) and not runner.asked():
            after(run_all(chains, runner, after, gpus, "race"))
            control = chains[0][0][1]
            if control.out_dir in forks.failed:
                print(f"race: the run as it is fails: {forks.failed[control.out_dir]}", file=sys.stderr)
            if forks.next_pair() == chains:  # nothing was gained, so nothing will be
                break
    after({})
    print(f"\n{fork_page.text(forks)}\nreport: {forks.out / 'race.json'}")
    _write_page(args.html, lambda: fork_page.html(forks))
    undecided = any(forks.decision(arm).verdict == "undecided" for arm in forks.arms[1:])
    return _ended(not undecided, runner)


def _check_folders(changed: Sequence[str]) -> None:
    if changed:
        raise ConfigError("; ".join([*changed, "wanted another --out, or these folders moved away"]))


def _write_page(path: Path | None, made: Callable[[], str]) -> None:
    if path is not None:
        replace_text(path, made())
        print(f"page: {path}")


def _ended(done: bool, runner: Runner) -> int:
    if not done and runner.asked():
        print("race: stopped with more to do; run the same command again to continue", flush=True)
        return PREEMPTED
    return 0 if done else 1


if __name__ == "__main__":
    run_main(main)
