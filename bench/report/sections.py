"""Turns results into the sections of a report, for the page and for Markdown."""

from collections.abc import Iterator
from typing import Any

from bench.measure.models import DEFAULT_VARIANT, config_of
from bench.report import crosscheck, outside
from bench.results import Record, Records, done
from gptperf import plan
from gptperf.formats import counted, mfu_scale, number
from gptperf.monitor.waterfall import PARTS
from gptperf.report.page import Section
from gptperf.report.tables import Table, words

__all__ = ["ops_rows", "sections", "verdict_lines"]

_STRICT = {"convention": "strict"}


def _checks(records: Records) -> list[crosscheck.Check]:
    return [crosscheck.check(c, r, crosscheck.gpu_of(r)) for c, r in crosscheck.measured_steps(records).items()]


def verdict_lines(records: Records) -> list[str]:
    """Returns the lines that a reader needs first: cross-check, waterfalls, failed cells."""
    lines = []
    if any(record["environment"]["device"] != "cpu" for record in records.values()):
        lines.append(crosscheck.verdict_line(_checks(records)))
    else:
        lines.append("no GPU: cells that need one were not measured, and there is no MFU")
    for cell, record in done(records, "waterfall").items():
        fall = record["results"]["profile"]
        if fall["waterfall"] is not None:
            closes = "closes" if fall["closes"] else "does NOT close"
            mfu = f"{fall['mfu_percent']:.2f}% under the profiler, {fall['timed_mfu_percent']:.2f}% timed"
            mfu += f" ({mfu_scale(_STRICT | fall)})"
            lines.append(f"{cell}: {closes}: {mfu}")
    failed = [cell for cell, record in records.items() if record["status"] != "done"]
    lines.append(f"{counted(len(records) - len(failed), 'cell')} measured, {len(failed)} failed")
    return lines


def sections(records: Records) -> list[Section]:
    """Returns all sections of a folder of results; cells that were not measured have no section."""
    found = [Section("Verdict", verdict_lines(records)), *_failed(records)]
    makers = (
        _steps,
        outside.rivals,
        outside.generation,
        outside.start,
        _conventions,
        _waterfalls,
        _monitoring,
        _cross_check,
        _plans,
        _ceilings,
        _ops,
        _errors,
        _host,
    )
    for make in (*makers, _loader, _micro):
        found += make(records)
    return [*found, _environment(records), *_protocols(records)]


def _failed(records: Records) -> Iterator[Section]:
    rows = [(c, str(r.get("reason"))) for c, r in records.items() if r["status"] != "done"]
    if rows:
        yield Section("Cells that failed", tables=[words(("cell", "reason"), rows)])


def _steps(records: Records) -> Iterator[Section]:
    rows, steps = [], crosscheck.measured_steps(records)
    for cell, record in steps.items():
        found = record["results"]
        mfu, serial = found.get("mfu_percent"), found.get("serial", {})
        joules = found.get("joules_per_token")
        rows.append(
            (
                found["model"],
                found["variant"] + (" (profiled run)" if cell.startswith("waterfall") else ""),
                number(found["step_ms"], ",.2f"),
                f"{found['p10_ms']:,.1f} to {found['p90_ms']:,.1f}",
                number(found["tokens_per_sec"], ",.0f"),
                number(found.get("achieved_tflops"), ",.1f"),
                number(mfu and mfu / 100, ".2%"),
                number(serial.get("fraction"), ".1%"),
                number(found["peak_memory_gb"], ",.1f"),
                number(joules, ",.5f"),
                number(found["first_step_s"], ",.1f"),
            )
        )
    if not rows:
        return
    columns = ("model", "variant", "ms/step", "p10 to p90", "tokens/s", "TFLOP/s", "MFU", "of serial roofline")
    more = ("peak GB", "J/token", "first step s")
    lines = [f"MFU is {_scales(steps)}: causal matmul FLOPs over the peak of the data sheet."]
    lines.append("The serial roofline is the model's parts one after another at the rates measured in this run.")
    reasons = {r["results"].get("no_joules") for r in steps.values()} - {None}
    lines += [f"No energy: {reason}." for reason in sorted(reasons)]
    yield Section("Training step", lines, [Table((*columns, *more), rows)])


def _scales(steps: Records) -> str:
    """Returns what the MFUs of steps are relative to."""
    return " / ".join(dict.fromkeys(mfu_scale(_STRICT | dict(record["results"])) for record in steps.values()))


def _conventions(records: Records) -> Iterator[Section]:
    rows, names = [], {}
    for record in crosscheck.measured_steps(records).values():
        by_name = record["results"]["conventions"]
        names.update(dict.fromkeys(by_name))
        percents = {n: row["mfu_percent"] for n, row in by_name.items()}
        rows.append((record["results"]["model"], record["results"]["variant"], percents))
    if not rows or not any(value is not None for row in rows for value in row[2].values()):
        return
    cells = [(m, v, *(number(p.get(n) and p[n] / 100, ".2%") for n in names)) for m, v, p in rows]
    line = f"The peak is the same for all conventions: {_scales(crosscheck.measured_steps(records))}."
    yield Section("MFU by convention", [line], [Table(("model", "variant", *names), cells)])


def _waterfalls(records: Records) -> Iterator[Section]:
    lines, tables, charts = [], [], []
    scales: dict[str, None] = {}
    unknown: dict[str, float] = {}
    for cell, record in done(records, "waterfall").items():
        profile = record["results"]["profile"]
        points = profile["waterfall"]
        rows = [
            (part, number(profile["parts_ms"][part], ",.3f"), "-" if points is None else f"{points[part]:.2f}")
            for part in PARTS
        ]
        if points is not None:
            left = f"{profile['mfu_percent']:.2f}"
            scales[mfu_scale(_STRICT | profile)] = None
            rows.append(("the step, and the MFU left", number(profile["profiled_step_ms"], ",.3f"), left))
            charts.append(f"waterfall:{cell}")
        hidden = profile["hidden_communication_ms"]
        if hidden > 0:
            lines.append(f"{cell.partition('/')[2]}: {hidden:.3f} ms per step of communication during computation.")
        tables.append(Table((cell.partition("/")[2], "ms per step", "points of MFU"), rows))
        unknown |= profile["unknown_ms"]
    if tables:
        lines += [f"MFU: {' / '.join(scales)}."] if scales else []
        lines.append(
            "gemm and attention lose the time beyond what their FLOPs take at the peak. Tokens come from the device."
        )
        if unknown:
            names = ", ".join(f"{name[:60]} {ms:.3f} ms" for name, ms in list(unknown.items())[:8])
            lines.append(f"Kernels that no pattern knows, counted as other: {names}.")
        yield Section("Waterfall", lines, tables, charts)


def _monitoring(records: Records) -> Iterator[Section]:
    for cell, record in done(records, "monitor").items():
        found = record["results"]
        rows = [
            (what, number(row["ms"], ",.2f"), f"{row['p10_ms']:,.2f} to {row['p90_ms']:,.2f}")
            for what, row in (
                ("ms per step, none watched", found["unwatched"]),
                (f"ms per step, every {found['interval']}th watched", found["watched"]),
                ("ms that a watched step takes more", found["watched_step_ms"]),
            )
        ]
        lines = [f"Gradients and update every {found['interval']} steps: {found['cost_percent']:+.2f}% of a step."]
        yield Section("What monitoring costs", lines, [Table((cell.partition("/")[2], "median", "p10 to p90"), rows)])


def _cross_check(records: Records) -> Iterator[Section]:
    checks = _checks(records)
    if not checks:
        return
    rows = [
        (
            check.cell,
            number(check.measured_tokens_s, ",.0f"),
            number(check.predicted_tokens_s, ",.0f"),
            "-" if check.ratio is None else f"{check.ratio:.3f}",
            "PASS" if check.passed else "FAIL" if check.ratio is not None else str(check.reason),
        )
        for check in checks
    ]
    tables = [Table(("cell", "measured tokens/s", "predicted", "measured / predicted", "within 10%"), rows)]
    steps = {r["results"]["model"]: r for c, r in crosscheck.measured_steps(records).items() if _is_default(c)}
    forecast = [
        (
            model,
            one.gpu,
            one.dtype,
            number(one.tokens_s, ",.0f"),
            number(one.mfu, ".1%"),
            one.mfu_scale,
            f"+-{one.band:.0%}",
            "yes" if one.fits else "no",
        )
        for model, record in steps.items()
        for one in crosscheck.forecasts(config_of(record["config"]))
    ]
    if forecast:
        tables.append(Table(("model", "GPU", "dtype", "predicted tokens/s", "MFU", "MFU is", "band", "fits"), forecast))
    lines = [
        crosscheck.verdict_line(checks),
        "The prediction uses FLOPs, bytes and the GPU table, and no measurement of this run.",
    ]
    yield Section("Cross-check", lines, tables)


def _is_default(cell: str) -> bool:
    return cell.startswith("waterfall/") or cell.endswith(f"/{DEFAULT_VARIANT}")


def _plans(records: Records) -> Iterator[Section]:
    rows = []
    for cell, record in done(records, "plan").items():
        config, gpu, found = config_of(record["config"]), crosscheck.gpu_of(record), record["results"]
        if gpu is None or plan.unplannable(config, gpu) is not None:
            continue
        given = plan.plan(config, gpu, recompute=config.system.recompute)
        pairs = ((given.step_ms, found["step_ms"], 1), (given.memory.total_gb, found["peak_memory_gb"], 2))
        figures = [
            text
            for wanted, got, digits in pairs
            for text in (f"{wanted:,.{digits}f}", f"{got:,.{digits}f}", f"{got / wanted - 1:+.1%}")
        ]
        rows.append((cell.partition("/")[2], *figures))
    if rows:
        columns = ("run", "planned ms", "measured ms", "off", "planned GB", "peak GB", "off")
        yield Section("Plan against actual", tables=[Table(columns, rows)])


def _ceilings(records: Records) -> Iterator[Section]:
    rows = []
    for cell, record in done(records, "ceilings").items():
        found = record["results"]
        rates = [found[f"{name}_flop_s"] / 1e12 for name in _RATES]
        row = [number(rate, ",.1f") for rate in rates]
        rows.append((cell.partition("/")[2], *row, number(found["copy_byte_s"] / 1e9, ",.0f")))
    if rows:
        columns = ("model", "its GEMMs TFLOP/s", "8192^3", "attention forward", "attention backward", "copy GB/s")
        yield Section("What this card reaches", tables=[Table(columns, rows)], charts=["roofline"])


_RATES = ("gemm", "gemm_square", "attention_forward", "attention_backward")


def ops_rows(records: Records) -> list[dict[str, Any]]:
    """Returns the rows of every op that was timed."""
    return [row for record in done(records, "ops").values() for row in record["results"]["rows"]]


def _ops(records: Records) -> Iterator[Section]:
    rows = []
    for row in ops_rows(records):
        head = (row["op"], "x".join(map(str, row["shape"])), row["impl"])
        if "error" in row:
            rows.append((*head, row["error"], "", "", "", ""))
            continue
        for direction in ("forward", "backward", "both"):
            if direction in row:
                cell = row[direction]
                share = cell.get("of_copy", cell.get("of_gemm"))
                span = f"{cell['p10_ms']:.4f} to {cell['p90_ms']:.4f}"
                rate = number(cell.get("gb_s"), ",.0f")
                rows.append((*head, direction, f"{cell['ms']:.4f}", span, rate, f"{share:.3f}"))
    if rows:
        yardstick = "the time of a copy of the bytes that the op must move, divided by the time of the op"
        lines = [f"Of copy: {yardstick}. For linear_cross_entropy it is the time of its three matrix products instead."]
        columns = ("op", "shape", "implementation", "direction", "ms", "p10 to p90", "GB/s", "of copy")
        charts = [f"of_copy:{direction}" for direction in ("forward", "backward")]
        yield Section("Ops", lines, charts=charts)
        yield Section("Ops, every figure", tables=[Table(columns, rows)], folded=True)


def _errors(records: Records) -> Iterator[Section]:
    rows = []
    for record in done(records, "errors").values():
        for row in record["results"]["rows"]:
            ratio = row.get("ratio_rms")
            figures = (f"{row['eager_rms']:.2e}", f"{row['triton_rms']:.2e}", "-" if ratio is None else f"{ratio:.2f}")
            rows.append((row["op"], "x".join(map(str, row["shape"])), row["dtype"], row["tensor"], *figures))
    if rows:
        where = {r["results"]["where"] for r in done(records, "errors").values()}
        columns = ("op", "shape", "dtype", "tensor", "eager", "triton", "triton / eager")
        lines = [f"Root mean square of the error over that of the float64 result, {' and '.join(sorted(where))}."]
        yield Section("Errors against float64", lines, [Table(columns, rows)], folded=True)


def _host(records: Records) -> Iterator[Section]:
    rows = []
    for record in done(records, "host").values():
        for row in record["results"]["rows"]:
            times = [number(row[key]["us"], ",.1f") if key in row else "-" for key in ("forward", "forward_backward")]
            rows.append((row["op"], str(row["rows"]), row["impl"], *times))
    if rows:
        columns = ("op", "rows", "implementation", "forward us", "forward and backward us")
        yield Section("Host time of a call", tables=[Table(columns, rows)], folded=True)


def _loader(records: Records) -> Iterator[Section]:
    for record in done(records, "loader").values():
        rows = [
            (
                row["dataset"],
                number(row["dataset_gb"], ",.1f"),
                str(row["block_size"]),
                number(row["tokens_s"] / 1e6, ",.1f"),
                number(row["spread"], ".1%"),
                f"{row['rss_before_mb']:.0f} to {row['rss_after_mb']:.0f}",
                number(row.get("read_amplification"), ".2f"),
            )
            for row in record["results"]["rows"]
        ]
        columns = ("data set", "GB", "block_size", "million tokens/s", "spread", "resident MB", "bytes read / used")
        yield Section("Loader", tables=[Table(columns, rows)])


def _micro(records: Records) -> Iterator[Section]:
    rows = [
        (row["name"], f"{1e3 * row['ms']:,.2f}", f"{1e3 * row['p10_ms']:,.2f} to {1e3 * row['p90_ms']:,.2f}")
        for record in done(records, "micro").values()
        for row in record["results"]["rows"]
    ]
    if rows:
        yield Section("Host side", tables=[Table(("what", "us", "p10 to p90"), rows)])


def _facts(record: Record) -> dict[str, str]:
    made_by = record["environment"]
    state, source = made_by.get("gpu_state") or {}, made_by.get("source") or {}
    figures = {
        "power cap W": state.get("power_cap_w"),
        "SM clock MHz, idle": state.get("sm_clock_mhz"),
        "SM clock MHz, largest": state.get("max_sm_clock_mhz"),
        "memory clock MHz": state.get("mem_clock_mhz"),
    }
    dirty = {True: " with changes", False: "", None: ""}[source.get("dirty")]
    facts = {
        "device": made_by["device"],
        "driver": made_by.get("driver"),
        **{name: None if value is None else f"{value:.0f}" for name, value in figures.items()},
        **made_by.get("versions", {}),
        "Python": made_by.get("python"),
        "host": f"{made_by.get('cores')} cores, {made_by.get('machine')}",
        "commit": f"{source.get('commit') or 'unknown'}{dirty}",
        "sources": source.get("digest"),
        "form": "quick" if record.get("quick") else "full",
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _environment(records: Records) -> Section:
    values: dict[str, dict[str, None]] = {}
    for record in records.values():
        for name, value in _facts(record).items():
            values.setdefault(name, {})[value] = None
    rows = [(name, " | ".join(found)) for name, found in values.items()]
    dates = sorted(record["date"] for record in records.values())
    rows.append(("measured", f"{dates[0]} to {dates[-1]}"))
    mixed = [name for name, found in values.items() if len(found) > 1 and name in ("device", "driver", "sources")]
    lines = [f"These results were not measured under the same conditions: {', '.join(mixed)} differ."] if mixed else []
    return Section("Environment", lines, [words(("what", "value"), rows)])


def _protocols(records: Records) -> Iterator[Section]:
    texts: dict[str, list[str]] = {}
    for cell, record in records.items():
        if record.get("protocol"):
            texts.setdefault(record["protocol"], []).append(cell.partition("/")[0])
    for text, kinds in texts.items():
        title = f"Protocol: {', '.join(dict.fromkeys(kinds))}"
        yield Section(title, code=text.strip().splitlines(), folded=True)
