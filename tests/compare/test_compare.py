"""Comparisons of architectures and of runs."""

import json
import os
import re
import sys
import xml.dom.minidom
from pathlib import Path
from random import Random
from typing import Any

import pytest
from golden import PARAMETERS

from gptperf import plan
from gptperf.compare import __main__ as compare
from gptperf.compare import architectures, curves, page, ranking
from gptperf.config import command_line
from gptperf.errors import ConfigError, DataError, DeviceError
from gptperf.formats import one_line
from gptperf.monitor.journal import Journal, assemble, write_json
from gptperf.monitor.runs import read_runs
from gptperf.report import figures, tables

PEAK = {"hardware_peak_tflops": 989.4, "peak_dtype": "bfloat16", "peak_basis": "dense"}
FILES = [f"configs/{name}.toml" for name in ("gpt2_124m", "llama_124m", "llama_1.36b")]


def test_counts_are_the_golden_ones() -> None:
    facts = architectures.compare(FILES, plan.find_gpu("H200"))
    for name in facts:
        assert facts[name]["parameters, total"] == PARAMETERS[name]
    strict = "GFLOP per token, strict"
    assert facts["gpt2_124m"][strict] == facts["llama_124m"][strict] == 0.798087168
    assert facts["llama_124m"]["activation"] == "silu"


def test_what_differs_is_in_columns_and_the_rest_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--configs", *FILES[:2]]) == 0
    text, _, shared = capsys.readouterr().out.partition("the same in all: ")
    assert "normalization" in text
    assert "layernorm_nobias" in text
    assert "n_layer 12" in shared
    assert "n_layer" not in text
    widths = {len(line) for line in text.strip("\n").splitlines()}
    assert len(widths) == 1, "columns are ragged"


def test_every_configuration_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, Path("configs").glob("*.toml")))
    assert compare.main(["--configs", *files, "--gpu=B200", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts) == len(files)
    assert all(of["B200: tokens/s"] > 0 for of in facts.values())


def test_two_files_of_one_name(tmp_path: Path) -> None:
    copy = tmp_path / "gpt2_124m.toml"
    copy.write_text(Path(FILES[0]).read_text())
    with pytest.raises(ConfigError, match="two files named gpt2_124m"):
        architectures.compare([FILES[0], str(copy)], plan.find_gpu("H200"))


def write_run(
    folder: Path, losses: dict[int, float], *, flags: tuple[str, ...] = (), end: bool = True, **keys: Any
) -> Path:
    """A log with an evaluation at each iteration of `losses`, and training losses 0.1 below them.

    Args:
        keys: `evals` turns the evaluations off, `name` names the journal, `per_iter` the tokens, `tasks` the
            scores of tasks by iteration.
    """
    config = command_line.resolve([FILES[0], *flags]).config
    per_iter = keys.get("per_iter", 1000)
    with Journal(folder, keys.get("name", "run_20260102_030405")) as journal:
        info = {"tokens_per_iter": per_iter, "device": "NVIDIA H200", "num_gpus": 1}
        journal.write("start", {"config": config.sections() | {"origins": {}}, "startup_info": info})
        for step, loss in losses.items():
            first = step == min(losses)
            mfu = {"mfu_percent": 40.0, "tokens_per_sec": 5e5, "convention": "strict"} | PEAK
            fields = {"loss": loss - 0.1, "time_ms": 9e9 if first else 2.0, "tokens": step * per_iter}
            fields |= {"mfu": {} if first else mfu, "memory": {"peak_gb": 28.5}, "gradients": {"global_norm": 0.5}}
            journal.write("iteration", {"iter": step, **fields})
            if keys.get("evals", True):
                journal.write("eval", {"iter": step, "val_loss": loss} | keys.get("tasks", {}).get(step, {}))
        if end:
            journal.write("summary", {"iterations": max(losses), "wall_time_s": 100.0})
    return journal.path


def test_an_mfu_is_shown_with_its_scale(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {1: 4.0, 300: 2.0})
    write_run(tmp_path / "b", {1: 4.0, 300: 2.1})
    found = ranked(tmp_path / "a", tmp_path / "b")
    scale = "strict, of 989.4 TFLOP/s bf16 dense"
    assert page.text(found).count(scale) == 1
    assert page.html(found).count(scale) > 1  # below the table and above the chart
    for log in (tmp_path / "b").glob("*.jsonl"):
        log.write_text(log.read_text().replace("989.4", "800"))
    text = page.text(ranked(tmp_path / "a", tmp_path / "b"))
    assert f"40.0% {scale}" in text
    assert "40.0% strict, of 800.0 TFLOP/s bf16 dense" in text
    predicted = architectures.table(architectures.compare([FILES[0]], plan.find_gpu("H200")))
    assert scale in predicted


def ranked(*paths: Path) -> ranking.Ranking:
    return ranking.rank(*read_runs(paths))


def test_runs_are_ranked_at_equal_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "long", {100: 4.0, 200: 3.0, 300: 2.0})
    write_run(tmp_path / "short", {100: 3.5, 250: 2.6}, flags=("--position_encoding=rope", "--n_head=6"))
    found = ranked(tmp_path / "long", tmp_path / "short")
    assert (found.measure, found.tokens) == ("validation loss", 250_000)
    assert "short goes no further" in found.how
    assert [run.name for run in found.runs] == ["long", "short"]  # though 2.6 is the lesser loss of the two at the end
    assert found.losses == pytest.approx((2.5, 2.6))
    assert found.differing == {"n_head": [12, 6], "position_encoding": ["learned_absolute", "rope"]}
    run = found.runs[0]
    assert (run.state, run.iterations, run.mfu_percent, run.mfu_scale) == (
        "finished",
        300,
        40.0,
        "strict, of 989.4 TFLOP/s bf16 dense",
    )
    assert (run.tokens_per_sec, run.peak_gb, run.wall_s) == (5e5, 28.5, 100.0)
    assert run.train_s == pytest.approx(0.6)  # the first entry's compilation is left out


def test_speed_and_peak_are_those_of_the_whole_run(tmp_path: Path) -> None:
    """As many tokens at each of two speeds: the mean is harmonic. A process that resumes starts with another peak."""
    with Journal(tmp_path / "run", "run_20260102_030405") as journal:
        journal.write("start", {"config": {"origins": {}}, "startup_info": {"tokens_per_iter": 1000}})
        for step, mfu, peak_gb in (
            (1, {}, 20.0),
            (2, {"tokens_per_sec": 1e5}, 30.0),
            (3, {"tokens_per_sec": 3e5}, 28.0),
        ):
            memory = {"peak_gb": peak_gb}
            journal.write("iteration", {"iter": step, "loss": 3.0, "time_ms": 1.0, "mfu": mfu, "memory": memory})
    ((run,), _) = read_runs([tmp_path / "run"])
    assert run.tokens_per_sec == pytest.approx(2 / (1 / 1e5 + 1 / 3e5))
    assert run.peak_gb == 30.0


def test_the_best_loss_of_a_run_is_its_lowest(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {100: 3.0, 200: 2.0, 300: 2.5})
    (row,) = ranking.record(ranked(tmp_path / "run"), [])["runs"]
    assert (row["best_val_loss"], row["last_val_loss"], row["loss"]) == (2.0, 2.5, 2.5)


def test_scores_of_tasks_are_those_of_the_last_evaluation_that_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {step: {"tasks": {"arc": {"acc": acc, "acc_stderr": 0.0125}}} for step, acc in ((1, 0.25), (2, 0.375))}
    scores[2]["tasks"] |= {"bad": {"acc": "x"}, "worse": 3}  # type: ignore[dict-item]
    runs = [write_run(tmp_path / "a", {1: 4.0, 2: 3.0, 3: 2.0}, tasks=scores), write_run(tmp_path / "b", {1: 4.0})]
    ranking_of = ranked(*runs)
    table = page.tasks_table(ranking_of)
    assert table is not None
    assert sorted(map(tuple, table.rows)) == [("a", "2", "0.3750 +- 0.0125", "-", "-"), ("b", "-", "-", "-", "-")]
    rows = {row["name"]: row for row in ranking.record(ranking_of, [])["runs"]}
    assert rows["a"]["tasks"]["arc"] == {"acc": 0.375, "acc_stderr": 0.0125}
    assert rows["b"]["tasks"] == {}
    assert compare.main([*map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    assert "0.3750 +- 0.0125" in capsys.readouterr().out
    assert "0.3750 +- 0.0125" in (tmp_path / "page.html").read_text()
    assert page.tasks_table(ranked(runs[1])) is None


def test_without_evaluations_the_training_loss_ranks(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {step: 4 - step / 100 for step in range(10, 210, 10)}, evals=False)
    write_run(tmp_path / "b", {100: 3.5, 200: 3.0})
    found = ranked(tmp_path / "a", tmp_path / "b")
    assert (found.measure, found.tokens) == ("training loss", 200_000)
    assert "no evaluation in a" in found.how
    assert dict(zip([r.name for r in found.runs], found.losses, strict=True)) == {
        "a": pytest.approx((1.9 + 2.0) / 2),  # of the last tenth: iterations 190 and 200
        "b": pytest.approx(2.9),
    }
    write_run(tmp_path / "c", {100: 3.6, 150: 3.2}, evals=False)
    found = ranked(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert found.tokens == 150_000
    assert dict(zip([r.name for r in found.runs], found.losses, strict=True))["a"] == pytest.approx((2.5 + 2.4) / 2)
    write_run(tmp_path / "late", {500: 2.0})
    assert "do not overlap" in ranked(tmp_path / "b", tmp_path / "late").how


def test_damaged_and_running_logs_are_read_as_far_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_run(tmp_path / "whole", {1: 4.0, 100: 3.0})
    torn = write_run(tmp_path / "torn", {1: 4.0, 100: 3.1, 200: 2.0}, end=False)
    torn.write_bytes(torn.read_bytes()[:-20])
    old = write_run(tmp_path / "old", {1: 4.0, 100: 3.2}, end=False)
    os.utime(old, (0, 0))
    write_run(tmp_path / "new", {}, end=False)
    broken = tmp_path / "run_20260101_000000.json"
    broken.write_text('{"summary":')
    odd = tmp_path / "run_20260101_000001.json"
    odd.write_text('{"config": [1], "training_iterations": [3, {"iter": "x"}, {"iter": 1, "loss": "low"}]}')
    (tmp_path / "empty").mkdir()
    paths = [whole, torn.parent, old, tmp_path / "new", broken, odd, tmp_path / "empty", tmp_path / "nothing"]
    assert compare.main([*map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    runs = {Path(run["name"]).name: run for run in found["runs"]}
    assert found["tokens"] == 100_000
    assert {name: run["state"] for name, run in runs.items()} == {
        "whole": "finished",
        "torn": "running",
        "old": "stopped",
        "new": "running",
        odd.stem: "running",
    }
    assert (runs["torn"]["iterations"], runs["torn"]["damaged_lines"], runs["torn"]["loss"]) == (200, 1, 3.1)
    remarks = "\n".join(found["remarks"])
    for line in ("torn: 1 damaged line left out", "old: stopped, read up to iteration 100", "new: no loss logged yet"):
        assert line in remarks
    assert [Path(one["path"]).name for one in found["left_out"]] == ["empty", "nothing", broken.name]
    with pytest.raises(DataError, match="found no run"):
        compare.main([str(broken), str(tmp_path / "empty")])


def test_a_run_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", {1: 4.0})
    write_json(path)
    runs, left_out = read_runs([path.with_suffix(".json"), path, path.parent])
    assert ([run.path.suffix for run in runs], left_out) == ([".jsonl"], [])
    other = write_run(tmp_path / "a", {1: 4.0}, name="run_20260102_030406")
    assert [run.name for run in read_runs([path, other])[0]] == [path.stem, other.stem]


HOSTILE = 'x$_{1}$<img src=x onerror=alert(1)>&"\x1b[31m\u2028'


def test_the_page_stands_alone_and_escapes_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {step: 3 + 5 / step for step in range(10, 5000, 10)}
    write_run(tmp_path / HOSTILE, losses, flags=(f"--dataset={HOSTILE[:30]}",))
    write_run(tmp_path / "b", losses, evals=False)
    page_path = tmp_path / "page.html"
    assert compare.main([str(tmp_path / HOSTILE), str(tmp_path / "b"), "--html", str(page_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "dataset differs" in printed
    text = page_path.read_text()
    assert text.count("<svg") > 4
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)""", text)
    assert not re.findall(r"https?:|<script|@import|url\((?!#)", text)
    ids = re.findall(r'<clipPath id="(\w+)"', text)
    assert len(ids) == len(set(ids))
    assert len(text) < 600_000
    charts = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(charts) == 6
    for svg in charts:
        xml.dom.minidom.parseString(svg)


def test_text_in_a_chart_is_escaped_and_no_formula() -> None:
    figure, axes = figures.pyplot().subplots()
    axes.set_yticks([0], [one_line(HOSTILE)])
    text = figures.svg(figure, "hostile")
    assert "<img" not in text
    assert "x$_{1}$&lt;img src=x" in text
    xml.dom.minidom.parseString(text)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_page_names_the_package_that_it_lacks(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", {1: 4.0, 2: 3.0})
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DeviceError, match=rf"{package}.*pip install 'gptperf\[report\]'"):
        compare.main([str(tmp_path / "a"), "--html", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_runs_and_configurations_do_not_mix(tmp_path: Path) -> None:
    for argv in ([], ["out", "--configs", *FILES], [str(tmp_path), "--gpu=H200"], ["--configs", *FILES, "--html=x"]):
        with pytest.raises(ConfigError, match=r"wanted runs|goes with"):
            compare.main(argv)


def test_limits_show_what_comes_after_the_early_fall() -> None:
    points = [(float(x), 10.0 if x < 5 else 3.0 - x / 1000) for x in range(1, 1000)]
    xs, ys, low, high = curves.thinned(points, 100)
    assert len(xs) == 100
    assert (low <= ys).all()
    assert (ys <= high).all()
    assert (low.min(), high.max()) == (min(y for _, y in points), max(y for _, y in points))
    ends = curves.limits([(xs, ys)])
    assert ends is not None
    assert ends[1] < 3.2


def test_a_log_of_whatever_types_is_read(tmp_path: Path) -> None:
    random = Random(0)
    junk = [None, True, -1, 0, 1e308, 10**400, "x", [], {}, {"a": 1}, "\ud800", 2**60]

    def spoilt(value: Any, share: float) -> Any:
        if random.random() < share:
            return random.choice(junk)
        if isinstance(value, dict):
            return {key: spoilt(item, share) for key, item in value.items()}
        return [spoilt(item, share) for item in value] if isinstance(value, list) else value

    good = write_run(tmp_path / "good", {step: 3 + 5 / step for step in range(1, 20)})
    log = assemble(good)
    path = tmp_path / "run_20260101_000000.json"
    for share in [0.01, 0.05, 0.2] * 20:
        path.write_text(json.dumps(spoilt(log, share)))
        runs, left_out = read_runs([good, path])
        assert len(runs) + len(left_out) == 2
        found = ranking.rank(runs, left_out)
        json.dumps(ranking.record(found, left_out), allow_nan=False)
        tables.aligned(page.ranking_table(found)).encode()
