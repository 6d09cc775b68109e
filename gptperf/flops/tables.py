"""The tables that `python -m gptperf.flops` prints."""

from collections.abc import Callable
from typing import Any

from gptperf.flops.elementwise import part_costs

__all__ = ["report_lines"]

_HEADINGS = {"qkv": "QKV projection", "scores": "scores, weighted V", "output": "output projection", "ffn": "FFN"}
_HEADINGS |= {"lm_head": "head", "other": "other"}


def report_lines(counts: dict[str, Any]) -> list[str]:
    """Returns the counts of `gptperf.flops.__main__.count_all` as lines of text."""
    conventions = counts["conventions"]
    lines = ["MODEL", *_model_lines(counts["model"])]
    lines += ["", "PARAMETERS", *_section(counts["parameters"], _parameter_lines)]
    lines += ["", "MATMULS, MFLOP per token, causal scores (strict)", *_section(conventions["strict"], _matmul_lines)]
    lines += ["", "CONVENTIONS, GFLOP per trained token", *_convention_lines(conventions)]
    lines += ["", "CONVENTIONS BY PART, GFLOP per trained token", *_part_lines(conventions)]
    lines += ["", "VECTOR OPS, forward MFLOP per token; not part of MFU"]
    lines += _section(counts["vector_flops"], lambda section: _vector_lines(section, counts["model"]))
    lines += ["", f"MEMORY-BOUND OPS, minimum kB per token{_element_text(counts['bytes_moved'])}"]
    return lines + _section(counts["bytes_moved"], _bytes_lines)


def _model_lines(model: dict[str, Any]) -> list[str]:
    texts = [f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in model.items()]
    return [f"  {', '.join(texts[:7])}", f"  {', '.join(texts[7:12])}", f"  {', '.join(texts[12:])}"]


def _section(section: dict[str, Any], write: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    return [f"  not counted: {section['uncountable']}"] if "uncountable" in section else write(section)


def _parameter_lines(count: dict[str, Any]) -> list[str]:
    parts = list(count.items())[:6]
    lines = [f"  {name:<20} {number:>15,} {number / count['total']:>8.1%}" for name, number in parts]
    return [
        *lines,
        f"  {'total':<20} {count['total']:>15,} {1:>8.1%}",
        f"  {'non-embedding':<20} {count['non_embedding']:>15,}   (without the position table)",
    ]


def _matmul_lines(count: dict[str, Any]) -> list[str]:
    lines = [f"  {'':<20} {'forward':>15} {'training':>15} {'share':>8}"]
    for part, number in count["forward_parts"].items():
        if part != "other":
            share = number / count["forward"]
            lines.append(f"  {_HEADINGS[part]:<20} {number / 1e6:>15.6f} {3 * number / 1e6:>15.6f} {share:>8.1%}")
    total = f"{count['forward'] / 1e6:>15.6f} {count['training'] / 1e6:>15.6f} {1:>8.1%}"
    return [*lines, f"  {'total':<20} {total}"]


def _convention_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"  {'':<14} {'GFLOP':>12} {'to strict':>9}  {'what':<48} source"]
    for name, row in rows.items():
        if "uncountable" in row:
            lines.append(f"  {name:<14} {'-':>12} {'-':>9}  not counted: {row['uncountable']}")
            continue
        figures = f"{row['training'] / 1e9:>12.9f} {row['to_strict']:>9.4f}"
        lines.append(f"  {name:<14} {figures}  {_RECOMPUTE_TEXT.get(name, row['summary']):<48} {row['source']}")
    return lines


def _part_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a table of the training GFLOP of every part under every convention."""
    lines = [f"  {'':<14} " + " ".join(f"{name:>10}" for name in (*_HEADINGS, "again"))]
    for row_name, row in rows.items():
        if "uncountable" not in row:
            parts = [3 * row["forward_parts"][name] for name in _HEADINGS] + [row["recomputed"]]
            lines.append(f"  {row_name:<14} " + " ".join(f"{number / 1e9:>10.6f}" for number in parts))
    return lines


_RECOMPUTE_TEXT = {
    "hfu none": "strict; nothing is recomputed",
    "hfu selective": "strict; norms and activations, no matmul",
    "hfu flash": "strict, and Q K^T again in a flash backward",
    "hfu attention": "strict, and both attention matmuls again",
    "hfu full": "strict, and all matmuls of the blocks again",
}


def _vector_lines(count: dict[str, Any], model: dict[str, Any]) -> list[str]:
    names = ("normalization", "position_encoding", "ffn_type", "activation")
    costs = part_costs(**{name: model[name] for name in names})
    lines = [f"  {'':<20} {'forward':>15} {'each':>8}"]
    for part, number in count["forward_parts"].items():
        name, cost = costs[part]
        named = "" if name == part else f"{name}: "
        lines.append(f"  {part:<20} {number / 1e6:>15.6f} {cost.flops:>8}  {named}{cost.why}")
    return [*lines, f"  {'total':<20} {count['forward'] / 1e6:>15.6f}"]


def _element_text(moved: dict[str, Any]) -> str:
    return "" if "uncountable" in moved else f" with {moved['element_bytes']} bytes per element"


def _bytes_lines(moved: dict[str, Any]) -> list[str]:
    lines = [f"  {'':<20} {'forward':>15} {'backward':>15}"]
    lines += [_bytes_line(part, traffic) for part, traffic in moved["parts"].items()]
    lines += [_bytes_line("total", moved), _bytes_line("loss, logits kept", moved["loss_with_logits_kept"])]
    return lines


def _bytes_line(name: str, traffic: dict[str, Any]) -> str:
    return f"  {name:<20} {traffic['forward'] / 1e3:>15.3f} {traffic['backward'] / 1e3:>15.3f}"
