"""The charts of a run's page: places of texts in the SVG that a browser shows."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from report_helpers import events, write_journal

from gptperf.monitor.run_log import load
from gptperf.monitor.waterfall import PARTS
from gptperf.report.charts import draw
from gptperf.report.figures import WIDTH, svg, waterfall

pytest.importorskip("matplotlib")


def places(chart: str | None, words: Sequence[str]) -> list[tuple[float, float]]:
    """Returns where in a chart each text is, in points from its upper left corner."""
    found = {}
    for given, word in re.findall(r"<text ([^>]*)>\s*([^<]*?)\s*</text>", chart or ""):
        place = re.search(r'(?:x="|translate\()([\d.]+)(?:" y="| )([\d.]+)', given)
        assert place is not None, given
        found[word] = float(place[1]), float(place[2])
    return [found[word] for word in words]


def test_a_legend_has_one_row_and_reads_from_left_to_right(tmp_path: Path) -> None:
    lines = events()
    lines.insert(-20, {"event": "resume", "iter": 5900, "time": "2026"})
    names = ["embedding", "0", "1", "2", "3", "4", "head"]
    for line in lines:
        if "gradients" in line:
            line["gradients"]["layer_norms"] = {name: 1.0 + line["iter"] for name in names}
    log = load(write_journal(tmp_path, lines))
    for name, words in (("layers", names), ("loss", ["training", "validation", "best", "spike", "plateau", "resumed"])):
        found = places(draw(name, log), words)
        assert len({y for _, y in found}) == 1, found
        assert [x for x, _ in found] == sorted({x for x, _ in found})


def test_a_legend_that_does_not_fit_reads_by_rows(tmp_path: Path) -> None:
    names = [f"component number {i}" for i in range(5)]
    lines = events()
    for line in lines:
        if "gradients" in line:
            line["gradients"]["component_norms"] = {name: 1.0 + line["iter"] for name in names}
    found = places(draw("components", load(write_journal(tmp_path, lines))), names)
    assert len({y for _, y in found}) > 1
    assert [(y, x) for x, y in found] == sorted((y, x) for x, y in found)
    assert max(x for x, _ in found) < 72 * WIDTH - 60


def test_the_labels_of_the_histogram_are_sparse(tmp_path: Path) -> None:
    for count in (5, 25, 60, 199):
        lines = events()
        for line in lines:
            if "gradients" in line:
                shares = [1 / (count + 1)] * (count + 1)
                line["gradients"]["histogram"] = {"log2_edges": list(range(-count, 0)), "shares": shares}
        chart = draw("histogram", load(write_journal(tmp_path / str(count), lines))) or ""
        labels = re.findall(r"<text [^>]*>\s*(2\^-\d+)\s*</text>", chart)
        assert 3 <= len(labels) <= 8, labels
        xs = [x for x, _ in places(chart, labels)]
        assert min(b - a for a, b in itertools.pairwise(xs)) > 36  # points; a label is 30 wide


def test_the_bars_of_the_waterfall_go_down_from_the_peak_to_the_mfu() -> None:
    points = {part: float(place) for place, part in enumerate(PARTS, 1)}
    chart = svg(waterfall("title", points, 60.0), "waterfall")
    names = ["peak", *(part.replace("_", " ") for part in PARTS), "MFU"]
    assert [y for _, y in places(chart, names)] == sorted(y for _, y in places(chart, names))
    left = 100 - sum(points.values())
    assert f">{left:.1f}%<" in re.sub(r"\s*(<|>)\s*", r"\1", chart)
    assert all(f">-{lost:.1f}<" in re.sub(r"\s*(<|>)\s*", r"\1", chart) for lost in points.values())
