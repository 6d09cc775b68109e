"""What a race has found so far: ratios of tokens and time at equal loss, costs, and a verdict. Loads no torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptperf.formats import counted
from gptperf.race.envelope import FEWEST_SEEDS, Distance, Interval, distances, product, t_interval
from gptperf.race.state import Race, bytes_per_token

__all__ = ["Cost", "Outcome", "Speed", "interval_text", "outcome_of", "read_speed"]


@dataclass(frozen=True)
class Speed:
    """What the steps of both arms take, measured in turns on one card."""

    device: str
    seconds_per_token: tuple[float, float]
    joules_per_token: tuple[float | None, float | None]
    ratio: Interval
    """Seconds of a token: second arm divided by the first one."""
    turns: int


@dataclass(frozen=True)
class Cost:
    """What an arm takes to reach a loss, on one card."""

    tokens: float
    seconds: float | None
    joules: float | None
    dollars: float | None


@dataclass(frozen=True)
class Outcome:
    """The result of a race, as far as it is known."""

    race: Race
    losses: Mapping[int, tuple[list[float], list[float]]]
    """Seed -> losses at the ends of the cooldowns of both arms, for each seed that is complete in both."""
    unit: str
    """Unit of all losses."""
    distance: Distance | None
    speed: Speed | None
    time: Interval | None
    """Time ratio: token ratio times speed ratio."""
    costs: tuple[tuple[Cost, Cost], ...]
    """Costs of both arms at each of the losses of `distance`."""
    verdict: str


def outcome_of(race: Race, price: float | None) -> Outcome:
    """Reads what a race has found so far.

    Args:
        race: The race.
        price: Dollars of a GPU hour, or None.
    """
    size = bytes_per_token(race.arms[0].config)
    scale, unit = (1.0, "nats per token") if size is None else (1 / math.log(2) / size, "bits per byte")
    scaled = {
        seed: ([loss * scale for loss in a], [loss * scale for loss in b]) for seed, (a, b) in race.losses().items()
    }
    speed = read_speed(race.out / "speed.json")
    distance = None
    if scaled:
        first, second = (np.array([pair[arm] for pair in scaled.values()]) for arm in (0, 1))
        a, b = (np.array(arm.tokens, float) for arm in race.arms)
        distance = distances(first, second, (a, b))
    time = None if distance is None or speed is None else product(distance.whole, speed.ratio)
    costs = () if distance is None else tuple(_costs(pair, speed, price) for pair in distance.tokens)
    verdict = _verdict(race, scaled, distance, time, unit)
    return Outcome(race, scaled, unit, distance, speed, time, costs, verdict)


def read_speed(path: Path) -> Speed | None:
    """Reads the file that `gptperf.race.speed` writes; None if it is not there."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    seconds = [np.array(arm["seconds_per_token"]) for arm in found["arms"]]
    joules = [arm["joules_per_token"] for arm in found["arms"]]
    return Speed(
        found["device"],
        (float(np.median(seconds[0])), float(np.median(seconds[1]))),
        (_mean(joules[0]), _mean(joules[1])),
        t_interval(np.log(seconds[1] / seconds[0])),
        len(seconds[0]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _costs(tokens: tuple[float, float], speed: Speed | None, price: float | None) -> tuple[Cost, Cost]:
    found = []
    for place, count in enumerate(tokens):
        seconds = None if speed is None else count * speed.seconds_per_token[place]
        each = None if speed is None else speed.joules_per_token[place]
        dollars = None if seconds is None or price is None else price * seconds / 3600
        found.append(Cost(count, seconds, None if each is None else count * each, dollars))
    return found[0], found[1]


def interval_text(found: Interval) -> str:
    """Returns a ratio with its interval."""
    if found.low is None or found.high is None:
        return f"{found.ratio:.3f}"
    low = f"{found.low:.3f}" if found.low > 0 else "below what was trained"
    high = f"{found.high:.3f}" if found.high < math.inf else "beyond what was trained"
    return f"{found.ratio:.3f} ({low} to {high})"


def _verdict(
    race: Race,
    losses: Mapping[int, tuple[list[float], list[float]]],
    distance: Distance | None,
    time: Interval | None,
    unit: str,
) -> str:
    """Returns the result in a sentence, or why there is none."""
    problems = race.problems()
    if problems:
        return ". ".join(problems) + "."
    first, second = (arm.name for arm in race.arms)
    if not losses:
        return "No verdict yet: no seed is complete in both arms."
    if distance is None:
        means = [np.array([pair[arm] for pair in losses.values()]).mean(0) for arm in (0, 1)]
        better, worse = (second, first) if means[1].min() < means[0].min() else (first, second)
        return (
            f"No ratio: the envelopes have no loss in common, and nothing is extrapolated. {better} is below {worse} "
            f"everywhere ({first}: {means[0].min():.4f} to {means[0].max():.4f} {unit}, {second}: {means[1].min():.4f} "
            f"to {means[1].max():.4f}). Wanted arms that are closer, or a longer race of {worse}."
        )
    text = f"To equal loss, {second} needs {interval_text(distance.whole)} times the tokens of {first}"
    if time is not None:
        text += f" and {interval_text(time)} times its time"
    text += "" if distance.whole.low is None else ", with 95% intervals"
    if len(losses) < FEWEST_SEEDS:
        return (
            f"{text}; no verdict: a bootstrap over {counted(len(losses), 'seed')} has no 95% interval, wanted "
            f"{FEWEST_SEEDS} or more."
        )
    shown = distance.whole if time is None else time
    what = "tokens" if time is None else "time"
    if not shown.excludes_one:
        return f"{text}: no difference in {what} is shown."
    better = second if shown.ratio < 1 else first
    left = "" if len(losses) == race.seeds else f" So far {len(losses)} of {counted(race.seeds, 'seed')}."
    return f"{text}: {better} needs less {what}.{left}".replace("less tokens", "fewer tokens")


def plain(value: Any) -> Any:
    """Returns a figure for JSON, which has no infinity: None stands for what was not reached."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
