"""The figures in the verdict of a run's page, from a log with known ones."""

from pathlib import Path

import pytest

from gptperf.monitor.journal import Journal
from gptperf.monitor.run_log import load

pytest.importorskip("jinja2")
from gptperf.report.sections import sections


def test_the_verdict_has_the_figures_of_the_run(tmp_path: Path) -> None:
    """The entry of iteration 4 stands for two iterations; the best loss and the peak are those of iteration 2."""
    with Journal(tmp_path, "run_20260102_030405") as journal:
        journal.write("start", {"config": {"origins": {}}, "startup_info": {"max_iters": 6}})
        for iteration, seconds, peak_gb, loss in ((1, 30, 1.0, 3.0), (2, 5, 3.0, 2.0), (4, 10, 2.0, 2.5)):
            fields = {"loss": loss, "time_ms": 1e3 * seconds, "memory": {"peak_gb": peak_gb}}
            journal.write("iteration", {"iter": iteration, **fields})
            journal.write("eval", {"iter": iteration, "val_loss": loss})
    verdict = sections(load(journal.path))[0]
    tiles = {tile.label: tile for tile in verdict.tiles}
    assert tiles["Iterations"].value == "4"
    assert tiles["Training time"].value == "55.0 s"
    assert (tiles["Best validation loss"].value, tiles["Best validation loss"].note) == ("2.0000", "iteration 2")
    assert tiles["Validation loss"].value == "2.5000"
    assert tiles["Peak memory"].value == "3.000 GB"


def test_the_scores_of_tasks_are_those_of_the_last_evaluation_that_has_them(tmp_path: Path) -> None:
    tasks = {"arc": {"items": 2376, "acc": 0.375, "acc_stderr": 0.0125, "centred": 0.1}}
    tasks["lambada"] = {"items": 5153, "acc": 0.25, "perplexity": 36.5, "perplexity_stderr": 1.25}
    with Journal(tmp_path, "run_20260102_030405") as journal:
        for iteration, more in ((1, {"tasks": {"old": {"acc": 1}}}), (2, {"tasks": tasks, "core": 0.5}), (3, {})):
            journal.write("eval", {"iter": iteration, "val_loss": 2.0} | more)
    (section,) = [found for found in sections(load(journal.path)) if found.title == "Task scores"]
    assert section.lines == ["Mean of the centred scores: 0.5000."]
    (table,) = section.tables
    assert table.columns == ("task at 2", "acc", "acc_norm", "perplexity", "centred", "items")
    assert [list(row) for row in table.rows] == [
        ["arc", "0.3750 +- 0.0125", "-", "-", "0.1000", "2,376"],
        ["lambada", "0.2500", "-", "36.5 +- 1.25", "-", "5,153"],
    ]
