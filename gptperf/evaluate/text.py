"""Shows the result of an evaluation as text. Loads no torch."""

from collections.abc import Mapping
from typing import Any

from gptperf import formats
from gptperf.monitor.blocks import SCORES, printable
from gptperf.report.tables import Table, aligned

__all__ = ["text"]

_HITS, _DOCUMENTS = 20, 3
"""Most contained items that are listed, and most documents of each."""


def text(found: Mapping[str, Any]) -> str:
    """Returns tables and lines.

    Args:
        found: the result of `gptperf.evaluate.run.evaluate`.
    """
    step = "" if found["step"] is None else f", iteration {found['step']:,}"
    parts = [f"{found['model']}{step}"]
    if "data" in found:
        parts.append(_data(found["data"]))
    if "tasks" in found:
        parts.append(_tasks(found))
    if "contained" in found:
        parts += _contained(found["contained"])
    return printable("\n\n".join(parts))


def _data(data: Mapping[str, Any]) -> str:
    rows = [(data["dataset"], data)]
    rows += list(data.get("sources", {}).items())
    columns = ("data set", "split", "loss", "perplexity", "bits per byte")
    figures = ("loss", "perplexity", "bits_per_byte")
    cells = [(name, data["split"], *(formats.number(one.get(key), ".4f") for key in figures)) for name, one in rows]
    return aligned(Table(columns, cells, frozenset({0, 1})))


def _tasks(found: Mapping[str, Any]) -> str:
    shown = [key for key in SCORES if any(key in scores for scores in found["tasks"].values())]
    rows = [
        (name, f"{scores['items']:,}", f"{scores['truncated']:,}", *(formats.with_error(scores, key) for key in shown))
        for name, scores in found["tasks"].items()
    ]
    lines = [aligned(Table(("task", "items", "truncated", *shown), rows))]
    if len(rows) > 1:
        lines.append(f"core, the mean of the centred scores: {formats.with_error(found, 'core')}")
    cut = sum(scores["truncated"] for scores in found["tasks"].values())
    if cut:
        cut = formats.counted(cut, "item")
        lines.append(f"truncated: {cut} longer than block_size, which lost the start of the context")
    return "\n".join(lines)


def _contained(contained: Mapping[str, Any]) -> list[str]:
    columns = ("task", "items", "contained", "share", "acc of the others")
    rows = [
        (
            name,
            f"{one['items']:,}",
            f"{one['contained']:,}",
            f"{one['share']:.2%}",
            formats.with_error(one, "clean_acc"),
        )
        for name, one in contained["tasks"].items()
    ]
    head = f"items with {contained['ngram']} consecutive tokens, or all of fewer, that occur in the training data"
    hits = [hit for one in contained["tasks"].values() for hit in one["hits"]]
    lines = [_hit(hit) for hit in hits[:_HITS]]
    if len(hits) > _HITS:
        lines.append(f"and {len(hits) - _HITS:,} more; --json lists all")
    return [f"{head}\n{aligned(Table(columns, rows))}", *(["\n".join(lines)] if lines else [])]


def _hit(hit: Mapping[str, Any]) -> str:
    places = [f"{one['dataset']}: {one['source']}:{one['offset']}" for one in hit["documents"][:_DOCUMENTS]]
    more = len(hit["documents"]) - len(places)
    listed = ", ".join(places) + (f" and {formats.counted(more, 'more document')}" if more else "")
    return f"{hit['item']}: {hit['found']:,} of {formats.counted(hit['ngrams'], 'n-gram')}, in {listed}"
