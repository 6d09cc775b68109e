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
    assert tiles["Peak memory"].value == "3.00 GB"
