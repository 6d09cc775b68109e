"""`python -m gptperf.flops [CONFIG.toml ...] [--key=value ...] [--json]`: a model's parameters, FLOPs and bytes.

Files and flags are those of `python -m gptperf.train`. Printed are parameters by part, matmul FLOPs by part, the FLOPs
of a trained token under every convention, vector FLOPs and the bytes that memory-bound ops move, all of them computed.
"""

import json
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from gptperf import flops
from gptperf.config import Config, ModelConfig, command_line
from gptperf.errors import main_guard
from gptperf.flops.elementwise import COSTS

__all__ = ["count_all", "main", "report_lines"]

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_HEADINGS = {"qkv": "QKV projection", "scores": "scores, weighted V", "output": "output projection", "ffn": "FFN"}
_HEADINGS |= {"lm_head": "head", "other": "other"}
_Number = int | float


def main(argv: Sequence[str] | None = None) -> None:
    """Print the counts of the model that a command line describes.

    Raises:
        ConfigError: files or flags are wrong; outside `main_guard` only with `--debug`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return
    with main_guard("--debug" in arguments or "--debug=True" in arguments):
        as_json = "--json" in arguments
        resolved = command_line.resolve([argument for argument in arguments if argument != "--json"])
        counts = count_all(resolved.config)
        print(json.dumps(counts, indent=2) if as_json else "\n".join(report_lines(counts)), flush=True)


def count_all(config: Config) -> dict[str, Any]:
    """Every count of a model; one that is no whole number of a token is a float.

    Returns:
        model (sizes and components), parameters, conventions, vector_flops and bytes_moved, each of a token; in place
        of a count that a plugin's component does not allow, {"uncountable": why}.
    """
    model = config.model
    element_bytes = _ELEMENT_BYTES[config.system.compute_dtype]
    return {
        "model": _model_facts(model),
        "parameters": _unless(flops.uncountable_parameters(model), lambda: _parameters(model)),
        "conventions": {row: _convention(model, row) for row in _rows()},
        "vector_flops": _unless(flops.uncountable_vector_flops(model), lambda: _vector(model)),
        "bytes_moved": _unless(flops.uncountable_parameters(model), lambda: _bytes(model, element_bytes)),
    }


def _unless(reason: str | None, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return count() if reason is None else {"uncountable": reason}


def _rows() -> list[str]:
    """The conventions by name, hfu with every recompute."""
    rows = []
    for name in flops.CONVENTIONS:
        rows += [f"hfu {recompute}" for recompute in flops.RECOMPUTE] if name == "hfu" else [name]
    return rows


def _number(count: int | Fraction) -> _Number:
    return count if isinstance(count, int) else float(count)


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_kv_head": model.kv_heads,
        "n_embd": model.n_embd,
        "d_ff": model.ffn_width,
        "block_size": model.block_size,
        "vocab_size": model.padded_vocab_size,
        "normalization": model.normalization,
        "norm_position": model.norm_position,
        "position_encoding": model.position_encoding,
        "ffn_type": model.ffn_type,
        "activation": "silu" if model.ffn_type == "swiglu" else model.activation,
        "bias": model.bias,
        "weight_tying": model.weight_tying,
        "qk_norm": model.qk_norm,
        "dropout": model.dropout,
    }


def _parameters(model: ModelConfig) -> dict[str, Any]:
    count = flops.parameters(model)
    return {
        "embedding": count.embedding,
        "position": count.position,
        "attention": count.attention,
        "ffn": count.ffn,
        "norm": count.norm,
        "lm_head": count.lm_head,
        "total": count.total,
        "non_embedding": count.non_embedding,
    }


def _convention(model: ModelConfig, row: str) -> dict[str, Any]:
    name, _, recompute = row.partition(" ")
    reason = flops.CONVENTIONS[name].uncountable(model)
    if reason is not None:
        return {"uncountable": reason}
    count = flops.flops_per_token(model, name, recompute=recompute or "none")
    strict = flops.flops_per_token(model)
    return {
        "forward_parts": {part: _number(Fraction(total) / count.tokens) for part, total in count.parts.items()},
        "forward": _number(count.forward_per_token),
        "recomputed": _number(Fraction(count.recomputed, count.tokens)),
        "training": _number(count.training_per_token),
        "to_strict": float(Fraction(count.training) / strict.training),
        "summary": flops.CONVENTIONS[name].summary,
        "source": flops.CONVENTIONS[name].source,
    }


def _vector(model: ModelConfig) -> dict[str, Any]:
    count = flops.vector_flops(model)
    parts = {part: _number(Fraction(total, count.tokens)) for part, total in count.parts.items()}
    return {"forward_parts": parts, "forward": _number(count.forward_per_token)}


def _bytes(model: ModelConfig, element_bytes: int) -> dict[str, Any]:
    moved = flops.bytes_moved(model, element_bytes)
    parts: dict[str, Any] = {part: traffic._asdict() for part, traffic in moved.parts.items()}
    kept = flops.bytes_moved(model, element_bytes, logits_kept=True)
    return {
        "element_bytes": element_bytes,
        "parts": parts,
        "forward": moved.forward,
        "backward": moved.backward,
        "total": moved.total,
        "loss_with_logits_kept": kept.loss._asdict(),
    }


def report_lines(counts: dict[str, Any]) -> list[str]:
    """The counts of `count_all` as text."""
    conventions = counts["conventions"]
    lines = ["MODEL", *_model_lines(counts["model"])]
    lines += ["", "PARAMETERS", *_section(counts["parameters"], _parameter_lines)]
    lines += ["", "MATMULS, MFLOP a token, causal scores (strict)", *_section(conventions["strict"], _matmul_lines)]
    lines += ["", "CONVENTIONS, GFLOP a trained token", *_convention_lines(conventions)]
    lines += ["", "THE SAME BY PART", *_part_lines(conventions)]
    lines += ["", "VECTOR OPS, MFLOP a token, forward; in no MFU"]
    lines += _section(counts["vector_flops"], lambda section: _vector_lines(section, counts["model"]))
    lines += ["", f"MEMORY-BOUND OPS, kB a token{_element_text(counts['bytes_moved'])}, at least"]
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
    """Training GFLOP of every part under every convention."""
    lines = [f"  {'':<14} " + " ".join(f"{name:>10}" for name in (*_HEADINGS, "again"))]
    for row_name, row in rows.items():
        if "uncountable" not in row:
            parts = [3 * row["forward_parts"][name] for name in _HEADINGS] + [row["recomputed"]]
            lines.append(f"  {row_name:<14} " + " ".join(f"{number / 1e9:>10.6f}" for number in parts))
    return lines


_RECOMPUTE_TEXT = {
    "hfu none": "strict; nothing computed again",
    "hfu selective": "strict; norms and activations again, no matmul",
    "hfu flash": "strict and Q K^T again, in a flash backward",
    "hfu attention": "strict and both attention matmuls again",
    "hfu full": "strict and all matmuls of the blocks again",
}


def _vector_lines(count: dict[str, Any], model: dict[str, Any]) -> list[str]:
    standard = model["ffn_type"] == "standard"
    costs = {
        "norm": model["normalization"],
        "position": model["position_encoding"],
        "activation": model["activation"] if standard else "swiglu",
    }
    lines = [f"  {'':<20} {'forward':>15} {'each':>8}"]
    for part, number in count["forward_parts"].items():
        name = costs.get(part, part)
        cost = COSTS[name]
        lines.append(f"  {part:<20} {number / 1e6:>15.6f} {cost.flops:>8}  {_named(part, name)}{cost.why}")
    return [*lines, f"  {'total':<20} {count['forward'] / 1e6:>15.6f}"]


def _named(part: str, name: str) -> str:
    return "" if name == part else f"{name}: "


def _element_text(moved: dict[str, Any]) -> str:
    return "" if "uncountable" in moved else f" with {moved['element_bytes']} bytes an element"


def _bytes_lines(moved: dict[str, Any]) -> list[str]:
    lines = [f"  {'':<20} {'forward':>15} {'backward':>15}"]
    lines += [_bytes_line(part, traffic) for part, traffic in moved["parts"].items()]
    lines += [_bytes_line("total", moved), _bytes_line("loss, logits kept", moved["loss_with_logits_kept"])]
    return lines


def _bytes_line(name: str, traffic: dict[str, Any]) -> str:
    return f"  {name:<20} {traffic['forward'] / 1e3:>15.3f} {traffic['backward'] / 1e3:>15.3f}"


if __name__ == "__main__":
    main()
