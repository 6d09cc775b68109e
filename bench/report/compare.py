"""Shows what got slower or faster between two folders of results: `python -m bench.report.compare A B` (B against A).

A figure has changed if it moved by more than the threshold and its range from the 10th to the 90th percentile does not
touch the range of the other. The exit code is 1 if a figure of this project got worse, or if a cell that ran in A fails
in B. The figures of rivals and of the card are shown too, because they distinguish a slower program from a slower
machine. This module does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.metrics import Metric, metrics
from bench.results import Record, load_folder
from gptperf.config.flags import Flags, parse
from gptperf.errors import ConfigError, run_main
from gptperf.formats import counted

__all__ = ["LEAST", "Change", "Comparison", "compare", "differences", "main"]

LEAST = 0.02
"""Smallest threshold: medians of the same program on the same card differ by about this much."""
_ONE_SHOT = 0.10
"""Threshold of a figure without percentiles: a single number says nothing about its noise."""
_EXACT = ("peak memory",)
"""Figures without percentiles that have no noise."""


@dataclass(frozen=True)
class Change:
    """A figure that both folders have."""

    cell: str
    before: Metric
    after: Metric
    threshold: float

    @property
    def factor(self) -> float:
        """Factor by which the figure got worse; below 1 it got better."""
        before, after = self.before.value, self.after.value
        if before == after:
            return 1.0
        worse, better = (after, before) if self.after.lower_is_better else (before, after)
        return float("inf") if better == 0 else worse / better

    @property
    def apart(self) -> bool:
        """Whether the percentiles of the two figures do not touch."""
        return self.after.low > self.before.high or self.after.high < self.before.low

    @property
    def verdict(self) -> str:
        """One of "slower", "faster" and "same"."""
        if not self.apart or 1 / (1 + self.threshold) <= self.factor <= 1 + self.threshold:
            return "same"
        return "slower" if self.factor > 1 else "faster"


@dataclass(frozen=True)
class Comparison:
    """The comparison of two folders."""

    notes: list[str]
    """A line for each fact that differs between the machines."""
    changes: list[Change]
    broken: list[str]
    """Cells that are done in A and failed in B, with the reason."""
    missing: list[str]
    """Cells for which only one folder has a result."""

    @property
    def worse(self) -> list[Change]:
        """Figures of this project that got slower."""
        return [change for change in self.changes if change.verdict == "slower" and change.after.ours]

    @property
    def exit_code(self) -> int:
        """1 where a figure of this project got worse or a cell broke, else 0."""
        return int(bool(self.worse or self.broken))


def _facts(record: Record) -> dict[str, Any]:
    made_by = record["environment"]
    state = made_by.get("gpu_state") or {}
    versions = {name: version for name, version in made_by.get("versions", {}).items() if version}
    cap = state.get("power_cap_w")
    return {
        "GPU": made_by["device"],
        "driver": made_by.get("driver"),
        "power cap": None if cap is None else f"{cap:.0f} W",
        **versions,
        "processor": f"{made_by.get('cores')} cores, {made_by.get('machine')}",
        "Python": made_by.get("python"),
        "form": "quick" if record.get("quick") else "full",
    }


def differences(before: Mapping[str, Record], after: Mapping[str, Record]) -> list[str]:
    """Returns a line for each fact that differs between the machines."""
    found: dict[str, None] = {}
    for cell in before.keys() & after.keys():
        a, b = _facts(before[cell]), _facts(after[cell])
        for name in dict.fromkeys((*a, *b)):
            if a.get(name) != b.get(name):
                found[f"different {name}: {a.get(name) or 'none'} and {b.get(name) or 'none'}"] = None
    return sorted(found, key=lambda line: (not line.startswith("different GPU"), line))


def compare(before: Mapping[str, Record], after: Mapping[str, Record], threshold: float = LEAST) -> Comparison:
    """Compares two sets of results.

    Args:
        before: Cell -> result.
        after: Cell -> result.
        threshold: Smallest relative change that counts.

    Raises:
        ConfigError: The threshold is below `LEAST`.
    """
    if threshold < LEAST:
        raise ConfigError(f"command line: threshold: found {threshold}, wanted at least {LEAST}; nearest: {LEAST}")
    changes, broken = [], []
    for cell in (cell for cell in before if cell in after):
        if before[cell]["status"] == "done" and after[cell]["status"] != "done":
            broken.append(f"{cell}: {after[cell].get('reason')}")
        old, new = metrics(before[cell]), metrics(after[cell])
        for name, metric in new.items():
            if name in old:
                noisy = metric.low == metric.high and name not in _EXACT
                changes.append(Change(cell, old[name], metric, max(threshold, _ONE_SHOT) if noisy else threshold))
    missing = [f"{cell} (not in B)" for cell in before if cell not in after]
    missing += [f"{cell} (not in A)" for cell in after if cell not in before]
    return Comparison(differences(before, after), changes, broken, missing)


def _lines(found: Comparison, show_all: bool) -> list[str]:
    lines = [f"! {note}" for note in found.notes]
    if any(note.startswith("different GPU") for note in found.notes):
        lines.append("! these figures are of two different cards, so they say little about the program")
    moved = [c for c in found.changes if c.verdict != "same"]
    shown = sorted(found.changes if show_all else moved, key=lambda c: (c.verdict, not c.after.ours, -c.factor))
    for change in shown:
        a, b = change.before, change.after
        spans = f"({a.low:.4g} to {a.high:.4g}) -> {b.value:.4g} ({b.low:.4g} to {b.high:.4g}) {b.unit}"
        note = "" if b.ours else "  not ours"
        moved_by = b.value / a.value - 1 if a.value else float("inf")
        lines.append(f"{change.verdict:<7}{moved_by:>+8.1%}  {change.cell} {b.name}: {a.value:.4g} {spans}{note}")
    lines += [f"BROKEN  {text}" for text in found.broken]
    if found.missing:
        lines.append(f"in one folder only: {counted(len(found.missing), 'cell')}: {', '.join(found.missing[:8])}")
    same = len(found.changes) - len(moved)
    worse = f"{len(found.worse)} of ours got slower, {counted(len(found.broken), 'cell')} broke"
    return [*lines, f"{counted(len(found.changes), 'figure')} in both: {same} the same within their noise; {worse}"]


@dataclass(frozen=True, kw_only=True)
class _CompareFlags(Flags):
    """Which results, and what to show."""

    a: Path
    """Folder of results before."""
    b: Path
    """Folder of results after."""
    threshold: float = LEAST
    """Smallest relative change."""
    all: bool = False
    """Show also what did not change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison.

    Returns:
        1 if a figure of this project got worse, else 0.

    Raises:
        ConfigError: A folder has no results, or the two have no cell in common.
    """
    args = parse(_CompareFlags, argv, "bench.report.compare", __doc__)
    before, after = load_folder(args.a), load_folder(args.b)
    if not before.keys() & after.keys():
        raise ConfigError(f"{args.a} and {args.b} have no cell in common; wanted results of the same cells")
    found = compare(before, after, args.threshold)
    print("\n".join(_lines(found, args.all)))
    return found.exit_code


if __name__ == "__main__":
    run_main(main)
