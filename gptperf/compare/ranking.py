"""Ranks runs at equal tokens, and finds the configuration keys in which they differ. Does not import torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptperf import formats
from gptperf.monitor.runs import LeftOut, LoggedRun

__all__ = ["Ranking", "differing_keys", "rank", "record"]

_WHERE_KEYS = ("out_dir", "init_from", "overwrite", "wandb_run_name")
"""Keys that say where a run is stored and how it starts. They are not compared."""
_RAN_ON = {
    "device": "ran on",
    "num_gpus": "GPUs",
    "parallelism": "parallelism",
    "total_parameters": "parameters",
    "versions": "versions",
}
"""Key of the startup info -> name of the fact in the table."""
_SAME_VALIDATION = ("dataset", "block_size", "batch_size", "eval_iters")
"""Keys that must agree for two runs to evaluate on the same batches."""


@dataclass(frozen=True)
class Ranking:
    """Runs in the order of their losses, the lowest first; runs without a loss come last."""

    runs: tuple[LoggedRun, ...]
    losses: tuple[float | None, ...]
    measure: str
    """One of "validation loss", "training loss" and "none" (no loss that all runs have)."""
    tokens: float | None
    """Number of tokens at which the losses are taken."""
    how: str
    """Measure and tokens in words."""
    differing: dict[str, list[Any]]
    """Key -> its value in each run, or None if it is unknown."""
    remarks: tuple[str, ...]


def rank(runs: Sequence[LoggedRun], left_out: Sequence[LeftOut] = ()) -> Ranking:
    """Ranks runs by one measure, at the largest number of tokens at which all of them have it.

    Args:
        runs: One or more runs; those that have logged no loss are not ranked.
        left_out: Runs that could not be read, for the remarks.
    """
    taking_part = [run for run in runs if run.evals or any(s.loss is not None for s in run.steps)]
    measure, tokens, how = _measure(taking_part)
    losses: dict[str, float | None] = {run.name: None for run in runs}
    if tokens is not None:
        validation = measure == "validation loss"
        for run in taking_part:
            losses[run.name] = run.val_loss_at(tokens) if validation else run.train_loss_at(tokens)

    def order(run: LoggedRun) -> float:
        loss = losses[run.name]
        return math.inf if loss is None else loss

    ranked = sorted(runs, key=order)
    remarks = [line for run in ranked for line in run.remarks()]
    remarks += [f"{run.name}: no loss logged yet, not ranked" for run in ranked if run not in taking_part]
    remarks += [f"{run.name}: resumed, so its wall time is not known" for run in ranked if run.resumes]
    remarks += [f"left out: {path}: {reason}" for path, reason in left_out]
    differing = differing_keys(ranked)
    other = [key for key in _SAME_VALIDATION if key in differing]
    if measure == "validation loss" and other:
        remarks.append(f"not all validate on the same batches: {', '.join(other)} differ; the losses may not compare")
    elif "dataset" in other:
        remarks.append("not all train on the same data: dataset differs; the losses may not compare")
    return Ranking(
        tuple(ranked), tuple(losses[run.name] for run in ranked), measure, tokens, how, differing, tuple(remarks)
    )


def _measure(runs: Sequence[LoggedRun]) -> tuple[str, float | None, str]:
    """Returns the measure by which all runs can be ranked, the tokens at which it is taken, and both in words."""
    if not runs:
        return "none", None, "no run has logged a loss"
    if all(run.evals for run in runs):
        shortest = min(runs, key=lambda run: run.evals[-1].tokens)
        tokens = shortest.evals[-1].tokens
        if all(run.evals[0].tokens <= tokens for run in runs):
            how = f"validation loss at {tokens:,.0f} tokens, linear between the evaluations around"
            return "validation loss", tokens, how + _limit(runs, shortest, tokens)
        why = "the evaluations of these runs do not overlap"
    else:
        missing = [run.name for run in runs if not run.evals]
        why = f"no evaluation in {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    trained = {run.name: [s.tokens for s in run.steps if s.loss is not None] for run in runs}
    if not all(trained.values()):
        return "none", None, f"{why}, and not all have a training loss: not ranked"
    shortest = min(runs, key=lambda run: trained[run.name][-1])
    tokens = trained[shortest.name][-1]
    how = f"training loss at {tokens:,.0f} tokens, mean of the entries of the last tenth before it ({why})"
    return "training loss", tokens, how + _limit(runs, shortest, tokens)


def _limit(runs: Sequence[LoggedRun], shortest: LoggedRun, tokens: float) -> str:
    longest = max(
        [run.steps[-1].tokens for run in runs if run.steps] + [run.evals[-1].tokens for run in runs if run.evals]
    )
    return "" if longest <= 1.05 * tokens else f"; {shortest.name} goes no further"


def differing_keys(runs: Sequence[LoggedRun]) -> dict[str, list[Any]]:
    """Returns configuration keys and facts of the machine that are not the same in all runs."""
    found: dict[str, list[Any]] = {}
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _WHERE_KEYS)
    for key in keys:
        found[key] = [run.config.get(key) for run in runs]
    for key, name in _RAN_ON.items():
        found[name] = [run.info.get(key) for run in runs]
    return {
        formats.one_line(key): values for key, values in found.items() if len({repr(value) for value in values}) > 1
    }


def record(ranking: Ranking, left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Returns the ranking in the form of the JSON output."""
    rows = []
    for number, (run, loss) in enumerate(zip(ranking.runs, ranking.losses, strict=True), 1):
        rows.append(
            {
                "rank": None if loss is None else number,
                "name": run.name,
                "path": formats.one_line(str(run.path), 4096),
                "loss": loss,
                "last_val_loss": run.evals[-1].loss if run.evals else None,
                "best_val_loss": min((e.loss for e in run.evals), default=None),
                "tasks": {name: dict(scores) for name, scores in run.tasks.items()},
                "tokens": run.steps[-1].tokens if run.steps else None,
                "mfu_percent": run.mfu_percent,
                "mfu_scale": run.mfu_scale,
                "tokens_per_sec": run.tokens_per_sec,
                "peak_gb": run.peak_gb,
                "iterations": run.iterations,
                "max_iters": run.max_iters,
                "train_s": run.train_s,
                "wall_s": run.wall_s,
                "state": run.state,
                "damaged_lines": run.damaged_lines,
                "resumes": run.resumes,
                "differing": {key: values[number - 1] for key, values in ranking.differing.items()},
            }
        )
    return {
        "measure": ranking.measure,
        "tokens": ranking.tokens,
        "how": ranking.how,
        "runs": rows,
        "remarks": list(ranking.remarks),
        "left_out": [{"path": path, "reason": reason} for path, reason in left_out],
    }
