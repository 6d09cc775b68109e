"""`python -m gptperf.flops [CONFIG.toml ...] [--key=value ...] [--json]`: a model's parameters, FLOPs and bytes.

Files and flags are those of `python -m gptperf.train`. The command prints parameters by part, matmul FLOPs by part, the
FLOPs of a trained token under every convention, vector FLOPs, and the bytes that memory-bound ops move. It computes
all of them from the configuration.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gptperf import flops
from gptperf.cards import element_bytes
from gptperf.config import Config, ModelConfig, command_line
from gptperf.config.flags import Flags, take
from gptperf.errors import run_main
from gptperf.flops.tables import report_lines

__all__ = ["count_all", "main"]

_Number = int | float


@dataclass(frozen=True, kw_only=True)
class _FlopsFlags(Flags):
    """How to print the counts."""

    json: bool = False
    """Print the counts as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the counts of the model that a command line describes.

    Raises:
        ConfigError: files or flags are wrong.
    """
    taken = take(_FlopsFlags, argv, "gptperf.flops", __doc__.partition("\n\n")[2])
    counts = count_all(command_line.resolve(taken.rest, taken=taken).config)
    print(json.dumps(counts, indent=2) if taken.flags.json else "\n".join(report_lines(counts)))
    return 0


def count_all(config: Config) -> dict[str, Any]:
    """Returns every count of a model, for one token. A count that is not a whole number is a float.

    Returns:
        model (sizes and components), parameters, conventions, vector_flops and bytes_moved. A count that needs the card
        of a plugin's component without one is {"uncountable": why}.
    """
    model, size = config.model, element_bytes(config.system.compute_dtype)
    return {
        "model": _model_facts(model),
        "parameters": _unless(flops.uncountable_parameters(model), lambda: _parameters(model)),
        "conventions": {row: _convention(model, row) for row in _rows()},
        "vector_flops": _unless(flops.uncountable_vector_flops(model), lambda: _vector(model)),
        "bytes_moved": _unless(flops.uncountable_parameters(model), lambda: _bytes(model, size)),
    }


def _unless(reason: str | None, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return count() if reason is None else {"uncountable": reason}


def _rows() -> list[str]:
    """Returns the rows of the table of conventions: their names, with one row of hfu for every recompute."""
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
        "head_dim": model.head_width,
        "d_ff": model.ffn_width,
        "block_size": model.block_size,
        "vocab_size": model.padded_vocab_size,
        "normalization": model.normalization,
        "norm_position": model.norm_position,
        "position_encoding": model.position_encoding,
        "ffn_type": model.ffn_type,
        "activation": model.applied_activation,
        "bias": model.bias,
        "attention_bias": model.attention_biases,
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


def _bytes(model: ModelConfig, size: int) -> dict[str, Any]:
    moved = flops.bytes_moved(model, size)
    parts: dict[str, Any] = {part: traffic._asdict() for part, traffic in moved.parts.items()}
    kept = flops.bytes_moved(model, size, logits_kept=True)
    return {
        "element_bytes": size,
        "parts": parts,
        "forward": moved.forward,
        "backward": moved.backward,
        "total": moved.total,
        "loss_with_logits_kept": kept.loss._asdict(),
    }


if __name__ == "__main__":
    run_main(main)
