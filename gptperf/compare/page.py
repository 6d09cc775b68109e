"""Shows a ranking of runs as tables, as text and as a page. Does not import torch."""

from pathlib import Path

from gptperf import formats
from gptperf.compare import curves
from gptperf.compare.ranking import Ranking
from gptperf.report.figures import lines_for
from gptperf.report.page import Section, render
from gptperf.report.tables import Table, aligned

__all__ = ["differing_table", "html", "ranking_table", "tasks_table", "text"]


def ranking_table(ranking: Ranking) -> Table:
    """Returns the ranking as a table with a row for each run."""
    columns = ("", "run", ranking.measure, "last validation", "MFU", "tokens/s", "peak GB", "iterations")
    scales = _scales(ranking)
    rows = []
    for number, (run, loss) in enumerate(zip(ranking.runs, ranking.losses, strict=True), 1):
        last = run.evals[-1] if run.evals else None
        mfu = None if run.mfu_percent is None else f"{run.mfu_percent:.1f}%"
        mfu = f"{mfu} {run.mfu_scale}" if mfu and len(scales) > 1 else mfu
        damage = f", {run.damaged_lines} damaged" if run.damaged_lines else ""
        rows.append(
            (
                "-" if loss is None else str(number),
                run.name,
                formats.number(loss, ".4f"),
                formats.number(last and last.loss, ".4f"),
                mfu or "-",
                formats.number(run.tokens_per_sec, ",.0f"),
                formats.number(run.peak_gb, ".1f" if (run.peak_gb or 0) >= 10 else ".2f"),
                f"{run.iterations:,}" + (f" of {run.max_iters:,}" if run.max_iters is not None else ""),
                formats.duration(run.train_s),
                formats.duration(run.wall_s),
                run.state + damage,
            )
        )
    return Table(
        (*columns, "training", "wall time", "state"),
        rows,
        frozenset({1, 10}),
        lines_for([run.name for run in ranking.runs]),
        key_column=1,
    )


def tasks_table(ranking: Ranking) -> Table | None:
    """Returns the accuracies of the runs' last evaluations of tasks, with a row for each run; None without tasks."""
    names = list(dict.fromkeys(name for run in ranking.runs for name in run.tasks))
    if not names:
        return None
    rows = []
    for run in ranking.runs:
        at = next((e.iter for e in reversed(run.evals) if e.tasks), None)
        cells = [formats.with_error(run.tasks.get(name, {}), "acc") for name in names]
        rows.append((run.name, formats.number(at, ","), *cells))
    return Table(("acc", "iteration", *names), rows)


def _scales(ranking: Ranking) -> list[str]:
    """Returns what the MFUs of the runs are relative to, each once."""
    return list(dict.fromkeys(run.mfu_scale for run in ranking.runs if run.mfu_scale))


def _remarks(ranking: Ranking) -> list[str]:
    """Returns the lines below the table."""
    scales = _scales(ranking)
    return [*ranking.remarks, *([f"MFU: {scales[0]}."] if len(scales) == 1 else [])]


def differing_table(ranking: Ranking) -> Table | None:
    """Returns the keys that differ, with a column for each run or each key, whichever is narrower; None if none do."""
    if not ranking.differing:
        return None
    cells = {
        key: [formats.one_line(formats.value_text(value, 6)) for value in values]
        for key, values in ranking.differing.items()
    }
    names = [run.name for run in ranking.runs]
    by_key = Table(("", *names), [(key, *values) for key, values in cells.items()])
    by_run = Table(("", *cells), [(name, *(of[i] for of in cells.values())) for i, name in enumerate(names)])
    return min(by_key, by_run, key=lambda table: len(aligned(table).partition("\n")[0]))


def text(ranking: Ranking, page: Path | None = None) -> str:
    """Returns the ranking as text for a terminal, with the path of the page if one was written."""
    differing = differing_table(ranking)
    parts, tasks = [ranking.how, aligned(ranking_table(ranking))], tasks_table(ranking)
    parts += [aligned(tasks)] if tasks is not None else []
    parts += [f"what differs:\n{aligned(differing)}"] if differing is not None else []
    remarks = _remarks(ranking)
    parts += ["\n".join(remarks)] if remarks else []
    return "\n\n".join(parts + ([f"page: {page}"] if page is not None else []))


def html(ranking: Ranking) -> str:
    """Returns the ranking as a page: table, differing keys, curves.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    lines = lines_for([run.name for run in ranking.runs])
    charts = curves.charts(ranking.runs, lines, ranking.tokens)
    sections = [Section("", [f"Ranked by {ranking.how}."], [ranking_table(ranking)], below=_remarks(ranking))]
    differing, tasks = differing_table(ranking), tasks_table(ranking)
    if tasks is not None:
        sections.append(Section("Task scores", tables=[tasks]))
    if differing is not None:
        sections.append(Section("What differs", tables=[differing]))
    elif len(ranking.runs) > 1:
        sections.append(Section("", ["All runs have the same configuration."]))
    sections.append(Section("Curves", _on_the_curves(ranking), charts=list(charts), legend=lines))
    return render(f"gptperf: {formats.counted(len(ranking.runs), 'run')} compared", sections, charts)


def _on_the_curves(ranking: Ranking) -> list[str]:
    lines = ["Dotted: where the runs are ranked."] if ranking.tokens is not None else []
    lines.append("Many points are drawn as means, with the least and greatest as a shade.")
    return [" ".join([*lines, "Time is that of training, without compilation, evaluation and saving."])]
