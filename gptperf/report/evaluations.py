"""Turns the evaluations of a run's log into sections of its page."""

from collections.abc import Iterator

from gptperf import formats
from gptperf.monitor.blocks import SCORES
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import finite, mapping
from gptperf.report.cells import ROWS, figure, text
from gptperf.report.page import Section
from gptperf.report.tables import Table

__all__ = ["evaluations", "tasks"]

_EVALUATION = (("val_loss", 4), ("best_val_loss", 4), ("time_ms", 0))


def evaluations(log: RunLog) -> Iterator[Section]:
    """Yields the table of validation losses, if there are any."""
    rows = [
        (text(e["iter"]), *(figure(e.get(key), digits) for key, digits in _EVALUATION))
        for e in log["eval_steps"][-ROWS:]
    ]
    if rows:
        columns = ("iteration", "validation loss", "best so far", "ms")
        yield Section("Evaluations", tables=[Table(columns, rows), *_sources(log)], folded=len(rows) > 12)


def _sources(log: RunLog) -> Iterator[Table]:
    """Yields the table of the data sets of a mixture at the last evaluation that has them."""
    last = next((entry for entry in reversed(log["eval_steps"]) if mapping(entry.get("sources"))), None)
    if last is None:
        return
    figures = (("val_loss", 4), ("share", 4), ("epochs", 2))
    rows = [
        (text(name), *(figure(mapping(source).get(key), digits) for key, digits in figures))
        for name, source in list(mapping(last["sources"]).items())[:ROWS]
    ]
    yield Table((f"data set at {last['iter']:,}", "validation loss", "share of the data read", "epochs"), rows)


def tasks(log: RunLog) -> Iterator[Section]:
    """Yields the scores of the last evaluation of tasks, and their curves, if there are any."""
    last = next((entry for entry in reversed(log["eval_steps"]) if mapping(entry.get("tasks"))), None)
    if last is None:
        return
    rows = []
    for name, found in list(mapping(last["tasks"]).items())[:ROWS]:
        scores = {key: finite(value) for key, value in mapping(found).items()}
        rows.append((text(name), *(formats.with_error(scores, key) for key in SCORES), figure(scores.get("items"), 0)))
    core = {key: finite(last.get(key)) for key in ("core", "core_stderr")}
    lines = [f"Mean of the centred scores: {formats.with_error(core, 'core')}."] if len(rows) > 1 else []
    table = Table((f"task at {last['iter']:,}", *SCORES, "items"), rows)
    yield Section("Task scores", lines, [table], ["tasks"])
