"""Compares configurations: components, parameters, FLOPs and the plan's prediction. Does not import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.errors import ConfigError, mistakes
from gptperf.formats import mfu_scale, value_text
from gptperf.hardware import Gpu
from gptperf.plan import plan, unplannable
from gptperf.registry import KINDS

__all__ = ["compare", "table"]

_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
_SWITCHES = ("bias", "attention_bias", "weight_tying", "qk_norm", "dropout")


def compare(paths: Sequence[str], gpu: Gpu | None) -> dict[str, dict[str, Any]]:
    """Returns the facts of every configuration.

    Args:
        paths: TOML files, each a configuration of its own.
        gpu: GPU for which memory and speed are predicted; None predicts nothing.

    Returns:
        Name of the file without its ending -> name of the row -> value, or None if it is unknown.

    Raises:
        ConfigError: A file has an error, or two files have the same name.
    """
    found: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path in paths:
        name = Path(path).name.removesuffix(".toml")
        if name in found:
            problems.append(f"command line: configs: found two files named {name}, wanted different names")
        try:
            found[name] = _facts(command_line.resolve([path]).config, gpu)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise mistakes(problems)
    return found


def _facts(config: Config, gpu: Gpu | None) -> dict[str, Any]:
    model = config.model
    facts: dict[str, Any] = {key: getattr(model, key) for key in _SIZES}
    facts |= {"n_kv_head": model.kv_heads, "head_dim": model.head_width, "d_ff": model.ffn_width}
    facts["vocab_size"] = model.padded_vocab_size
    facts |= {key: getattr(model, key) for key in (*KINDS, *_SWITCHES)}
    facts |= {"activation": model.applied_activation, "attention_bias": model.attention_biases}
    count = None if flops.uncountable_parameters(model) else flops.parameters(model)
    for part in ("embedding", "position", "attention", "ffn", "norm", "lm_head", "total", "non_embedding"):
        facts[f"parameters, {part.replace('_', ' ')}"] = None if count is None else getattr(count, part)
    for convention in ("strict", "palm"):
        known = flops.uncountable_flops(model) is None
        per_token = float(flops.flops_per_token(model, convention).training_per_token) / 1e9 if known else None
        facts[f"GFLOP per token, {convention}"] = per_token
    facts["attention / FFN"] = None if flops.uncountable_flops(model) else flops.attention_ffn_ratio(model)
    facts |= {"batch_size": config.train.batch_size, "tokens per iteration": config.tokens_per_iter}
    return facts if gpu is None else facts | _predicted(config, gpu)


def _predicted(config: Config, gpu: Gpu) -> dict[str, Any]:
    names = ("GB", "fits", "ms per iteration", "tokens/s", "MFU %", "MFU is")
    if unplannable(config, gpu) is not None:
        return {f"{gpu.name}: {name}": None for name in names}
    planned = plan(config, gpu, recompute=config.system.recompute)
    mfu = None if planned.mfu is None else 100 * planned.mfu
    speed = (planned.step_ms, planned.tokens_per_sec, mfu, mfu_scale(planned.peak))
    values = (planned.memory.total_gb, planned.fits, *speed)
    return {f"{gpu.name}: {name}": value for name, value in zip(names, values, strict=True)}


def table(facts: dict[str, dict[str, Any]]) -> str:
    """Returns the facts as text: a table of the rows that differ, and below it the facts that are the same in all."""
    rows = {row: [value_text(of[row], 4) for of in facts.values()] for row in next(iter(facts.values()))}
    differs = {row: values for row, values in rows.items() if len(set(values)) > 1 or len(facts) == 1}
    shared = [f"{row} {values[0]}" for row, values in rows.items() if row not in differs]
    first = max(len(row) for row in [*differs, ""])
    columns = [[name, *(values[i] for values in differs.values())] for i, name in enumerate(facts)]
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{'':<{first}}" + "".join(f"  {name:>{width}}" for name, width in zip(facts, widths, strict=True))]
    for row, values in differs.items():
        lines.append(f"{row:<{first}}" + "".join(f"  {v:>{width}}" for v, width in zip(values, widths, strict=True)))
    return "\n".join(lines + (["", "the same in all: " + ", ".join(shared)] if shared else []))
