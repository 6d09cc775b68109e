"""The report of a run shows everything in its log, loads nothing from elsewhere, and no text becomes markup."""

import html.parser
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_helpers import CHROMIUM, Browser, events, write_journal
from run_helpers import run

from gptperf.errors import ConfigError, DataError, DeviceError, DiskError
from gptperf.monitor.run_lock import RunLock, is_locked
from gptperf.monitor.run_log import finite, load
from gptperf.report import __main__ as command
from gptperf.report import run_page as report
from gptperf.report.charts import CAPTIONS, draw, layer_order
from gptperf.report.sections import sections

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

EVIL = "</title></script><script>alert(1)</script>$\\frac{1}{0}$--><img src=x onerror=alert(1)>\x00\x1b[31m\u202e\ud800"
TITLES = ["Verdict", "Loss", "Evaluations", "Task scores", "Sample", "Learning rate", "Gradient norms"]
TITLES += ["Gradient distribution", "Speed", "Memory", "Stability", "Where the time goes", "Plan against actual"]
TITLES += ["Messages", "Checkpoints", "What was built", "Configuration", "Configuration: defaults", "Environment"]


class Page(html.parser.HTMLParser):
    """Tags, attributes, headings and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "h2":
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.headings and not self.headings[-1]:
            self.headings[-1] = data


def page_of(folder: Path, lines: list[dict[str, Any]]) -> Page:
    return Page(report.html(load(write_journal(folder, lines))))


def check_alone(page: Page) -> None:
    """Checks that the page has no script, and no address except places on the page, not even of a name space."""
    assert not {"script", "link", "iframe", "img", "object", "embed", "image", "foreignobject"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value is not None
            assert value.startswith("#"), (name, value)
    assert not re.findall(r"url\((?!#)[^)]*\)", page.text)
    assert "@import" not in page.text
    assert "default-src 'none'" in page.text
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", page.text)


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda name, log: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("whole"), events())


@pytest.mark.slow
def test_a_whole_log_has_every_section_and_chart(whole: Page) -> None:
    assert whole.headings == TITLES
    assert whole.tags.count("svg") == len(CAPTIONS)
    check_alone(whole)
    assert "http" not in whole.text.replace("http-equiv", "")
    for words in ("finished", "6,000", "1.57B", "56.30%", "strict, of 989.4 TFLOP/s dense", "66,346", "6:45:21"):
        assert words in whole.words, words
    for words in ("Spikes at iteration 3,000, 3,050", "-0.3%", "nvjet_hsh_256x128", "power cap 500 W", "return x"):
        assert words in whole.words, words
    assert whole.words.count("MFU: strict, of 989.4 TFLOP/s dense.") == 3  # speed, waterfall, plan
    assert "preset llama (configs/llama_1.36b.toml)" in whole.words
    assert "grad_clip" in whole.words
    for words in ("spike", "plateau", "best", "embedding", "23", "2^-18", "lambada", "plan", "memory bound"):
        assert re.search(rf"<text[^>]*>\s*{re.escape(words)}\s*</text>", whole.text), words
    assert "currentColor" in whole.text


def test_what_the_log_lacks_has_no_section(tmp_path: Path) -> None:
    lines = [line for line in events() if line["event"] == "iteration"]
    bare = [{key: line[key] for key in ("event", "iter", "loss", "time_ms")} for line in lines]
    page = page_of(tmp_path / "a", bare)
    assert page.headings == ["Verdict", "Loss", "Speed"]
    page = page_of(tmp_path / "b", [{"event": "start", "config": {}, "startup_info": {}}])
    assert page.headings == ["Verdict"]
    assert "No iteration was logged." in page.words
    page = page_of(tmp_path / "c", [])
    assert page.headings == ["Verdict"]


@pytest.mark.parametrize("entries", [1, 2])
def test_few_entries_are_drawn(entries: int, tmp_path: Path) -> None:
    lines = events()
    kept = [lines[0], *[line for line in lines if line["event"] == "iteration"][1 : 1 + entries]]
    page = page_of(tmp_path, kept)
    assert page.tags.count("svg") == len(CAPTIONS) - 3  # no second half, no tasks, no profile


@pytest.mark.usefixtures("_undrawn")
def test_a_damaged_journal_of_a_running_run(tmp_path: Path) -> None:
    lines = events()
    half = [line for line in lines if line.get("iter", 0) <= 3000 and line["event"] != "summary"]
    with open(write_journal(tmp_path, half), "ab") as stream:
        stream.write(b"\xff\x00\n" + json.dumps({"event": "iteration", "iter": "7", "loss": 1}).encode())
        stream.write(b'\n{"event":"iteration","iter":3050,"lo')
    assert command.main([str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "3 lines of the journal could not be read." in page.words
    assert "<b>running</b>" in page.text
    assert "of 6,000" in page.words
    assert "Training time" in page.words


ENDS = {
    "finished": ({}, True, "finished"),
    "asked to stop": ({"stopped": "asked to"}, None, "stopped"),
    "an error": ({"stopped": "E5: the loss is not finite"}, False, "stopped"),
}


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("how", ENDS)
def test_only_an_error_or_a_kill_is_red(how: str, tmp_path: Path) -> None:
    summary, good, word = ENDS[how]
    lines = events(600, 12)
    lines[-1] |= summary
    log = load(write_journal(tmp_path, lines))
    for running in (False, True):  # the summary decides, though the process may still be there
        verdict = sections(log, running)[0]
        assert (verdict.tiles[0].value, verdict.tiles[0].good) == (word, good)
        assert any("E5: the loss is not finite" in line for line in verdict.lines) == (how == "an error")
    log = load(write_journal(tmp_path, lines[:-1]))
    assert sections(log, running=True)[0].tiles[0].good is None
    killed = sections(log, running=False)[0]
    assert killed.tiles[0].good is False
    assert any("was killed" in line for line in killed.lines)
    live, dead = (Page(report.html(log, running)).text for running in (True, False))
    assert "<b>running</b>" in live
    assert '<b class="fail">stopped</b>' in dead


@pytest.mark.usefixtures("_undrawn")
def test_a_page_knows_whether_the_run_is_still_there(tmp_path: Path) -> None:
    """The lock decides at once; without it the age of the log does."""
    lines = events(600, 12)[:-1]
    older, newer = write_journal(tmp_path, lines, "run_20250102_030405"), write_journal(tmp_path, lines)

    def state(path: Path) -> str:
        return re.findall(r"<b[^>]*>(\w+)</b>", report.write_report(path, tmp_path / "p.html").read_text())[0]

    assert (state(older), state(newer)) == ("running", "running")
    with RunLock(tmp_path):
        assert (state(older), state(newer)) == ("stopped", "running")
        lock = (tmp_path / "run.lock").read_bytes()
        os.utime(newer, (0, 0))
        assert state(newer) == "running"  # one iteration may take very long
    os.utime(newer)  # just written, but nobody holds the lock
    assert (state(newer), is_locked(tmp_path)) == ("stopped", False)
    (tmp_path / "run.lock").write_bytes(lock)  # as a killed process leaves it
    assert (state(newer), is_locked(tmp_path)) == ("stopped", False)
    (tmp_path / "run.lock").unlink()
    assert is_locked(tmp_path) is None


def test_a_resumed_run_says_where(tmp_path: Path) -> None:
    lines = events()
    middle = [line for line in lines if line.get("iter", 0) > 3000 or line["event"] == "summary"]
    first = [line for line in lines if line.get("iter", 0) <= 4000 and line["event"] != "summary"]
    log = load(write_journal(tmp_path, [*first, {"event": "resume", "iter": 3000, "time": "2026"}, *middle]))
    assert "Resumed after iteration 3,000." in sections(log)[0].lines
    assert re.search(r"<text[^>]*>\s*resumed\s*</text>", draw("loss", log) or "")


def poisoned(value: Any, poison: Any) -> Any:
    """Returns the value with every text replaced, and every key that is not the name of a field."""
    if isinstance(value, dict):
        return {key: poisoned(item, poison) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    return poison if isinstance(value, str) or not isinstance(poison, str) else value


def hostile() -> list[dict[str, Any]]:
    """A whole run with hostile text in every place that takes text."""
    lines = []
    for line in events():
        event = line["event"]
        line = poisoned(line, EVIL) | {"event": event}
        for key in ("layer_norms", "component_norms", "update_ratios"):
            if "gradients" in line:
                line["gradients"][key] |= {EVIL: 1.0, "_" + EVIL: 2.0}
        for key in ("config", "startup_info", "waterfall", "parts_ms"):
            if key in line:
                line[key] |= {EVIL: 1.0 if key in ("waterfall", "parts_ms") else {EVIL: EVIL}}
        lines.append(line)
    return lines


@pytest.mark.slow
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    log = load(write_journal(tmp_path, hostile()))
    log["run_name"] = EVIL * 50
    page = Page(report.html(log))
    check_alone(page)
    assert page.tags.count("svg") == len(CAPTIONS)
    assert page.tags.count("title") == 1
    assert "<script>alert(1)</script>" in page.words
    assert len(max(page.text.splitlines(), key=len)) < 100_000


def test_a_formula_in_a_name_is_text(tmp_path: Path) -> None:
    lines = events()
    for line in lines:
        if line["event"] == "iteration":
            line["gradients"]["component_norms"] = {"$x^2$": 1.0 + line["iter"], "$\\oops": 1.0, "b": 2.0}
    chart = draw("components", load(write_journal(tmp_path, lines)))
    assert chart is not None
    assert re.search(r"<text[^>]*>\s*\$x\^2\$\s*</text>", chart)
    assert re.search(r"<text[^>]*>\s*\$\\oops\s*</text>", chart)


WRONG = [None, [], {}, -1, 0, True, 10**300, float("nan"), [None, "x"]]


@pytest.mark.parametrize("poison", WRONG, ids=lambda poison: f"{poison!r:.8}")
def test_values_of_a_wrong_kind_do_not_stop_it(poison: Any, tmp_path: Path) -> None:
    names = ("event", "iter")
    lines = []
    for line in events(600, 12):
        kept = {name: line[name] for name in names if name in line}
        lines += [{**poisoned(line, poison), **kept}, {**dict.fromkeys(line, poison), **kept}]
    check_alone(page_of(tmp_path, lines))


def test_iterations_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = write_journal(
        tmp_path, [*events(600, 12), {"event": "iteration", "iter": 10**30, "loss": 1.0, "time_ms": 1}]
    )
    assert load(path)["damaged_lines"] == 1
    assert [finite(x) for x in (True, "1", None, float("inf"), 10**400, 2)] == [None] * 5 + [2.0]


@pytest.mark.slow
def test_very_long_runs_and_texts_stay_small(tmp_path: Path) -> None:
    lines = events(60_000, 1500)
    lines += [{"event": "message", "level": "warning", "text": "x" * 10_000}] * 1000
    page = page_of(tmp_path, lines)
    assert len(page.text) < 1_500_000
    assert "The last 200 of 1,001 messages." in page.words


def test_names_of_layers_have_an_order() -> None:
    assert sorted(["10", "head", "2", "embedding"], key=layer_order) == ["embedding", "2", "10", "head"]


@pytest.mark.usefixtures("_undrawn")
def test_a_run_is_named_by_its_folder_journal_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = write_journal(tmp_path, events(600, 12), "run_20250102_030405")
    journal = write_journal(tmp_path, events(1200, 12))
    as_json = tmp_path / "run_20260102_030405.json"
    as_json.write_text(json.dumps(load(journal)))
    for name, last in ((tmp_path, "1,200"), (journal, "1,200"), (older, "600"), (as_json, "1,200")):
        out = tmp_path / "elsewhere.html"
        assert command.main([str(name), "--out", str(out)]) == 0
        assert f"<b>{last}</b>" in out.read_text()
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}"
    journal.unlink()
    older.unlink()
    assert report.write_report(tmp_path) == tmp_path / "report.html"


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no run_\*\.jsonl"):
        report.write_report(tmp_path)
    with pytest.raises(DataError, match="nowhere: found no such file, wanted the folder of a run"):
        report.write_report(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: found another file, wanted the folder of a run"):
        report.write_report(tmp_path / "notes.txt")
    wrong = tmp_path / "run_1.json"
    for content in ("{", "[]", "{}", '{"training_iterations": 1}', "[" * 100_000):
        wrong.write_text(content)
        with pytest.raises(DataError, match=r"cannot be read|not the log of a run"):
            report.write_report(wrong)
    journal = write_journal(tmp_path, [])
    with pytest.raises(ConfigError, match=r"wanted a name that ends in \.html"):
        report.write_report(journal, journal)


@pytest.mark.usefixtures("_undrawn")
def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write_journal(tmp_path, events(600, 12))
    out = report.write_report(tmp_path)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        report.write_report(journal)
    monkeypatch.undo()
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {journal.name, "report.html"}
    assert stat.S_ISREG(out.stat().st_mode)
    with pytest.raises(DiskError, match="cannot be written"):
        report.write_report(journal, journal / "a.html")  # under a file


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_one_clear_error(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_journal(tmp_path, events(600, 12))
    monkeypatch.setitem(sys.modules, package, None)
    if package == "jinja2":
        monkeypatch.setattr(report, "draw", lambda name, log: None)
    with pytest.raises(DeviceError, match=rf"needs {package}.*pip install 'gptperf\[report\]'"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_of_a_run(corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path, "--max_iters=6", "--eval_interval=3") == 0
    page = Page(report.write_report(tmp_path).read_text())
    check_alone(page)
    for title in ("Loss", "Learning rate", "Gradient norms", "Speed", "Memory", "What was built", "Configuration"):
        assert title in page.headings
    for words in ("finished", "no MFU without a GPU", "small.toml", "command line", "torch", "step-00000006"):
        assert words in page.words, words
    assert page.tags.count("svg") >= 5
    assert re.search(r"CPU \(\w+\), (1 thread|\d+ threads)</small>", page.text)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "lines"), [(1200, events), (390, events), (390, hostile)])
def test_in_a_browser(width: int, lines: Callable[[], list[dict[str, Any]]], tmp_path: Path) -> None:
    write_journal(tmp_path, lines())
    page = report.write_report(tmp_path)
    browser = Browser(tmp_path)
    try:
        browser.open(page, width)
        boxes = "[...document.querySelectorAll('svg')].map(e => { const b = e.getBoundingClientRect();"
        sizes = browser.evaluate(boxes + " return [b.width, b.height, e.querySelectorAll('text').length]; })")
        ends = browser.evaluate(boxes + " return b.right; })")
        tags = browser.evaluate("document.querySelectorAll('script, img, title').length")
        page_width = browser.evaluate("document.documentElement.scrollWidth")
    finally:
        browser.close()
    assert len(sizes) == len(CAPTIONS)
    assert all(min(size) > 5 for size in sizes), sizes
    assert tags == 1  # the title
    assert page_width <= width
    assert max(ends) <= width  # no chart is cut off
    assert browser.complaints() == []
    loaded = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert loaded == [page.as_uri()]
    assert browser.asked() == set()
    shown = [f"{w:.0f}x{h:.0f}" for w, h, _ in sizes]
    figures = f"{len(sizes)} figures {' '.join(shown)}"
    print(f"\n{width} px: {figures}; loaded {loaded}; asked the network for {browser.asked()}")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_browser_tells_of_what_a_page_asks_for(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><img src='http://there.invalid/x.png'><script>nothing()</script>")
    browser = Browser(tmp_path)
    try:
        browser.open(page, 500)
    finally:
        browser.close()
    assert browser.asked() == {"http://there.invalid/x.png"}
    complaints = "".join(browser.complaints())
    assert "nothing is not defined" in complaints
    assert "ERR_NAME_NOT_RESOLVED" in complaints
