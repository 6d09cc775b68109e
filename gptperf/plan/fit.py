"""Finds what fits into the memory of a GPU: the largest micro-batch, and the changes that make a run fit."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptperf.config import Config, SystemConfig
from gptperf.hardware import Gpu
from gptperf.plan.memory import RECOMPUTE, STRATEGIES, Recompute, Strategy, footprint
from gptperf.plan.predict import Plan, plan
from gptperf.plan.text import memory_text

__all__ = ["Remedy", "largest_batch", "refusal", "remedies"]


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit."""

    flags: str
    """Command line flags that make the change."""
    plan: Plan
    """The plan of the run with that change."""


def largest_batch(
    config: Config, limit_gb: float, *, num_gpus: int = 1, strategy: Strategy = "ddp", recompute: Recompute = "none"
) -> int:
    """Returns the largest number of sequences in a micro-batch that fits into `limit_gb` of one GPU, or 0."""

    def fits(batch: int) -> bool:
        return footprint(_with_batch(config, batch_size=batch), num_gpus, strategy, recompute).total_gb <= limit_gb

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_batch(config: Config, batch_size: int, gradient_accumulation_steps: int | None = None) -> Config:
    steps = gradient_accumulation_steps or config.train.gradient_accumulation_steps
    train = dataclasses.replace(config.train, batch_size=batch_size, gradient_accumulation_steps=steps)
    return dataclasses.replace(config, train=train)


def remedies(
    config: Config,
    gpu: Gpu,
    given: Plan,
    reported_gb: float | None = None,
    strategies: Sequence[Strategy] = STRATEGIES,
    most: int = 3,
) -> list[Remedy]:
    """Returns the fastest changes that make a run fit, fastest first; the tokens of an iteration stay the same.

    Args:
        config: the run.
        gpu: row of the run's GPU in the GPU table.
        given: the plan of the run, which does not fit.
        reported_gb: memory that CUDA reports for this device; default: from the table.
        strategies: strategies that a change may choose, besides the one of the run.
        most: maximum number of remedies.
    """
    fastest: dict[frozenset[str], Remedy] = {}
    for changed, strategy, recompute, flags in _changes(config, given, strategies):
        candidate = plan(
            changed, gpu, num_gpus=given.num_gpus, strategy=strategy, recompute=recompute, reported_gb=reported_gb
        )
        keys = frozenset(flag.partition("=")[0] for flag in flags)
        if keys and candidate.fits and (keys not in fastest or candidate.step_ms < fastest[keys].plan.step_ms):
            fastest[keys] = Remedy(" ".join(flags), candidate)
    ranked = sorted(fastest.items(), key=lambda item: item[1].plan.step_ms)
    # A remedy that changes all keys of another remedy, and more keys, is listed only if it is faster.
    kept = [remedy for i, (keys, remedy) in enumerate(ranked) if not any(other < keys for other, _ in ranked[:i])]
    return kept[:most]


def _changes(
    config: Config, given: Plan, strategies: Sequence[Strategy]
) -> Iterator[tuple[Config, Strategy, Recompute, list[str]]]:
    """Yields configurations near this one: smaller micro-batches, other kernels, more sharding and recomputation."""
    train = config.train
    batches = [train.batch_size]
    divisors = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
    batches += [n for n in divisors if n < train.batch_size]
    more = STRATEGIES[STRATEGIES.index(given.strategy) :] if given.num_gpus > 1 else (given.strategy,)
    for batch in batches:
        steps = train.gradient_accumulation_steps * (train.batch_size // batch)
        changed = _with_batch(config, batch_size=batch, gradient_accumulation_steps=steps)
        for system, flags_of_system in _systems(config.system, given.strategy):
            for strategy in (x for x in more if x == given.strategy or x in strategies):
                for recompute in RECOMPUTE[RECOMPUTE.index(given.recompute) :]:
                    flags = []
                    if batch != train.batch_size:
                        flags += [f"--batch_size={batch}", f"--gradient_accumulation_steps={steps}"]
                    flags += flags_of_system
                    if strategy != given.strategy:
                        flags.append(f"--use_{strategy}=True")
                    if recompute != given.recompute:
                        flags.append(f"--recompute={recompute}")
                    yield dataclasses.replace(changed, system=system), strategy, recompute, flags


def _systems(system: SystemConfig, strategy: Strategy) -> list[tuple[SystemConfig, list[str]]]:
    """Returns this section and variants of it that take less memory, each with the flags that select it."""
    found: list[tuple[SystemConfig, list[str]]] = [(system, [])]
    if system.kernels != "auto":
        found.append((dataclasses.replace(system, kernels="auto"), ["--kernels=auto"]))
    if system.keeps_ffn:
        found += [(dataclasses.replace(x, recompute_ffn=True), [*f, "--recompute_ffn=True"]) for x, f in found]
    if strategy == "fsdp" and system.fsdp_gather_once:
        found += [(dataclasses.replace(x, fsdp_gather_once=False), [*f, "--fsdp_gather_once=False"]) for x, f in found]
    if strategy == "fsdp" and system.fsdp_reduce_once:
        found += [(dataclasses.replace(x, fsdp_reduce_once=False), [*f, "--fsdp_reduce_once=False"]) for x, f in found]
    return found


def refusal(
    config: Config,
    gpu: Gpu,
    given: Plan,
    reported_gb: float | None = None,
    strategies: Sequence[Strategy] = STRATEGIES,
) -> str:
    """Returns the error message of a run that does not fit: its memory, and the fastest remedies.

    Each remedy has its memory and speed. See `remedies` for the arguments.
    """
    lines = [
        f"the plan needs {given.memory.total_gb:.1f} GB of the {given.limit_gb:.1f} GB that PyTorch can allocate on "
        f"{given.gpu}: {memory_text(given.memory)}"
    ]
    found = remedies(config, gpu, given, reported_gb, strategies)
    for remedy in found:
        other = remedy.plan
        lines.append(
            f"{remedy.flags}: {other.memory.total_gb:.1f} GB, {other.tokens_per_sec:,.0f} tokens/s "
            f"({other.tokens_per_sec / given.tokens_per_sec - 1:+.1%})"
        )
    if not found:
        lines.append(
            "no batch_size, recompute or sharding makes it fit; use a smaller model, a shorter block_size or more GPUs"
        )
    return "\n  ".join([*lines, "--ignore_plan=True starts the run anyway"])
