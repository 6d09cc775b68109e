"""The pictures of the README and the guide stand alone, are small, and show the figures of their sources."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from report_helpers import CHROMIUM, events, write_journal
from run_helpers import ROOT

from bench.pictures import __main__ as command
from bench.pictures import draw
from gptperf.errors import DataError

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

FILES = sorted(path for path in (ROOT / "bench" / "pictures").iterdir() if path.suffix in (".svg", ".png"))


def check_svg(text: str) -> None:
    """A picture on another page loads nothing and has no text colour of its page."""
    assert xml.etree.ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "href" not in text.replace('href="#', "")
    assert not re.findall(r"url\((?!#)|@import|@font-face", text)
    assert "currentColor" not in text


def words(text: str) -> str:
    """The texts of an SVG, with plain spaces."""
    return " ".join(" ".join(xml.etree.ElementTree.fromstring(text).itertext()).replace("\xa0", " ").split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_picture_is_small_stands_alone_and_is_shown(path: Path) -> None:
    assert path.stat().st_size < 150_000
    if path.suffix == ".svg":
        check_svg(path.read_text())
    else:
        assert path.read_bytes().startswith(b"\x89PNG")
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "gptperf/GUIDE.md"))
    assert re.search(rf"!\[[^\]]+\]\([^)]*bench/pictures/{path.name}\)", pages)


def test_every_picture_has_a_command() -> None:
    made = {f"{name}.{ending}" for name, (_, ending, _) in command.PICTURES.items()}
    assert made == {path.name for path in FILES}


def test_the_loss_curve_names_its_last_loss(tmp_path: Path) -> None:
    write_journal(tmp_path, events())
    text = draw.loss_curve(tmp_path)
    check_svg(text)
    assert "validation: " in text


def test_the_panel_is_that_of_the_middle_of_the_run(tmp_path: Path) -> None:
    write_journal(tmp_path, events(6000, 60))
    text = draw.live_panel(tmp_path)
    check_svg(text)
    entry = next(line for line in events(6000, 60) if line.get("iter") == 3600 and line["event"] == "iteration")
    for shown in ("3,600/6,000", f"{entry['loss']:.4f}", "1,364,297,728 parameters, NVIDIA H200, 2026-01-02"):
        assert shown in words(text), shown


def test_the_waterfall_shows_the_measured_table() -> None:
    """The notes have the milliseconds and, rounded, the points that follow from them."""
    text = draw.step_waterfall(ROOT / "bench" / "NOTES.md")
    check_svg(text)
    section = (ROOT / "bench" / "NOTES.md").read_text().partition("## Where a step goes")[2]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+)", section, re.MULTILINE))
    for row in ("GEMM above its FLOPs at the peak", "attention likewise", "memory-bound", "optimizer", "nothing runs"):
        assert f"-{rows[row]}" in words(text), row
    assert f"{rows['MFU left; without a profiler']}%" in words(text)
    assert "H200 (700 W), torch 2.11.0" in words(text)


def test_notes_without_the_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "NOTES.md").write_text("## Where a step goes\n\nNowhere.\n")
    with pytest.raises(DataError, match="found no table of a step's parts"):
        draw.step_waterfall(tmp_path / "NOTES.md")


def test_the_ablation_shows_every_finished_difference(tmp_path: Path) -> None:
    write_journal(tmp_path / "baseline" / "seed1", events(600, 12))
    base = {"parameters": 1000, "tokens": 2000, "runs": [{"seed": 1}], "mean_val_loss": 2.5, "difference": None}
    paired = {"mean": -0.25, "interval": 0.1, "by_seed": {"1": -0.3, "2": -0.2}, "verdict": "better"}
    found = [{"name": "baseline", **base}, {"name": "x=1", **base, "difference": paired}, {"name": "x=2", **base}]
    (tmp_path / "ablation.json").write_text(json.dumps({"variants": found}))
    text = draw.ablation(tmp_path)
    check_svg(text)
    for shown in (
        "x=1",
        "-0.250, better",
        "baseline 2.500, 1,000 parameters, 2,000 tokens per run, NVIDIA H200, 2026-01-02",
    ):
        assert shown in words(text), shown
    assert "x=2" not in words(text)  # not finished
    with pytest.raises(DataError, match="wanted the folder of an ablation"):
        draw.ablation(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_picture_of_a_page_is_one_of_it(tmp_path: Path) -> None:
    write_journal(tmp_path, events(600, 12))
    picture = draw.report_page(tmp_path)
    assert picture.startswith(b"\x89PNG")
    assert 20_000 < len(picture) < 150_000  # a blank page has less than 5,000 bytes
