"""The report of an ablation as text, Markdown, JSON and a page. This module does not import torch."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptperf.ablate.results import Difference, Result
from gptperf.ablate.tuning import notes, state_of_rate
from gptperf.ablate.variants import Variant
from gptperf.compare import curves
from gptperf.experiment.significance import LEVEL
from gptperf.files import replace_text
from gptperf.formats import counted, number
from gptperf.monitor.runs import LoggedRun
from gptperf.report.figures import TEXT_COLOR, WIDTH, Line, lines_for, pyplot, svg
from gptperf.report.page import Section, render
from gptperf.report.tables import Table, aligned, escaped
from gptperf.report.tables import markdown as markdown_table

__all__ = ["html", "listing", "markdown", "record", "table", "text", "write"]


def listing(found: Sequence[Variant]) -> str:
    """Returns a table of the runs of an ablation, with the tokens and FLOPs of each run and its progress."""
    rows = []
    for variant in found:
        for job in (*variant.tuning, *variant.jobs):
            per_token = variant.flops_per_token
            total = number(per_token and per_token * variant.tokens, ".3e")
            iterations = f"{job.config.train.max_iters:,}"
            rows.append((variant.name, job.label, iterations, f"{variant.tokens:,}", total, job.state()))
    columns = ("variant", "run", "iterations", "tokens", "FLOPs", "state")
    return aligned(Table(columns, rows, frozenset({0, 1, 5})))


def table(found: Sequence[Result]) -> Table:
    """Returns the results as a table with a row for each variant."""
    columns = ("variant", "seeds", "val loss", "sd", "difference", "95%", "p (Holm)", "min", "max", "verdict")
    rows = []
    for result in found:
        variant, paired = result.variant, result.difference
        error = None if paired is None else paired.standard_error
        per_token = variant.flops_per_token
        difference = number(paired and paired.mean, "+.4f") + ("" if error is None else f" +- {error:.4f}")
        interval = None if paired is None else paired.interval
        rows.append(
            (
                variant.name,
                f"{len(result.losses)} of {len(variant.jobs)}",
                number(result.mean, ".4f"),
                number(result.deviation, ".4f"),
                difference,
                "-" if interval is None else f"+- {interval:.4f}",
                _p_text(paired),
                number(paired and paired.low, "+.4f"),
                number(paired and paired.high, "+.4f"),
                "-" if paired is None else paired.verdict,
                f"{variant.config.optimizer.learning_rate:g}, {state_of_rate(variant)}",
                f"{variant.config.train.max_iters:,}",
                number(variant.parameters, ","),
                number(per_token and per_token / 1e9, ".4g"),
                number(result.tokens_per_sec, ",.0f"),
                "-" if result.mfu_percent is None else f"{result.mfu_percent:.1f}%",
            )
        )
    more = ("learning rate", "iterations", "parameters", "GFLOP per token", "tokens/s", "MFU")
    keys = lines_for([result.variant.name for result in found])
    return Table((*columns, *more), rows, frozenset({0, 9}), keys)


def _outcome_and_cost(whole: Table) -> list[Table]:
    """Splits the table after the verdict, because a screen does not show all of its columns side by side."""
    end = whole.columns.index("verdict") + 1
    outcome = Table(whole.columns[:end], [row[:end] for row in whole.rows], whole.texts, whole.keys)
    rows = [(row[0], *row[end:]) for row in whole.rows]
    return [outcome, Table((whole.columns[0], *whole.columns[end:]), rows, keys=whole.keys)]


def _title(found: Sequence[Result], equal: str) -> str:
    tokens = found[0].variant.tokens
    if equal == "tokens":
        return f"Ablation at equal tokens ({tokens:,} a run)"
    total = (found[0].variant.flops_per_token or 0.0) * tokens
    return f"Ablation at equal FLOPs ({total:.3e} a run, strict)"


def _p_text(paired: Difference | None) -> str:
    if paired is None or paired.adjusted_p is None:
        return "-"
    return f"{paired.adjusted_p:.4f}" if paired.adjusted_p >= 1e-4 else "< 0.0001"


def _learning_rates(found: Sequence[Result], failed: Mapping[Path, str]) -> list[str]:
    """Returns lines that say whether the learning rate was tuned, and how."""
    first = found[0].variant
    if not first.tuning:
        return [
            "Learning rate not tuned per arm: a change whose best learning rate is another one looks worse than it is."
        ]
    line = (
        f"Learning rate tuned per arm, by the validation loss with seed {first.tuning[0].seed}, which is not compared."
    )
    return [line, *(note for result in found for note in notes(result.variant, failed))]


def _lines(found: Sequence[Result], failed: Mapping[Path, str]) -> list[str]:
    """Returns lines that explain the table, and list the runs that are missing from it."""
    lines = [
        "Difference: final validation loss minus the baseline's, paired by seed: mean +- standard error, the 95% "
        "interval of the mean (Student's t, of one comparison alone), smallest and largest.",
        f"p (Holm): of the paired t-test, adjusted by Holm's method for the comparisons, of which there are "
        f"{len(found) - 1}. It decides the verdict; within the spread: it is {LEVEL} or more.",
        *_learning_rates(found, failed),
    ]
    for result in found:
        paired = result.difference
        if paired is not None and paired.interval is None:
            lines.append(f"{result.variant.name}: with one seed there is no spread; {paired.mean:+.4f} may be chance.")
        elif paired is not None and paired.verdict == "within the spread":
            lines.append(f"{result.variant.name}: {paired.mean:+.4f} is within the spread.")
    scales = dict.fromkeys(result.mfu_scale for result in found if result.mfu_scale)
    lines += [f"MFU: {' / '.join(scales)}."] if scales else []
    lines += [f"failed: {folder}: {how}" for folder, how in failed.items()]
    missing = sum(len(r.variant.jobs) - len(r.losses) for r in found)
    return lines + (
        [f"Not finished: {missing} of {counted(sum(len(r.variant.jobs) for r in found), 'run')}."] if missing else []
    )


def text(found: Sequence[Result], equal: str, failed: Mapping[Path, str]) -> str:
    """Returns the report as text for a terminal."""
    return "\n".join([_title(found, equal), "", aligned(table(found)), "", *_lines(found, failed)])


def markdown(found: Sequence[Result], equal: str, failed: Mapping[Path, str]) -> str:
    """Returns the report as the text of a Markdown file."""
    lines = "\n\n".join(map(escaped, _lines(found, failed)))
    return f"# {_title(found, equal)}\n\n{markdown_table(table(found))}\n\n{lines}\n"


def record(found: Sequence[Result], equal: str, failed: Mapping[Path, str]) -> dict[str, Any]:
    """Returns the report in the form of the JSON file."""
    rows = []
    for result in found:
        variant, paired = result.variant, result.difference
        rows.append(
            {
                "name": variant.name,
                "changes": variant.changes,
                "learning_rate": variant.config.optimizer.learning_rate,
                "tuning": [
                    {
                        "learning_rate": job.config.optimizer.learning_rate,
                        "seed": job.seed,
                        "out_dir": str(job.out_dir),
                        "val_loss": job.val_loss(),
                        "failed": failed.get(job.out_dir),
                    }
                    for job in variant.tuning
                ],
                "max_iters": variant.config.train.max_iters,
                "tokens": variant.tokens,
                "parameters": variant.parameters,
                "flops_per_token": variant.flops_per_token,
                "runs": [
                    {
                        "seed": job.seed,
                        "out_dir": str(job.out_dir),
                        "val_loss": result.losses.get(job.seed),
                        "failed": failed.get(job.out_dir),
                    }
                    for job in variant.jobs
                ],
                "mean_val_loss": result.mean,
                "sd_val_loss": result.deviation,
                "difference": None if paired is None else paired._asdict() | {"verdict": paired.verdict},
                "tokens_per_sec": result.tokens_per_sec,
                "mfu_percent": result.mfu_percent,
                "mfu_scale": result.mfu_scale,
            }
        )
    shared = {"equal": equal, "flops_convention": "strict", "learning_rate_tuned": bool(found[0].variant.tuning)}
    return {**shared, "p_adjusted_by": "Holm", "variants": rows}


def write(found: Sequence[Result], equal: str, failed: Mapping[Path, str], folder: Path) -> tuple[Path, Path]:
    """Writes `ablation.md` and `ablation.json` into a folder, and returns their paths.

    Raises:
        DiskError: A file cannot be written.
    """
    paths = folder / "ablation.md", folder / "ablation.json"
    replace_text(paths[0], markdown(found, equal, failed))
    replace_text(paths[1], json.dumps(record(found, equal, failed), indent=2, allow_nan=False) + "\n")
    return paths


def html(found: Sequence[Result], equal: str, failed: Mapping[Path, str]) -> str:
    """Returns the report as a page: table, differences, and curves of all runs in the colours of their variants.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    keys = lines_for([result.variant.name for result in found])
    runs: list[LoggedRun] = []
    lines = []
    for result, key in zip(found, keys, strict=True):
        for job in result.variant.jobs:
            log = job.log()
            if log is not None:
                runs.append(dataclasses.replace(log, name=f"{key.name}, seed {job.seed}"))
                lines.append(key)
    charts = curves.charts(runs, lines)
    names = list(charts)
    sections = [Section("", tables=_outcome_and_cost(table(found)), below=_lines(found, failed))]
    differences = _forest(found, keys)
    if differences is not None:
        charts["differences"] = differences
        line = "Diamond: mean. Small dots: seeds. Bar: the 95% interval of the mean, of one comparison alone."
        sections.append(Section("Differences to the baseline", [line], charts=["differences"]))
    line = "One curve per seed. Time is that of training, without compilation, evaluation and saving."
    sections.append(Section("Curves", [line], charts=names, legend=keys))
    return render(_title(found, equal), sections, charts)


def _forest(found: Sequence[Result], keys: Sequence[Line]) -> str | None:
    """Draws the differences as points with their intervals; returns None if there is no difference yet."""
    shown = [(r.difference, key) for r, key in zip(found, keys, strict=True) if r.difference is not None]
    if not shown:
        return None
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(WIDTH, 0.8 + 0.45 * len(shown)), layout="constrained")
    for place, (paired, key) in enumerate(shown):
        if paired.interval is not None:
            ends = [paired.mean - paired.interval, paired.mean + paired.interval]
            axes.plot(ends, [place, place], color=key.color, linewidth=2, alpha=0.6, solid_capstyle="butt")
        axes.scatter(list(paired.by_seed.values()), [place] * len(paired.by_seed), s=9, color=key.color, zorder=3)
        axes.scatter([paired.mean], [place], s=46, color=key.color, marker="D", zorder=4)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(key.name, (0, place), (3, 9), fontsize=8, **at)  # above its row: a long name takes no width
    axes.axvline(0, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    axes.set_yticks([])
    axes.set_ylim(len(shown) - 0.5, -0.8)
    axes.set_xlabel("difference of the final validation loss; left is better")
    return svg(figure, "differences")
