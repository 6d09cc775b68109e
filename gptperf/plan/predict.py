"""Memory, speed and fit of a run, before it, on any known GPU.

`gptperf.plan.memory` has the memory, `gptperf.plan.step_time` the time; here they are put together, against the GPU's
memory, with the largest micro-batch and the remedies for a run that does not fit. No torch here.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptperf import flops, hardware
from gptperf.config import Config, SystemConfig
from gptperf.errors import ConfigError
from gptperf.formats import number
from gptperf.hardware import Gpu
from gptperf.plan.memory import (
    STRATEGIES,
    Footprint,
    Recompute,
    Strategy,
    allocatable_gb,
    footprint,
    usable_gb,
)
from gptperf.plan.step_time import parts_ms, rates_of

__all__ = [
    "STRATEGY_NAMES",
    "Plan",
    "Remedy",
    "find_gpu",
    "largest_batch",
    "own_gpu",
    "plan",
    "plan_lines",
    "plan_record",
    "refusal",
    "remedies",
    "unplannable",
]

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
STRATEGY_NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "fsdp": "FSDP"}


@dataclass(frozen=True)
class Plan:
    """What a run needs and what it will reach."""

    gpu: str
    num_gpus: int
    strategy: Strategy
    recompute: Recompute
    memory: Footprint
    limit_gb: float
    """What PyTorch can allocate on the GPU."""
    parts_ms: dict[str, float]
    """gemm, attention, memory_bound, optimizer, communication, other; they add up to the step."""
    band: float
    tokens_per_iter: int
    mfu: float | None
    """Strict, 0..1; None where the peak that it is against is not known."""
    peak_basis: str
    """dense, sparse or given."""

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.memory.total_gb <= self.limit_gb

    @property
    def step_ms(self) -> float:
        """An iteration."""
        return sum(self.parts_ms.values())

    @property
    def tokens_per_sec(self) -> float:
        """Of the job."""
        return self.tokens_per_iter / self.step_ms * 1e3

    def days(self, tokens: float) -> float:
        """To train on so many tokens."""
        return tokens / self.tokens_per_sec / 86400


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit."""

    flags: str
    plan: Plan


def unplannable(config: Config, gpu: Gpu | None) -> str | None:
    """Why `plan` cannot say anything, or None."""
    reason = flops.uncountable_parameters(config.model)
    if reason is not None:
        return reason
    if gpu is None:
        return "this GPU is not in the table"
    if config.system.peak_dtype not in gpu.dense_tflops:
        nearest = "; nearest: --dtype=float16" if "float16" in gpu.dense_tflops else ""
        return f"the table has no {config.system.peak_dtype} peak of {gpu.name}{nearest}"
    return None


def own_gpu() -> Gpu | None:
    """The row of this machine's first GPU, or None where there is none, or one that is not in the table."""
    states, _ = hardware.gpu_states()
    return hardware.match_gpu(states[0].name, states[0].memory_gb) if states and states[0].name else None


def find_gpu(name: str | None) -> Gpu:
    """The row of the table that a user means: "H200", "a100 sxm 80", a device's own name; None is this machine's GPU.

    Raises:
        ConfigError: none or several fit; the names are given.
    """
    if name is None:
        own = own_gpu()
        if own is None:
            raise ConfigError(
                "command line: gpu: found none, and no known GPU here; wanted --gpu=NAME, such as --gpu=H100"
            )
        return own
    exact = hardware.match_gpu(name)
    if exact is not None:
        return exact
    words = name.lower().replace("-", " ").split()
    rows = [gpu for gpu in hardware.GPUS if gpu.name.lower().split()[: len(words)] == words]
    rows = rows or [gpu for gpu in hardware.GPUS if all(word in gpu.name.lower().split() for word in words)]
    same = [gpu for gpu in rows if gpu.name.lower().split() == words]
    if len(same or rows) == 1:
        return (same or rows)[0]
    known = ", ".join(gpu.name for gpu in rows or hardware.GPUS)
    raise ConfigError(f"command line: gpu: found {name!r}, wanted one of {known}")


def plan(
    config: Config,
    gpu: Gpu,
    *,
    num_gpus: int = 1,
    strategy: Strategy = "ddp",
    recompute: Recompute = "none",
    reported_gb: float | None = None,
) -> Plan:
    """Predict a run.

    Args:
        config: of the run.
        gpu: a row of the table (`find_gpu`, `hardware.match_gpu`) that has a peak for the compute dtype.
        num_gpus: that share the iteration.
        strategy: what they share out.
        recompute: what backward computes again.
        reported_gb: memory that CUDA reports for this very device; default: from the table.

    Raises:
        ValueError: see `unplannable`.
    """
    reason = unplannable(config, gpu)
    if reason is not None:
        raise ValueError(f"no plan: {reason}")
    parts = parts_ms(config, gpu, num_gpus, strategy, recompute)
    per_token = float(flops.flops_per_token(config.model).training_per_token)
    system = config.system
    peak = hardware.peak_flop_s(gpu, system.peak_dtype, basis=system.peak_basis, peak_tflops=system.peak_tflops)
    achieved = per_token * config.tokens_per_iter / num_gpus / (sum(parts.values()) / 1e3)
    return Plan(
        gpu=gpu.name,
        num_gpus=num_gpus,
        strategy=strategy,
        recompute=recompute,
        memory=footprint(config, num_gpus, strategy, recompute),
        limit_gb=usable_gb(gpu.memory_gb) if reported_gb is None else allocatable_gb(reported_gb),
        parts_ms=parts,
        band=rates_of(gpu).band,
        tokens_per_iter=config.tokens_per_iter,
        mfu=None if peak is None else achieved / peak.flop_s,
        peak_basis=system.peak_basis if peak is None else peak.basis,
    )


def largest_batch(
    config: Config, limit_gb: float, *, num_gpus: int = 1, strategy: Strategy = "ddp", recompute: Recompute = "none"
) -> int:
    """Sequences of a micro-batch on one GPU that fit into `limit_gb`; 0 where not even one does."""

    def fits(batch: int) -> bool:
        return footprint(_with(config, batch_size=batch), num_gpus, strategy, recompute).total_gb <= limit_gb

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with(config: Config, batch_size: int, gradient_accumulation_steps: int | None = None) -> Config:
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
    """The fastest ways to make a run fit that train on the same tokens an iteration, fastest first."""
    fastest: dict[frozenset[str], Remedy] = {}
    for changed, strategy, recompute, flags in _changes(config, given, strategies):
        candidate = plan(
            changed, gpu, num_gpus=given.num_gpus, strategy=strategy, recompute=recompute, reported_gb=reported_gb
        )
        keys = frozenset(flag.partition("=")[0] for flag in flags)
        if keys and candidate.fits and (keys not in fastest or candidate.step_ms < fastest[keys].plan.step_ms):
            fastest[keys] = Remedy(" ".join(flags), candidate)
    ranked = sorted(fastest.items(), key=lambda item: item[1].plan.step_ms)
    # A change of more keys than another one is worth naming only where it is faster.
    kept = [remedy for i, (keys, remedy) in enumerate(ranked) if not any(other < keys for other, _ in ranked[:i])]
    return kept[:most]


def _changes(
    config: Config, given: Plan, strategies: Sequence[Strategy]
) -> Iterator[tuple[Config, Strategy, Recompute, list[str]]]:
    """Configurations near this one, with the flags that make them."""
    train = config.train
    batches = [train.batch_size]
    divisors = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
    batches += [n for n in divisors if n < train.batch_size]
    more = STRATEGIES[STRATEGIES.index(given.strategy) :] if given.num_gpus > 1 else (given.strategy,)
    for batch in batches:
        steps = train.gradient_accumulation_steps * (train.batch_size // batch)
        changed = _with(config, batch_size=batch, gradient_accumulation_steps=steps)
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
    """This one and what takes less memory in it, with the flags that make them."""
    found: list[tuple[SystemConfig, list[str]]] = [(system, [])]
    if system.kernels != "auto":
        found.append((dataclasses.replace(system, kernels="auto"), ["--kernels=auto"]))
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
    """What to say of a run that does not fit: the memory, and the fastest remedies with their memory and speed."""
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
            "no batch_size, recompute or sharding makes it fit: a smaller model, a shorter block_size, more GPUs"
        )
    return "\n  ".join([*lines, "--ignore_plan=True goes on"])


def memory_text(memory: Footprint) -> str:
    """The parts in one line, largest first."""
    parts = sorted(dataclasses.asdict(memory).items(), key=lambda part: -part[1])
    return ", ".join(f"{name.removesuffix('_gb')} {gb:.1f}" for name, gb in parts)


def plan_record(given: Plan) -> dict[str, Any]:
    """A plan as a flat record for logs and JSON."""
    return {
        "gpu": given.gpu,
        "num_gpus": given.num_gpus,
        "strategy": given.strategy,
        "recompute": given.recompute,
        "memory_gb": given.memory.total_gb,
        "memory_parts_gb": {k.removesuffix("_gb"): v for k, v in dataclasses.asdict(given.memory).items()},
        "limit_gb": given.limit_gb,
        "fits": given.fits,
        "step_ms": given.step_ms,
        "parts_ms": given.parts_ms,
        "band": given.band,
        "tokens_per_sec": given.tokens_per_sec,
        "mfu_percent": None if given.mfu is None else 100 * given.mfu,
        "peak_basis": given.peak_basis,
    }


def plan_lines(given: Plan) -> list[str]:
    """A plan in two lines, for the start of a run."""
    fit = "fits" if given.fits else "does NOT fit"
    low, high = given.tokens_per_sec / (1 + given.band), given.tokens_per_sec / (1 - given.band)
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in given.parts_ms.items())
    basis = "" if given.peak_basis == "dense" else f" of the {given.peak_basis} peak"
    return [
        f"{given.memory.total_gb:.1f} GB of {given.limit_gb:.1f} a GPU, {fit}: {memory_text(given.memory)}",
        f"{given.step_ms:.1f} ms an iteration +-{given.band:.0%}, {low:,.0f} to {high:,.0f} tokens/s, "
        f"MFU {number(given.mfu, '.1%')}{basis}: {parts} ms",
    ]
