"""The bench's report, cross-check and comparison, on invented results."""

import dataclasses
import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.measure import serial
from bench.measure.models import DEFAULT_VARIANT, resolve
from bench.report import charts, compare, crosscheck
from bench.report import write as report
from bench.report.metrics import metrics
from bench.results import Record
from gptperf import flops, hardware, plan
from gptperf.errors import ConfigError, DeviceError
from gptperf.hardware import peaks
from gptperf.hardware.ceilings import Spread
from gptperf.hardware.workload import workload
from gptperf.monitor.waterfall import PARTS

MODEL, VARIANT = "gpt2_124m", DEFAULT_VARIANT
MONITORED = {"unwatched": 494.0, "watched": 495.976, "watched_step_ms": 19.75}
HERE = {
    "device": "NVIDIA H200",
    "driver": "1.2",
    "memory_gb": 150.1,
    "versions": {"torch": "2"},
    "gpu_state": {"power_cap_w": 700.0, "sm_clock_mhz": 345.0},
    "source": {"commit": "c0ffee", "dirty": True, "digest": "d"},
}


def record(cell: str, found: dict[str, Any], **more: Any) -> Record:
    base = {"schema": results.SCHEMA, "cell": cell, "status": "done", "reason": None, "date": "2026-01-02T03:04:05"}
    shared = {"seconds": 1.0, "quick": False, "environment": HERE, "protocol": "By the clock.", "ops": None}
    return {**base, **shared, "config": None, "results": found, **more}


def step_record(tokens_s: float, variant: str = VARIANT, *, profile: bool = False) -> Record:
    config = resolve(MODEL, variant)
    ms = config.tokens_per_iter / tokens_s * 1e3
    counts = {name: float(flops.flops_per_token(config.model, name).training_per_token) for name in flops.CONVENTIONS}
    found: dict[str, Any] = {
        "model": MODEL,
        "variant": variant,
        "step_ms": ms,
        "p10_ms": 0.99 * ms,
        "p90_ms": 1.01 * ms,
        "tokens_per_sec": tokens_s,
        "mfu_percent": 100 * counts["strict"] * tokens_s / 989.4e12,
        "achieved_tflops": counts["strict"] * tokens_s / 1e12,
        "first_step_s": 20.0,
        "peak_memory_gb": 22.5,
        "joules_per_token": 0.0011,
        "no_joules": None,
        "conventions": {n: {"tflops": 1.0, "mfu_percent": c * tokens_s / 989.4e10} for n, c in counts.items()},
        "serial": {"fraction": 0.875},
    }
    if profile:
        lost = {**dict.fromkeys(PARTS, 0.0), "gemm": 30.0, "attention": 14.5, "host_gaps": 8.5}
        found["profile"] = {
            "profiled_step_ms": ms,
            "parts_ms": dict.fromkeys(PARTS, ms / len(PARTS)),
            "hidden_communication_ms": 0.25,
            "unknown_ms": {"<script>alert(1)</script>|": 0.5},
            "waterfall": lost,
            "mfu_percent": 47.0,
            "timed_mfu_percent": 46.5,
            "closes": True,
        }
    return record("", found, config=config.sections())


def op_row(impl: str, ms: float, op: str = "rms_norm") -> dict[str, Any]:
    time = {"ms": ms, "p10_ms": 0.995 * ms, "p90_ms": 1.005 * ms, "of_copy": 0.5 / ms, "gb_s": 4000 * 0.5 / ms}
    return {"op": op, "shape": [64, 128], "impl": impl, "forward": time, "backward": time}


def everything() -> dict[str, Record]:
    config = resolve(MODEL, VARIANT)
    spread = dataclasses.asdict(Spread(7e14, 6.9e14, 7.1e14))
    names = [work.name for work in workload(config.model, config.train.batch_size)]
    rates = {f"{name}_flop_s": 7e14 for name in ("gemm", "gemm_square", "attention_forward", "attention_backward")}
    reached = {**rates, "copy_byte_s": 4.2e12, "dtype": "bfloat16", "spreads": dict.fromkeys(names, spread)}
    errors = {"op": "rope", "shape": [2, 4], "dtype": "float32", "tensor": "dqkv", "eager_rms": 1e-7}
    host = {"op": "rope", "shape": [2, 4], "rows": 2, "impl": "triton"}
    times = {"us": 10.0, "low_us": 9.0, "high_us": 11.0}
    spreads = {name: {"ms": ms, "p10_ms": ms - 1, "p90_ms": ms + 1} for name, ms in MONITORED.items()}
    loader = {"dataset": "random", "dataset_gb": 0.1, "block_size": 8, "tokens_s": 1e8, "spread": 0.1}
    found = [
        record(f"ceilings/{MODEL}", reached, config=config.sections()),
        {**step_record(583_450.0), "cell": f"step/{MODEL}/{VARIANT}"},
        {**step_record(566_225.0, "compiled"), "cell": f"step/{MODEL}/compiled"},
        {**step_record(583_000.0, profile=True), "cell": f"waterfall/{MODEL}"},
        record("monitor/llama_1.36b", {"interval": 10, "cost_percent": 0.4, **spreads}),
        record("ops/rms_norm/64x128", {"rows": [op_row("copy", 0.5), op_row("triton", 0.52), op_row("liger", 0.7)]}),
        record("errors/rope", {"rows": [{**errors, "triton_rms": 9e-8, "ratio_rms": 0.9}], "where": "on the GPU"}),
        record("host/rope", {"rows": [{**host, "forward": times, "forward_backward": times}]}),
        record(
            "loader",
            {"rows": [{**loader, "windows_tokens_s": [9e7, 1e8, 1.1e8], "rss_before_mb": 1.0, "rss_after_mb": 1.0}]},
        ),
        record("micro/config", {"rows": [{"name": "config_resolve", "ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1}]}),
        record("step/llama_1.36b/eager", {}, status="failed", reason="OutOfMemoryError: <b>no</b> | room"),
    ]
    return {one["cell"]: one for one in found}


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page() -> Page:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    return Page(report.html(everything()))


def test_the_page_needs_nothing_beside_it(page: Page) -> None:
    assert not {"script", "link", "iframe", "img", "object", "embed", "image"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value is not None
            assert value.startswith("#"), (name, value)
    text = report.html(everything())
    assert not re.findall(r"url\((?!#)[^)]*\)", text)
    assert "@import" not in text
    assert "http:" not in text.replace("http-equiv", "")


def test_the_page_shows_every_part(page: Page) -> None:
    assert page.tags.count("svg") == 4  # waterfall, roofline, forward, backward
    for words in ("583,450", "Cross-check", "B200", "V100 SXM2 32 GB", "c0ffee with changes", "By the clock.", "87.5%"):
        assert words in page.words, words
    for words in ("+0.40% of a step", "every 10th watched", "495.98", "18.75 to 20.75"):
        assert words in page.words, words
    assert "OutOfMemoryError: <b>no</b> | room" in page.words  # as text,
    assert "b" not in page.tags  # and not as a tag
    assert "<script>alert(1)</script>|" in page.words


def test_charts_take_the_colour_of_the_page() -> None:
    pytest.importorskip("matplotlib")
    svg = charts.draw(f"waterfall:waterfall/{MODEL}", everything())
    assert svg is not None
    assert "currentColor" in svg
    assert "#123456" not in svg
    assert ">0.0<" in svg
    assert "-0.0" not in svg
    assert charts.draw("roofline", {}) is None
    assert charts.draw("of_copy:forward", {}) is None
    with pytest.raises(ValueError, match="chart: found 'pie'"):
        charts.draw("pie", {})


def test_the_roofline_places_ops_and_products() -> None:
    points = {label: (kind, x, y) for label, kind, x, y in charts.roofline_points(everything())}
    kind, intensity, rate = points["rms_norm 64x128"]
    moved = 4000 * 0.5 / 0.52 * 0.52e6
    assert kind == "ops"
    assert intensity == pytest.approx(4 * 64 * 128 / moved)
    assert rate == pytest.approx(4 * 64 * 128 / 0.52e-3)
    kind, intensity, rate = points[f"{MODEL} lm_head_forward"]
    m, n, k = 64 * 1024, 50304, 768
    assert (kind, rate) == ("GEMMs", 7e14)
    assert intensity == pytest.approx(m * n * k / (m * k + k * n + m * n))


def test_markdown_has_the_same_tables_and_no_markup_of_others() -> None:
    text = report.markdown(everything())
    assert f"| gpt2_124m | {VARIANT} |" in text
    assert "OutOfMemoryError: &lt;b>no&lt;/b> \\| room" in text
    assert "<script>" not in text
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| gpt2_124m | comp")
    }
    assert widths == {12, 10}  # steps and conventions: every row has its columns


def test_without_a_gpu_there_is_no_mfu(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    there = {"environment": {"device": "cpu", "versions": {}}}
    results.write(tmp_path, {**everything()["loader"], **there})
    _, path = report.write_reports(tmp_path)
    for text in (path.read_text(), (tmp_path / "report.md").read_text()):
        assert "no GPU" in text
        assert "%" in text  # of the loader's spread
        assert "MFU is" not in text
        assert "TFLOP" not in text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_one_clear_error(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setitem(sys.modules, package, None)
    results.write(tmp_path, everything()["ops/rms_norm/64x128"])
    with pytest.raises(DeviceError, match=rf"needs {package}.*pip install 'gptperf\[report\]'"):
        report.write_reports(tmp_path)
    assert (tmp_path / "report.md").exists()  # that one needs neither
    assert not (tmp_path / "report.html").exists()


def predicted() -> float:
    gpu = hardware.match_gpu("NVIDIA H200")
    assert gpu is not None
    return plan.plan(resolve(MODEL, VARIANT), gpu).tokens_per_sec


@pytest.mark.parametrize(
    ("share", "verdict"), [(1.0, "PASS"), (0.91, "PASS"), (1.09, "PASS"), (0.89, "FAIL"), (1.11, "FAIL")]
)
def test_the_verdict_is_that_of_the_band(share: float, verdict: str) -> None:
    one = {**step_record(share * predicted()), "cell": f"step/{MODEL}/{VARIANT}"}
    found = crosscheck.check(one["cell"], one, crosscheck.gpu_of(one))
    assert found.ratio == pytest.approx(share)
    assert f": {verdict}:" in crosscheck.verdict_line([found])
    text = report.markdown({one["cell"]: one})
    assert f"cross-check: {verdict}" in text


def test_half_the_peak_in_the_table_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {**step_record(predicted()), "cell": f"step/{MODEL}/{VARIANT}"}
    records = {one["cell"]: one}
    assert "cross-check: PASS" in report.markdown(records)
    rows = {
        words: dataclasses.replace(gpu, dense_tflops={k: v / 2 for k, v in gpu.dense_tflops.items()})
        for words, gpu in peaks._ROWS.items()
    }
    monkeypatch.setattr(peaks, "_ROWS", rows)
    assert "cross-check: FAIL" in report.markdown(records)


def test_the_verdict_is_of_what_a_run_does() -> None:
    slow = {**step_record(0.3 * predicted(), "eager"), "cell": f"step/{MODEL}/eager"}
    checks = [crosscheck.check(slow["cell"], slow, crosscheck.gpu_of(slow))]
    assert crosscheck.verdict_line(checks) == f"cross-check: none, no step of {VARIANT} was measured"
    unknown = {**step_record(1e5), "cell": f"waterfall/{MODEL}", "environment": {**HERE, "device": "NVIDIA GB10"}}
    check = crosscheck.check(unknown["cell"], unknown, crosscheck.gpu_of(unknown))
    assert (check.ratio, check.passed) == (None, False)
    assert "not in the table" in crosscheck.verdict_line([check])


def test_a_waterfall_stands_in_for_a_step_that_was_not_measured() -> None:
    records = everything()
    assert f"waterfall/{MODEL}" not in crosscheck.measured_steps(records)
    del records[f"step/{MODEL}/{VARIANT}"]
    assert f"waterfall/{MODEL}" in crosscheck.measured_steps(records)


def test_forecasts_are_in_the_order_of_the_peaks() -> None:
    found = {one.gpu: one for one in crosscheck.forecasts(resolve("llama_1.36b", VARIANT))}
    assert list(found) == list(crosscheck.OTHERS)
    speeds = [one.tokens_s for one in found.values()]
    assert speeds == sorted(speeds, reverse=True)
    assert found["V100 SXM2 32 GB"].dtype == "float16"
    assert not found["V100 SXM2 32 GB"].fits
    assert found["B200"].fits


def moved(factor: float, *, wide: float = 1.0, impl: str = "triton") -> dict[str, Record]:
    rows = [op_row("triton", 0.5), op_row("liger", 0.7)]
    for row in rows:
        if row["impl"] == impl:
            row["forward"] = {k: v * factor if k.endswith("ms") else v for k, v in row["forward"].items()}
            row["forward"]["p10_ms"] /= wide
            row["forward"]["p90_ms"] *= wide
    return {"ops/rms_norm/64x128": record("ops/rms_norm/64x128", {"rows": rows})}


@pytest.mark.parametrize(
    ("factor", "wide", "verdict"),
    [
        (1.0, 1.0, "same"),
        (1.015, 1.0, "same"),  # apart, but under the threshold
        (1.05, 1.0, "slower"),
        (1.05, 1.06, "same"),  # within the noise
        (0.95, 1.0, "faster"),
    ],
)
def test_a_change_is_more_than_threshold_and_noise(factor: float, wide: float, verdict: str) -> None:
    found = compare.compare(moved(1.0), moved(factor, wide=wide))
    verdicts = {change.after.name: change.verdict for change in found.changes}
    assert verdicts.pop("triton forward") == verdict
    assert set(verdicts.values()) == {"same"}
    assert found.exit_code == (verdict == "slower")


def test_a_rival_that_got_slower_is_shown_and_fails_nothing() -> None:
    found = compare.compare(moved(1.0), moved(1.5, impl="liger"))
    assert [c.after.name for c in found.changes if c.verdict == "slower"] == ["liger forward"]
    assert found.exit_code == 0


def test_more_tokens_a_second_are_better() -> None:
    before, after = everything(), everything()
    row = after["loader"]["results"]["rows"][0]
    row |= {"tokens_s": 5e7, "windows_tokens_s": [4.9e7, 5e7, 5.1e7]}
    found = compare.compare(before, after)
    assert [(c.cell, c.factor) for c in found.worse] == [("loader", 2.0)]
    assert compare.compare(after, before).worse == []


def test_memory_counts_and_one_number_without_noise_has_a_wider_threshold() -> None:
    before, after = everything(), everything()
    after[f"step/{MODEL}/{VARIANT}"]["results"] |= {"peak_memory_gb": 23.5, "joules_per_token": 0.00117}
    found = compare.compare(before, after)
    assert [c.after.name for c in found.worse] == ["peak memory"]
    after[f"step/{MODEL}/{VARIANT}"]["results"]["joules_per_token"] = 0.00130
    moved_too = [c.after.name for c in compare.compare(before, after).changes if c.verdict == "slower"]
    assert sorted(moved_too) == ["energy", "peak memory"]


def test_a_cell_that_broke_is_worse_and_machines_are_compared() -> None:
    before, after = everything(), everything()
    cell = f"step/{MODEL}/{VARIANT}"
    after[cell] |= {"status": "failed", "reason": "no answer"}
    after["loader"]["environment"] = {**HERE, "device": "NVIDIA H100", "driver": "9.9"}
    del after["micro/config"]
    found = compare.compare(before, after)
    assert found.broken == [f"{cell}: no answer"]
    assert found.exit_code == 1
    assert found.notes == [
        "different GPU: NVIDIA H200 and NVIDIA H100",
        "different driver: 1.2 and 9.9",
    ]
    assert found.missing == ["micro/config (not in B)"]


def test_the_command_exits_by_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("a", 1.0), ("b", 1.1)):
        for one in moved(factor).values():
            results.write(tmp_path / name, one)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert compare.main([a, b]) == 1
    assert re.search(r"slower +\+10\.0%  ops/rms_norm/64x128 triton forward", capsys.readouterr().out)
    assert compare.main([b, a]) == 0
    assert "faster" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"threshold: found 0\.01, wanted at least 0\.02"):
        compare.main([a, b, "--threshold", "0.01"])
    results.write(tmp_path / "c", everything()["loader"])
    with pytest.raises(ConfigError, match="no cell in common"):
        compare.main([a, str(tmp_path / "c")])


def test_every_kind_of_cell_has_figures_to_compare() -> None:
    records = json.loads(json.dumps(everything()))
    for cell, one in records.items():
        assert bool(metrics(one)) is (one["status"] == "done"), cell


def test_the_fraction_of_the_roofline_is_of_its_parts() -> None:
    rates = {"gemm_flop_s": 7e14, "attention_forward_flop_s": 6e14, "attention_backward_flop_s": 4e14}
    parts = serial.serial_ms(resolve(MODEL, VARIANT), {**rates, "copy_byte_s": 4e12})
    assert set(parts) == {"gemm", "attention", "memory_bound", "optimizer"}
    assert all(ms > 0 for ms in parts.values())
