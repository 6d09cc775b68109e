"""Sections of a report about what users notice: steps beside other stacks, generation, start and saves."""

import statistics
from collections.abc import Iterator

from bench.results import Records, done
from gptperf.formats import number
from gptperf.report.page import Section
from gptperf.report.tables import Table

__all__ = ["generation", "rivals", "start"]


def rivals(records: Records) -> Iterator[Section]:
    """Yields the times of a step of gptperf and of other stacks, with gptperf's MFU and plan."""
    rows = []
    for record in done(records, "rivals").values():
        found = record["results"]
        for name, row in found["contenders"].items():
            head = (found["model"], found["shape"], name)
            if "reason" in row:
                rows.append((*head, row["reason"], *[""] * 5))
                continue
            span = f"{row['p10_ms']:,.2f} to {row['p90_ms']:,.2f}"
            figures = (number(row["step_ms"], ",.3f"), span, number(row["tokens_per_sec"], ",.0f"))
            own = (number(row.get("mfu_percent"), ".1f"), number(row.get("planned_ms"), ",.3f"))
            rows.append((*head, *figures, *own, number(row["ratio"], ".3f")))
    if rows:
        columns = ("model", "shape", "contender", "ms/step", "p10 to p90", "tokens/s", "MFU, %", "planned ms")
        text = (
            "Contenders take turns in one process; new random tokens in every step. MFU is strict. "
            "The last column is above 1 where gptperf is faster."
        )
        yield Section("Beside other stacks", [text], [Table((*columns, "time / gptperf's"), rows)])


def generation(records: Records) -> Iterator[Section]:
    """Yields the speed of generation."""
    rows = []
    for record in done(records, "generation").values():
        found = record["results"]
        figures = (number(found["tokens_per_sec"], ",.0f"), number(found["step_ms"], ",.3f"))
        waits = (number(found["first_token_ms"], ",.1f"), number(found["cold_first_token_ms"], ",.0f"))
        memory = number(found["peak_memory_gb"], ".1f")
        rows.append((found["model"], str(found["batch_size"]), *figures, *waits, memory))
    if rows:
        columns = (
            "model",
            "prompts",
            "tokens/s",
            "ms/token",
            "ms to the first token",
            "ms in the first call",
            "peak GB",
        )
        text = (
            "512 tokens after prompts of 16, bfloat16, top_k 50; the median of 5 calls. "
            "The time to the first token includes the prefill."
        )
        yield Section("Generation", [text], [Table(columns, rows)])


def start(records: Records) -> Iterator[Section]:
    """Yields the times to a first iteration and a first token, and those of saves."""
    rows = []
    for record in done(records, "start").values():
        found = record["results"]
        times = [number(seconds, ".1f") for what in ("iteration_s", "token_s") for seconds in found[what].values()]
        first, *later = found["stalls_ms"]
        stalls = (number(first, ",.0f"), number(statistics.median(later) if later else None, ",.0f"))
        rows.append((found["model"], *times, *stalls, number(found["save_ms"], ",.0f")))
    if rows:
        columns = (
            "model",
            "s to iteration 1",
            "warm",
            "s to token 1",
            "warm",
            "stall of save 1, ms",
            "later",
            "save, ms",
        )
        text = (
            "From the start of Python, first with empty caches of compiled kernels. Training waits for the stall of a "
            "save; the rest of the save overlaps with training."
        )
        yield Section("Start and saves", [text], [Table(columns, rows)])
