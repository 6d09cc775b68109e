"""`python -m gptperf.plan CONFIG --gpu=H200 --num_gpus=4`: predicts memory and speed of a run on any GPU."""

import argparse
import json
import sys
from collections.abc import Sequence

from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.errors import ConfigError, main_guard
from gptperf.formats import mfu_scale, number
from gptperf.hardware import Gpu
from gptperf.plan.fit import largest_batch, refusal
from gptperf.plan.gpu_lookup import FIGURES, described_gpu, find_gpu
from gptperf.plan.memory import RECOMPUTE, STRATEGIES, strategy_of
from gptperf.plan.predict import Plan, plan, unplannable
from gptperf.plan.text import STRATEGY_NAMES, plan_lines, plan_record

__all__ = ["main"]

_FIGURES_HELP = {
    "gpu_tflops": "dense peak, in the run's dtype, of a GPU that is not in the table; --gpu is then its name",
    "gpu_memory_gb": "memory of that GPU, as its data sheet prints it",
    "gpu_bandwidth_gb_s": "memory bandwidth of that GPU",
}


def _table(config: Config, gpu: Gpu, chosen: Plan) -> list[str]:
    """Returns a table with a row for every strategy and recompute; the chosen row is marked."""
    lines = [
        f"{'':<3}{'strategy':<10}{'recompute':<11}{'GB a GPU':>9}{'fits':>6}{'largest batch_size':>20}"
        f"{'ms/step':>10}{'tokens/s':>12}{'MFU':>8}"
    ]
    for strategy in STRATEGIES if chosen.num_gpus > 1 else (chosen.strategy,):
        for recompute in RECOMPUTE:
            row = plan(config, gpu, num_gpus=chosen.num_gpus, strategy=strategy, recompute=recompute)
            most = largest_batch(config, row.limit_gb, num_gpus=row.num_gpus, strategy=strategy, recompute=recompute)
            mark = "*" if (strategy, recompute) == (chosen.strategy, chosen.recompute) else ""
            lines.append(
                f"{mark:<3}{STRATEGY_NAMES[strategy]:<10}{recompute:<11}{row.memory.total_gb:>9.1f}"
                f"{'yes' if row.fits else 'no':>6}{most:>20,}{row.step_ms:>10,.1f}{row.tokens_per_sec:>12,.0f}"
                f"{number(row.mfu, '.1%'):>8}"
            )
    return [*lines, f"MFU: {mfu_scale(chosen.peak)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a configuration on a GPU.

    Returns:
        The exit code: 0 if the run fits, else 7, as for a GPU that is out of memory.

    Raises:
        ConfigError: files or flags are wrong, or there is no plan for this model or GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m gptperf.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpu", help="row of the GPU table (python -m gptperf.hardware); default: this machine's GPU")
    for flag, figure in FIGURES.items():
        parser.add_argument(f"--{flag}", metavar=figure.unit, help=_FIGURES_HELP[flag])
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--tokens", type=float, default=None, help="tokens to predict the days for; default: the run's")
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args(argv)
    if args.num_gpus < 1:
        raise ConfigError(f"command line: num_gpus: found {args.num_gpus}, wanted a whole number >= 1; nearest: 1")
    config = command_line.resolve(rest, world_size=args.num_gpus).config
    figures = {flag: getattr(args, flag) for flag in FIGURES}
    gpu = described_gpu(args.gpu, figures, config.system.peak_dtype) or find_gpu(args.gpu)
    reason = unplannable(config, gpu)
    if reason is not None:
        raise ConfigError(f"no plan: {reason}")
    strategy = strategy_of(config)
    chosen = plan(config, gpu, num_gpus=args.num_gpus, strategy=strategy, recompute=config.system.recompute)
    tokens = args.tokens or float(config.train.max_iters) * config.tokens_per_iter
    if args.json:
        record = plan_record(chosen) | {"tokens": tokens, "days": chosen.days(tokens)}
        print(json.dumps(record, indent=2))
        return 0 if chosen.fits else 7
    total = flops.parameters(config.model).total
    print(f"{total:,} parameters, {config.tokens_per_iter:,} tokens per iteration, {args.num_gpus} x {gpu.name}\n")
    print("\n".join(_table(config, gpu, chosen)))
    print("\n" + "\n".join(plan_lines(chosen)))
    print(f"{tokens:,.0f} tokens in {chosen.days(tokens):,.2f} days")
    if not chosen.fits:
        print("\n" + refusal(config, gpu, chosen))
    return 0 if chosen.fits else 7


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
