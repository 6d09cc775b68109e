"""Turns a run's log into the sections of its page; data that the log does not have gets no section."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptperf import formats
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import finite, gaps, mapping, series, value_at
from gptperf.report.cells import CELL, ROWS, figure, text
from gptperf.report.evaluations import evaluations, tasks
from gptperf.report.page import Section, Tile, clean
from gptperf.report.tables import Table, words

__all__ = ["sections", "state"]

_CONFIG_ROWS = 400
"""Largest number of rows in tables of keys."""
_SPEED = ("mfu_percent", "hfu_percent", "of_ceiling_percent", "achieved_tflops", "tokens_per_sec")


def state(log: RunLog, running: bool = False) -> Tile:
    """Returns the state of a run: green if it is finished, red if an error or a kill ended it.

    Args:
        log: Log of the run.
        running: Whether the process of the run is still there; a log with a summary has ended.
    """
    stopped, started = log["summary"].get("stopped"), log["start_time"][:40].replace("T", " ").replace("Z", " UTC")
    started = f"started {started}" if started else ""
    if log["summary"] and not stopped:
        return Tile("State", "finished", started, good=True)
    if stopped == "asked to":
        return Tile("State", "stopped", f"asked to; {started}")
    if log["summary"] or not running:
        return Tile("State", "stopped", started, good=False)
    return Tile("State", "running", started)


def sections(log: RunLog, running: bool = False) -> list[Section]:
    """Returns all sections: first what the run did, then what it was made of.

    A section may have only charts, and the log may lack the data to draw them.

    Args:
        log: Log of the run.
        running: Whether the process of the run is still there.
    """
    found = [_verdict(log, running)]
    makers = (
        _loss,
        tasks,
        _sample,
        _learning_rate,
        _gradients,
        _distribution,
        _speed,
        _memory,
        _stability,
        _waterfall,
        _plan,
    )
    for make in (*makers, _messages, _checkpoints, _built, _configuration, _environment):
        found += make(log)
    return found


def _last(entries: Iterable[Mapping[str, Any]], *path: str) -> float | None:
    ys = series(entries, *path)[1]
    return ys[-1] if ys else None


def _typical(log: RunLog, *path: str) -> float | None:
    """Returns the median over the logged iterations, or None."""
    ys = series(log["training_iterations"], *path)[1]
    return statistics.median(ys) if ys else None


def _of_run(log: RunLog, key: str) -> tuple[float | None, str]:
    """Returns a figure of the speed, and whether it is the mean of the run or the median of the entries."""
    whole = finite(log["summary"].get(key))
    return (whole, "mean of the run") if whole is not None else (_typical(log, "mfu", key), "median")


def _training_s(log: RunLog) -> float | None:
    """Returns the seconds of training without evaluation and saving, or None.

    The time of an entry is the mean over the iterations since the previous entry.
    """
    xs, ys = series(log["training_iterations"], "time_ms")
    return sum(y * (x - before) for x, y, before in zip(xs, ys, [0, *xs[:-1]], strict=True)) / 1e3 if xs else None


def _verdict(log: RunLog, running: bool) -> Section:
    info, summary, entries = log["startup_info"], log["summary"], log["training_iterations"]
    tiles = [state(log, running)]
    last, most = (entries[-1]["iter"] if entries else 0), finite(info.get("max_iters"))
    tiles.append(Tile("Iterations", f"{last:,}", "" if most is None else f"of {most:,.0f}"))
    tokens = _last(entries, "tokens")
    if tokens is not None:
        tiles.append(Tile("Tokens", formats.short_count(tokens), f"{tokens:,.0f}"))
    best = _best(log)
    loss, over = finite(summary.get("train_loss")), finite(summary.get("train_loss_iterations"))
    if loss is not None and over is not None:
        over_text = f"mean of the last {formats.counted(int(over), 'iteration')}"
        tiles.append(Tile("Training loss", f"{loss:.4f}", over_text))
    for label, of, key in (("Training loss", entries, "loss"), ("Validation loss", log["eval_steps"], "val_loss")):
        xs, ys = series(of, key)
        if ys and not (key == "loss" and loss is not None and over is not None):
            tiles.append(Tile(label, f"{ys[-1]:.4f}", f"iteration {xs[-1]:,}"))
    if best is not None:
        tiles.append(Tile("Best validation loss", f"{best[1]:.4f}", f"iteration {best[0]:,}"))
    mfu, how = _of_run(log, "mfu_percent")
    if mfu is not None:
        tiles.append(Tile("MFU", f"{mfu:.2f}%", clean(f"{how}; {formats.mfu_scale(info)}".removesuffix("; "), 120)))
    speed, how = _of_run(log, "tokens_per_sec")
    if speed is not None:
        tiles.append(Tile("Tokens/s", f"{speed:,.0f}", f"{how}, of the job"))
    wall, training = finite(summary.get("wall_time_s")), _training_s(log)
    if wall is not None:
        starts = finite(summary.get("starts"))
        which = "of the last process" if starts is None else f"in {formats.counted(int(starts), 'start')}"
        tiles.append(Tile("Wall time", formats.duration(wall), which if log["resumes"] else ""))
    elif training is not None:
        tiles.append(Tile("Training time", formats.duration(training), "without evaluation and saving"))
    peaks = [y for key in ("peak_gb", "peak_rss_gb") for y in series(entries, "memory", key)[1]]
    if peaks:
        tiles.append(Tile("Peak memory", formats.byte_text(1e9 * max(peaks)), clean(text(info.get("device")), 60)))
    return Section("Verdict", _remarks(log, running), tiles=tiles)


def _remarks(log: RunLog, running: bool) -> list[str]:
    lines, stopped = [], log["summary"].get("stopped")
    if stopped and stopped != "asked to":
        lines.append(f"Stopped by an error: {text(stopped)}")
    if not log["summary"] and not running:
        lines.append("The log has no end: the process was killed, or its machine failed.")
    if not log["training_iterations"]:
        lines.append("No iteration was logged.")
    if log["damaged_lines"]:
        lines.append(f"{log['damaged_lines']:,} lines of the journal could not be read.")
    if log["ignored_events"]:
        lines.append(f"{log['ignored_events']:,} events are of types that this version does not know.")
    if log["resumes"]:
        lines.append("Resumed after iteration " + _listed([entry["iter"] for entry in log["resumes"]]) + ".")
    if "mfu_percent" not in mapping(value_at((log["training_iterations"] or [{}])[-1], "mfu")):
        hint = log["startup_info"].get("peak_hint")
        lines += [clean(text(hint), CELL)] if hint else []
    return lines


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else ""
    return ", ".join(f"{n:,}" for n in numbers[:20]) + more


def _best(log: RunLog) -> tuple[int, float] | None:
    xs, ys = series(log["eval_steps"], "val_loss")
    return min(zip(xs, ys, strict=True), key=lambda pair: pair[1]) if xs else None


def _loss(log: RunLog) -> Iterator[Section]:
    lost, best = gaps(log), _best(log)
    lines = [f"Not a number at iteration {_listed(lost)}."] if lost else []
    if best is not None and "trigram_loss" in log["summary"]:
        lines.append(f"A trigram model of the same data has {figure(log['summary']['trigram_loss'], 4)}.")
    yield Section("Loss", lines, charts=["loss", "loss_tail"])
    yield from evaluations(log)


def _learning_rate(log: RunLog) -> Iterator[Section]:
    yield Section("Learning rate", charts=["learning_rate"])


def _gradients(log: RunLog) -> Iterator[Section]:
    yield Section("Gradient norms", charts=["gradient_norm", "layers", "components"])


def _distribution(log: RunLog) -> Iterator[Section]:
    entries = [entry for entry in log["training_iterations"] if mapping(entry.get("gradients"))]
    if not entries:
        return
    last = mapping(entries[-1]["gradients"])
    names = {"global_norm": "global norm", "grad_mean": "mean", "grad_std": "standard deviation"}
    names |= {"grad_min": "smallest", "grad_max": "largest", "zero_share": "share of zeros", "non_finite": "not finite"}
    rows = [(label, text(last[key])) for key, label in names.items() if key in last]
    tables = [Table((f"iteration {entries[-1]['iter']:,}", "value"), rows)] if rows else []
    ratios = mapping(last.get("update_ratios"))
    if ratios:
        shown = [(text(str(name)), text(value)) for name, value in list(ratios.items())[:20]]
        tables.append(Table(("component", "update / weights"), shown))
    yield Section("Gradient distribution", tables=tables, charts=["histogram", "zero_share", "update_ratios"])


def _speed(log: RunLog) -> Iterator[Section]:
    rows = []
    labels = ("MFU %", "HFU %", "% of the measured ceiling", "TFLOP/s, of one GPU if any", "tokens/s")
    paths = [(label, ("mfu", key)) for label, key in zip(labels, _SPEED, strict=True)]
    for label, path in [*paths, ("ms per iteration", ("time_ms",)), ("ms waiting for data", ("data_wait_ms",))]:
        ys = series(log["training_iterations"][1:], *path)[1]
        if ys:
            rows.append((label, *map(text, (*formats.percentiles(ys), min(ys), max(ys)))))
    columns = ("without the first entry", "p10", "median", "p90", "smallest", "largest")
    lines = _scale(log) if any("MFU" in row[0] for row in rows) else []
    yield Section("Speed", lines, [Table(columns, rows)] if rows else [], charts=["speed"])


def _scale(log: RunLog) -> list[str]:
    """Returns a line that says what the MFU of a run is relative to; none if its log does not tell."""
    scale = formats.mfu_scale(log["startup_info"])
    return [clean(f"MFU: {scale}.", 120)] if scale else []


def _memory(log: RunLog) -> Iterator[Section]:
    parts = mapping(value_at(log["startup_info"], "plan", "memory_parts_gb"))
    rows = [(text(str(name)), figure(gb)) for name, gb in list(parts.items())[:30]]
    tables = [Table(("planned part", "GB"), rows)] if rows else []
    yield Section("Memory", tables=tables, charts=["memory"])


def _stability(log: RunLog) -> Iterator[Section]:
    entries = [entry for entry in log["training_iterations"] if mapping(entry.get("stability"))]
    if not entries:
        return
    last = mapping(entries[-1]["stability"])
    spikes = [e["iter"] for e in entries if value_at(e, "stability", "spike") is True]
    flat = sum(value_at(e, "stability", "plateau") is True for e in entries)
    lines = [f"Spikes at iteration {_listed(spikes)}." if spikes else "No spike."]
    total = formats.counted(len(entries), "entry", "entries")
    lines.append(f"Plateau in {flat:,} of {total}." if flat else "No plateau.")
    names = {"window": "entries in the window", "loss_mean": "mean loss", "loss_variance": "variance of the loss"}
    names |= {"non_finite": "steps left out: gradient not finite"}
    rows = [(label, text(last[key])) for key, label in names.items() if key in last]
    yield Section("Stability", lines, [Table((f"iteration {entries[-1]['iter']:,}", "value"), rows)])


def _waterfall(log: RunLog) -> Iterator[Section]:
    if not log["profiles"]:
        return
    last = log["profiles"][-1]
    parts, points = mapping(last.get("parts_ms")), mapping(last.get("waterfall"))
    rows = [(text(str(name)), figure(ms, 3), figure(points.get(name))) for name, ms in list(parts.items())[:20]]
    rows.append(("step, and MFU that is left", figure(last.get("step_ms"), 3), figure(last.get("mfu_percent"))))
    tables = [Table(("part", "ms per step", "points of MFU"), rows)]
    given = last.get("kernels")
    kernels = [mapping(kernel) for kernel in given[:20]] if isinstance(given, list) else []
    if kernels:
        listed = [
            (text(k.get("name"))[:90], text(k.get("part")), figure(k.get("ms"), 3), text(k.get("calls")))
            for k in kernels
        ]
        tables.append(Table(("longest kernels", "part", "ms per step", "calls per step"), listed, frozenset({0, 1})))
    steps, trace = text(last.get("steps")), text(last.get("trace"))
    lines = [f"Profile up to iteration {last['iter']:,}; steps: {steps}; trace: {trace}"]
    lines += _scale(log) if finite(last.get("mfu_percent")) is not None else []
    yield Section("Where the time goes", lines, tables, ["waterfall"])


def _plan(log: RunLog) -> Iterator[Section]:
    plan, actual = mapping(log["startup_info"].get("plan")), mapping(log["summary"].get("plan"))
    if not plan and not actual:
        return
    peaks = series(log["training_iterations"], "memory", "peak_gb")[1]
    pairs = [
        ("memory GB", actual.get("planned_memory_gb", plan.get("memory_gb")), actual.get("peak_gb"), max(peaks or [0])),
        (
            "tokens/s",
            actual.get("planned_tokens_per_sec", plan.get("tokens_per_sec")),
            actual.get("tokens_per_sec"),
            _typical(log, "mfu", "tokens_per_sec"),
        ),
        ("MFU %", plan.get("mfu_percent"), None, _of_run(log, "mfu_percent")[0]),
        ("ms per iteration", plan.get("step_ms"), None, _typical(log, "time_ms")),
    ]
    rows = []
    for label, planned, told, seen in pairs:
        wanted, got = finite(planned), finite(told) or finite(seen)
        if wanted and got:
            rows.append((label, text(wanted), text(got), f"{got / wanted - 1:+.1%}"))
    tables = [Table(("", "planned", "measured", "off"), rows)] if rows else []
    parts = [(text(str(name)), figure(ms)) for name, ms in list(mapping(plan.get("parts_ms")).items())[:30]]
    tables += [Table(("planned part of an iteration", "ms"), parts)] if parts else []
    band = finite(plan.get("band"))
    lines = [] if band is None else [f"The plan's speed has a band of +-{band:.0%}."]
    lines += _scale(log) if any("MFU" in row[0] for row in rows) else []
    if tables:
        yield Section("Plan against actual", lines, tables)


def _flat(given: Mapping[str, Any], skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Returns a row for each value of a mapping and of the mappings inside it."""
    rows = []
    for key, value in given.items():
        name = clean(str(key), 80)
        if isinstance(value, Mapping) and key not in skip:
            rows += [(f"{name}: {clean(str(inner), 80)}", text(item)) for inner, item in value.items()]
        elif key not in skip:
            rows.append((name, text(value)))
    return rows[:_CONFIG_ROWS]


_ABOUT_HARDWARE = ("device", "num_gpus", "memory_gb", "hardware_peak_tflops", "peak_basis", "peak_source", "peak_hint")
_APART = ("components", "kernels", "kernel_reasons", "versions", "plan", "notes", *_ABOUT_HARDWARE)


def _built(log: RunLog) -> Iterator[Section]:
    info = log["startup_info"]
    tables = []
    components, kernels = mapping(info.get("components")), mapping(info.get("kernels"))
    if components:
        tables.append(words(("component", "what was built"), _flat(components)))
    rows = _flat(info, _APART)
    if rows:
        tables.append(words(("size", "value"), rows))
    if kernels:
        reasons = mapping(info.get("kernel_reasons"))
        chosen = [(text(str(op)), text(impl), text(reasons.get(op, ""))) for op, impl in list(kernels.items())[:50]]
        tables.append(words(("op", "implementation", "why"), chosen))
    if tables:
        yield Section("What was built", tables=tables)


def _configuration(log: RunLog) -> Iterator[Section]:
    origins = mapping(log["config"].get("origins"))
    rows: list[tuple[str, str, str, str]] = []
    for section, values in log["config"].items():
        if section != "origins":
            for key, value in mapping(values).items() if isinstance(values, Mapping) else [("", values)]:
                where = text(origins.get(key))
                rows.append((clean(str(section), 80), clean(str(key), 80), text(value), where))
    columns = ("section", "key", "value", "from")
    chosen = [row for row in rows if row[3] != "default"][:_CONFIG_ROWS]
    rest = [row for row in rows if row[3] == "default"][:_CONFIG_ROWS]
    if chosen:
        yield Section("Configuration", tables=[words(columns, chosen)])
    if rest:
        yield Section("Configuration: defaults", tables=[words(columns, rest)], folded=True)


def _environment(log: RunLog) -> Iterator[Section]:
    info = log["startup_info"]
    rows = _flat({key: info[key] for key in _ABOUT_HARDWARE if key in info})
    rows += _flat(mapping(info.get("versions")))
    if rows:
        yield Section("Environment", tables=[words(("what", "value"), rows)])


def _messages(log: RunLog) -> Iterator[Section]:
    notes = log["startup_info"].get("notes")
    lines = [text(note) for note in notes[:50]] if isinstance(notes, list) else []
    entries = log["messages"]
    if len(entries) > ROWS:
        lines.append(f"The last {ROWS} of {len(entries):,} messages.")
    rows = [
        (text(entry.get("level")), text(entry.get("iter")), text(entry.get("time")), text(entry.get("text")))
        for entry in entries[-ROWS:]
    ]
    tables = [words(("level", "iteration", "time", "message"), rows)] if rows else []
    if lines or tables:
        yield Section("Messages", lines, tables)


def _checkpoints(log: RunLog) -> Iterator[Section]:
    rows = [
        (text(e["iter"]), figure(e.get("val_loss"), 4), figure(e.get("time_ms"), 0), text(e.get("path")))
        for e in log["checkpoints"][-ROWS:]
    ]
    if rows:
        columns = ("iteration", "validation loss", "ms", "path")
        yield Section("Checkpoints", tables=[Table(columns, rows, frozenset({0, 3}))], folded=len(rows) > 12)


def _sample(log: RunLog) -> Iterator[Section]:
    sample = log["summary"].get("sample")
    if isinstance(sample, str) and sample.strip():
        yield Section("Sample", code=clean(sample, 5000).splitlines())
