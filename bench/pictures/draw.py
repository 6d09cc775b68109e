"""Draws the pictures of the README and the guide, each from the log of a run or from figures that were measured.

A chart has no background, and its text has a grey that is readable on a light and on a dark page. Each picture but the
first says which run it is of.
"""

import io
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure.models import DEFAULT_VARIANT, resolve
from gptperf.errors import DataError, DeviceError
from gptperf.formats import counted
from gptperf.hardware import GPUS, peak_flop_s
from gptperf.monitor.live import Panel
from gptperf.monitor.run_log import find_log, finite, load
from gptperf.monitor.runs import read_run
from gptperf.monitor.waterfall import PARTS, Breakdown, step_flops, waterfall
from gptperf.report import figures
from gptperf.report.figures import BLUE, GRAY, ORANGE, pyplot, required, svg
from gptperf.report.run_page import html

__all__ = ["ablation", "live_panel", "loss_curve", "report_page", "step_waterfall"]

_TEXT = "#8b949e"
_SMOOTHED = 15
_PANEL_AT = 0.6
"""Share of the run at which the panel is drawn."""
_PANEL = 68
"""Columns of the panel's terminal: few, so that a phone shows letters that can be read."""
_PAGE = 1280, 940
"""Size in pixels of the part of a page that its picture shows."""
_MEASURED = {
    "gemm": "GEMM above",
    "attention": "attention likewise",
    "memory_bound": "memory-bound",
    "optimizer": "optimizer",
    "host_gaps": "nothing runs",
}
"""Part of a step -> how its row begins in the table of bench/NOTES.md."""


def _alone(figure: Any, name: str) -> str:
    """Returns a figure as a file: with a size, and with a text colour of its own."""
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return svg(figure, name).replace("currentColor", _TEXT).replace("<svg", f"<svg {size}", 1) + "\n"


def _day(log: Path) -> str:
    """Returns the day of a log, whose name is run_YYYYmmdd_HHMMSS."""
    day = log.stem.split("_")[1]
    return f"{day[:4]}-{day[4:6]}-{day[6:]}"


def loss_curve(run: Path) -> str:
    """Draws training and validation loss over the tokens of a run, and returns the SVG.

    Args:
        run: Folder of the run, or its log.

    Raises:
        DataError: There is no log.
        DeviceError: matplotlib is not installed.
    """
    logged = read_run(find_log(run), run.name)
    figure, axes = pyplot().subplots(figsize=(7.2, 3.0), layout="constrained")
    tokens, losses = zip(*[(s.tokens / 1e6, s.loss) for s in logged.steps if s.loss is not None], strict=True)
    means = [statistics.fmean(losses[max(0, i - _SMOOTHED + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(tokens, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, means, color=BLUE, label=f"training, mean of {_SMOOTHED} log lines")
    evals = [(e.tokens / 1e6, e.loss) for e in logged.evals]
    axes.plot(
        *zip(*evals, strict=True), color=ORANGE, marker="o", markersize=4, label=f"validation: {evals[-1][1]:.3f}"
    )
    trigram = finite(logged.summary.get("trigram_loss"))
    if trigram is not None:
        axes.axhline(trigram, color=GRAY, linewidth=1, linestyle=":", label=f"trigram model: {trigram:.3f}")
    axes.legend(loc="upper right")
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(1.0, 3.2)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per byte")
    return _alone(figure, "loss_curve")


def live_panel(run: Path) -> str:
    """Draws the panel of a terminal as it was when part of a run was done, and returns the SVG.

    Args:
        run: Folder of the run, or its log.

    Raises:
        DataError: There is no log.
    """
    log = load(find_log(run))
    most, info = log["config"]["train"]["max_iters"], log["startup_info"]
    panel = Panel(most)
    panel.closed = True  # no empty line below
    panel.planned_gb = (info.get("plan") or {}).get("memory_gb")
    for evaluation in log["eval_steps"]:
        if evaluation["iter"] <= _PANEL_AT * most:
            panel.evaluated(evaluation)
    for checkpoint in log["checkpoints"]:
        if checkpoint["iter"] <= _PANEL_AT * most:
            panel.checkpoint(checkpoint)
    for entry in log["training_iterations"]:
        if entry["iter"] <= _PANEL_AT * most:
            panel.iteration(entry, (most - entry["iter"]) * entry["time_ms"] / 1e3)
    console = Console(record=True, width=_PANEL, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(panel)
    title = f"{info['total_parameters']:,} parameters, {info['device']}, {log['start_time'][:10]}"
    text = console.export_svg(title=title, unique_id="panel")
    text = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)  # no font from a server
    return text.replace("<svg", '<svg width="680"', 1) + "\n"


def report_page(run: Path) -> bytes:
    """Draws the upper part of the page of a run with Chromium, and returns the PNG.

    Args:
        run: Folder of the run, or its log.

    Raises:
        DataError: There is no log.
        DeviceError: Chromium, jinja2, matplotlib or Pillow is not installed.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise DeviceError("the picture of a page needs Chromium, which is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "page.html"), Path(folder, "page.png")
        page.write_text(html(load(find_log(run))))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={_PAGE[0]},{_PAGE[1]}"]
        command += [f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image, out = required("PIL.Image").open(picture), io.BytesIO()
        image.convert("RGB").quantize(256).save(out, "PNG", optimize=True)
    return out.getvalue()


def step_waterfall(notes: Path) -> str:
    """Draws where the step of llama_1.36b went that was measured on one H200, and returns the SVG.

    Args:
        notes: The notes with the table of the step's parts.

    Raises:
        DataError: The notes have no such table.
        DeviceError: matplotlib is not installed.
    """
    section = notes.read_text().partition("## Where a step goes")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE))
    found = {part: next((cell for row, cell in rows.items() if row.startswith(s)), "") for part, s in _MEASURED.items()}
    spent = {part: float(ms[1]) for part, cell in found.items() if (ms := re.search(r"\(([\d.]+)", cell))}
    timed = re.search(r"; ([\d.]+)", rows.get("MFU left; without a profiler", ""))
    measured = re.match(r"\s*(.*?\d{4}-\d\d-\d\d)", section)
    if spent.keys() != _MEASURED.keys() or timed is None or measured is None:
        raise DataError(f"{notes}: found no table of a step's parts, wanted the section 'Where a step goes'")
    peak = peak_flop_s(next(gpu for gpu in GPUS if gpu.name == "H200"), "bfloat16")
    assert peak is not None
    parts = dict.fromkeys(PARTS, 0.0) | spent
    broken_down = Breakdown(sum(parts.values()), parts, hidden_communication_ms=0.0, unknown_ms={})
    fall = waterfall(broken_down, step_flops(resolve("llama_1.36b", DEFAULT_VARIANT)), peak.flop_s, 1.0)
    title = f"llama_1.36b, {broken_down.step_ms:.0f} ms per step of 16 x 2048 tokens\n"
    title += f"{measured[1]}; dotted: without a profiler"
    figure = figures.waterfall(title, {part: fall.lost_points[part] for part in spent}, float(timed[1]))
    return _alone(figure, "step_waterfall")


def ablation(folder: Path) -> str:
    """Draws the differences of an ablation, and returns the SVG.

    Args:
        folder: Folder that `gptperf.ablate` wrote.

    Raises:
        DataError: The folder has no result, or no log of the baseline.
        DeviceError: matplotlib is not installed.
    """
    try:
        baseline, *others = json.loads((folder / "ablation.json").read_text())["variants"]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read, wanted the folder of an ablation: {error}") from error
    others = [other for other in others if other["difference"] is not None]
    of = read_run(find_log(folder / "baseline" / f"seed{baseline['runs'][0]['seed']}"), "baseline")
    figure, axes = pyplot().subplots(figsize=(7.2, 1.2 + 0.4 * len(others)), layout="constrained")
    for place, other in enumerate(others):
        paired = other["difference"]
        half = paired["interval"] or 0.0  # None with one seed
        ends = [paired["mean"] - half, paired["mean"] + half]
        axes.plot(ends, [place, place], color=BLUE, linewidth=4, alpha=0.35, solid_capstyle="butt")
        axes.plot(list(paired["by_seed"].values()), [place] * len(paired["by_seed"]), "o", color=BLUE, markersize=3)
        axes.plot([paired["mean"]], [place], "D", color=BLUE, markersize=7)
        text, right = f"{paired['mean']:+.3f}, {paired['verdict']}", max(ends[1], *paired["by_seed"].values())
        axes.annotate(text, (right, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(0, color=GRAY, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(others)), [other["name"] for other in others])
    axes.set_ylim(len(others) - 0.5, -0.7)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.35 * (high - low))  # room for the verdicts
    axes.set_xlabel("difference of the final validation loss, nats per token; left is better")
    title = f"baseline {baseline['mean_val_loss']:.3f}, {baseline['parameters']:,} parameters, "
    title += f"{baseline['tokens']:,} tokens per run, {of.info.get('device')}, {_day(of.path)}\n"
    title += f"dots: {counted(len(baseline['runs']), 'seed')}, diamond: mean, bar: 95% interval"
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    return _alone(figure, "ablation")
