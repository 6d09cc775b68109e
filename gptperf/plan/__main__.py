"""`python -m gptperf.plan CONFIG --gpu=H200 --num_gpus=4`: predicts memory and speed of a run on any GPU."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.config.flags import Flags, take
from gptperf.config.keys import Range
from gptperf.errors import ConfigError, run_main
from gptperf.formats import counted, mfu_scale, number
from gptperf.hardware import Gpu
from gptperf.plan.fit import largest_batch, refusal
from gptperf.plan.gpu_lookup import FIGURES, described_gpu, find_gpu
from gptperf.plan.memory import RECOMPUTE, STRATEGIES, strategy_of
from gptperf.plan.predict import Plan, plan, unplannable
from gptperf.plan.text import STRATEGY_NAMES, plan_lines, plan_record

__all__ = ["main"]


def _table(config: Config, gpu: Gpu, chosen: Plan) -> list[str]:
    """Returns a table with a row for every strategy and recompute; the chosen row is marked."""
    lines = [
        f"{'':<3}{'strategy':<10}{'recompute':<11}{'GB per GPU':>11}{'fits':>6}{'largest batch_size':>20}"
        f"{'ms/step':>10}{'tokens/s':>12}{'MFU':>8}"
    ]
    for strategy in STRATEGIES if chosen.num_gpus > 1 else (chosen.strategy,):
        for recompute in RECOMPUTE:
            row = plan(config, gpu, num_gpus=chosen.num_gpus, strategy=strategy, recompute=recompute)
            most = largest_batch(config, row.limit_gb, num_gpus=row.num_gpus, strategy=strategy, recompute=recompute)
            mark = "*" if (strategy, recompute) == (chosen.strategy, chosen.recompute) else ""
            lines.append(
                f"{mark:<3}{STRATEGY_NAMES[strategy]:<10}{recompute:<11}{row.memory.total_gb:>11.1f}"
                f"{'yes' if row.fits else 'no':>6}{most:>20,}{row.step_ms:>10,.1f}{row.tokens_per_sec:>12,.0f}"
                f"{number(row.mfu, '.1%'):>8}"
            )
    return [*lines, f"MFU: {mfu_scale(chosen.peak)}"]


@dataclass(frozen=True, kw_only=True)
class _PlanFlags(Flags):
    """What to predict."""

    gpu: str | None = None
    """Row of the GPU table (python -m gptperf.hardware); default: this machine's GPU."""
    gpu_tflops: str | None = None
    """Dense peak in TFLOP/s, in the dtype of the run, of a GPU that is not in the table; --gpu is then its name."""
    gpu_memory_gb: str | None = None
    """Memory of that GPU in GB, as its data sheet prints it."""
    gpu_bandwidth_gb_s: str | None = None
    """Memory bandwidth of that GPU in GB/s."""
    num_gpus: Annotated[int, Range(1)] = 1
    """Number of GPUs."""
    tokens: Annotated[float, Range(0, exclude_low=True)] | None = None
    """Tokens to predict the days for; default: those of the run."""
    json: bool = False
    """Print the plan as JSON."""

    @property
    def figures(self) -> dict[str, str | None]:
        """The figures of a described GPU, as the user wrote them."""
        return {name: getattr(self, name) for name in FIGURES}

    def problems(self) -> Sequence[str]:
        """Returns what is wrong with the GPU."""
        try:
            if described_gpu(self.gpu, self.figures, "bfloat16") is None and self.gpu is not None:
                find_gpu(self.gpu)
        except ConfigError as error:
            return error.problems
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a configuration on a GPU.

    Returns:
        The exit code: 0 if the run fits, else 7, as for a GPU that is out of memory.

    Raises:
        ConfigError: files or flags are wrong, or there is no plan for this model or GPU.
    """
    taken = take(_PlanFlags, argv, "gptperf.plan", "Predict memory and speed of a run on any GPU.")
    args = taken.flags
    config = command_line.resolve(taken.rest, world_size=args.num_gpus, taken=taken).config
    gpu = described_gpu(args.gpu, args.figures, config.system.peak_dtype) or find_gpu(args.gpu)
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
    tokens_per_iter = counted(config.tokens_per_iter, "token")
    print(f"{total:,} parameters, {tokens_per_iter} per iteration, {args.num_gpus} x {gpu.name}\n")
    print("\n".join(_table(config, gpu, chosen)))
    print("\n" + "\n".join(plan_lines(chosen)))
    print(f"{tokens:,.0f} tokens in {chosen.days(tokens):,.2f} days")
    for line in config.notes():
        print(line)
    if not chosen.fits:
        print("\n" + refusal(config, gpu, chosen))
    return 0 if chosen.fits else 7


if __name__ == "__main__":
    run_main(main)
