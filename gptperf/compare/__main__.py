"""Runs or architectures side by side: `python -m gptperf.compare out/*` or `--configs configs/*.toml`.

Runs (folders, run_*.jsonl, run_*.json) are ranked by their loss at equal tokens, with the configuration keys that
differ; --html writes a page with their curves. Of configurations:
components, parameters by part, matmul FLOPs of a trained token, and what `gptperf.plan` predicts on one GPU: --gpu, or
the one here. A row in which all configurations agree is printed once, at the end. No torch here.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptperf import flops
from gptperf.compare import ranking
from gptperf.config import Config, command_line
from gptperf.errors import ConfigError, DataError, main_guard
from gptperf.files import replace_text
from gptperf.hardware import Gpu
from gptperf.monitor.runs import read_runs
from gptperf.plan import find_gpu, own_gpu, plan, unplannable
from gptperf.registry import KINDS
from gptperf.report import tables as page

__all__ = ["compare", "main", "rank_runs", "table"]

_SIZES = ("n_layer", "n_head", "n_embd", "block_size")
_SWITCHES = ("bias", "weight_tying", "qk_norm", "dropout")


def compare(paths: Sequence[str], gpu: Gpu | None) -> dict[str, dict[str, Any]]:
    """Facts of every configuration.

    Args:
        paths: TOML files, each read on its own.
        gpu: that the speed is predicted on, one of them; None: not predicted.

    Returns:
        Name of the file without its ending -> row name -> value; None where it cannot be known.

    Raises:
        ConfigError: a file is wrong, or two have one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        name = Path(path).stem
        if name in found:
            raise ConfigError(f"command line: configs: found two files named {name}, wanted different names")
        found[name] = _facts(command_line.resolve([path]).config, gpu)
    return found


def _facts(config: Config, gpu: Gpu | None) -> dict[str, Any]:
    model = config.model
    facts: dict[str, Any] = {key: getattr(model, key) for key in _SIZES}
    facts |= {"n_kv_head": model.kv_heads, "d_ff": model.ffn_width, "vocab_size": model.padded_vocab_size}
    facts |= {key: getattr(model, key) for key in (*KINDS, *_SWITCHES)}
    facts["activation"] = model.applied_activation
    count = None if flops.uncountable_parameters(model) else flops.parameters(model)
    for part in ("embedding", "position", "attention", "ffn", "norm", "lm_head", "total", "non_embedding"):
        facts[f"parameters, {part.replace('_', ' ')}"] = None if count is None else getattr(count, part)
    for convention in ("strict", "palm"):
        known = flops.uncountable_flops(model) is None
        per_token = float(flops.flops_per_token(model, convention).training_per_token) / 1e9 if known else None
        facts[f"GFLOP a token, {convention}"] = per_token
    facts["attention / FFN"] = None if flops.uncountable_flops(model) else flops.attention_ffn_ratio(model)
    facts |= {"batch_size": config.train.batch_size, "tokens an iteration": config.tokens_per_iter}
    return facts if gpu is None else facts | _predicted(config, gpu)


def _predicted(config: Config, gpu: Gpu) -> dict[str, Any]:
    names = ("GB", "fits", "ms an iteration", "tokens/s", "MFU %")
    if unplannable(config, gpu) is not None:
        return {f"{gpu.name}: {name}": None for name in names}
    planned = plan(config, gpu, recompute=config.system.recompute)
    mfu = None if planned.mfu is None else 100 * planned.mfu
    values = (planned.memory.total_gb, planned.fits, planned.step_ms, planned.tokens_per_sec, mfu)
    return {f"{gpu.name}: {name}": value for name, value in zip(names, values, strict=True)}


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(facts: dict[str, dict[str, Any]]) -> str:
    """The facts as text: what differs in columns, what all share below."""
    rows = {row: [_text(of[row]) for of in facts.values()] for row in next(iter(facts.values()))}
    differs = {row: values for row, values in rows.items() if len(set(values)) > 1 or len(facts) == 1}
    shared = [f"{row} {values[0]}" for row, values in rows.items() if row not in differs]
    first = max(len(row) for row in [*differs, ""])
    columns = [[name, *(values[i] for values in differs.values())] for i, name in enumerate(facts)]
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{'':<{first}}" + "".join(f"  {name:>{width}}" for name, width in zip(facts, widths, strict=True))]
    for row, values in differs.items():
        lines.append(f"{row:<{first}}" + "".join(f"  {v:>{width}}" for v, width in zip(values, widths, strict=True)))
    return "\n".join(lines + (["", "the same in all: " + ", ".join(shared)] if shared else []))


def rank_runs(paths: Sequence[str], html: Path | None, as_json: bool) -> str:
    """What is printed of runs.

    Args:
        paths: folders of runs, run_*.jsonl, run_*.json.
        html: page to write.
        as_json: print JSON.

    Raises:
        DataError: none of them can be read.
        DeviceError: a package that the page needs is not installed.
        DiskError: the page cannot be written.
    """
    runs, left_out = read_runs(paths)
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out)
        raise DataError(f"found no run, wanted folders of runs, run_*.jsonl or run_*.json: {reasons}")
    ranked = ranking.rank(runs, left_out)
    if html is not None:
        replace_text(html, ranking.ranking_html(ranked))
    if as_json:
        return json.dumps(ranking.record(ranked, left_out), indent=2, allow_nan=False)
    differing = ranking.differing_table(ranked)
    parts = [ranked.how, page.aligned(ranking.ranking_table(ranked))]
    parts += [f"what differs:\n{page.aligned(differing)}"] if differing is not None else []
    parts += ["\n".join(ranked.remarks)] if ranked.remarks else []
    return "\n\n".join(parts + ([f"page: {html}"] if html is not None else []))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m gptperf.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, run_*.jsonl or run_*.json")
    parser.add_argument("--configs", nargs="+", metavar="CONFIG.toml", help="compare architectures instead")
    parser.add_argument("--gpu", help="with --configs: that the speed is predicted on; default: the one here")
    parser.add_argument("--html", type=Path, metavar="PATH", help="of runs: write a page with their curves")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if (args.configs is None) == (not args.runs):
        parser.error("wanted runs, or --configs with configurations, not both")
    if args.runs:
        if args.gpu is not None:
            parser.error("--gpu goes with --configs")
        print(rank_runs(args.runs, args.html, args.json))
        return 0
    if args.html is not None:
        parser.error("--html goes with runs")
    facts = compare(args.configs, own_gpu() if args.gpu is None else find_gpu(args.gpu))
    print(json.dumps(facts, indent=2) if args.json else table(facts))
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
