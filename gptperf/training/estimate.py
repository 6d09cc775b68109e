"""Estimates the time of a run before it starts: on a CPU from a short measurement, on a GPU from the plan.

The measurement trains a model of the same width and components with fewer layers, a smaller vocabulary and fewer
tokens, and scales its time by the FLOPs. It changes no state of the run: it restores the random state of PyTorch.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptperf import flops
from gptperf.config import Config, ModelConfig, SystemConfig
from gptperf.errors import ConfigError
from gptperf.formats import rough_duration
from gptperf.model import GPT
from gptperf.plan import Plan
from gptperf.training.build import DTYPES

__all__ = ["SLOW_S", "Estimate", "available_gb", "check_sizes_given", "estimate", "slow_warning", "tasks_interval"]

SLOW_S = 60.0
"""An iteration that takes longer than this gives a warning."""
_PROBE_S = 0.15
_MOST_WIDTH, _MOST_TOKENS, _MOST_VOCABULARY, _MOST_PARAMETERS = 1024, 128, 8192, 2_000_000
# Bytes of the master weight, gradient, two moments and the copy in the compute dtype, for each parameter.
_STATE_BYTES = 18
# Passes over float32 numbers, each of which reads two and writes one: the update with clipping, and the addition of a
# micro-batch's gradients.
_UPDATE_PASSES, _GRADIENT_PASSES = 8, 2
_FORWARD = 1 / 3  # share of the forward pass in the FLOPs of training
_SIZES = (
    "n_layer",
    "n_head",
    "n_embd",
    "d_ff",
    "block_size",
    "vocab_size",
    "batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Estimate:
    """Expected times of a run, without its start and its compilation."""

    iteration_s: float
    evaluation_s: float
    sample_s: float
    tasks_s: float = 0.0
    """Time of the tasks of `eval_tasks`, in each evaluation that has them."""

    def total_s(self, config: Config, done: int = 0) -> float:
        """Returns the seconds of the iterations after the first `done` ones, with their evaluations and the sample."""
        left = max(0, config.train.max_iters - done)
        tasks_s = _dues(done, config.train.max_iters, tasks_interval(config)) * self.tasks_s if self.tasks_s else 0.0
        return left * self.iteration_s + evaluations(config, done) * self.evaluation_s + tasks_s + self.sample_s

    def line(self, config: Config, done: int = 0) -> str:
        """Returns the estimate as one line."""
        left, count = max(0, config.train.max_iters - done), evaluations(config, done)
        times = (self.iteration_s, self.evaluation_s, self.total_s(config, done))
        iteration, evaluation, total = map(rough_duration, times)
        tasks = f", {rough_duration(self.tasks_s)} its tasks" if self.tasks_s else ""
        return (
            f"estimate, within a factor of 2: {iteration} an iteration, {evaluation} an evaluation{tasks}, and {total} "
            f"in all (iterations: {left:,}, evaluations: {count:,})"
        )


def evaluations(config: Config, done: int) -> int:
    """Returns the number of evaluations after the first `done` iterations; the last iteration is evaluated too."""
    last, interval = config.train.max_iters, config.train.eval_interval
    count = _dues(done, last, interval)
    if config.train.eval_tasks:
        both = math.lcm(interval, tasks_interval(config))
        count += _dues(done, last, tasks_interval(config)) - _dues(done, last, both)
    return count


def tasks_interval(config: Config) -> int:
    """Returns the number of iterations between evaluations of `eval_tasks`."""
    return config.train.eval_tasks_interval or config.train.eval_interval


def _dues(done: int, last: int, interval: int) -> int:
    """Returns how often something is due after `done` iterations: at multiples of the interval and at the last one."""
    return 0 if done >= last else last // interval - done // interval + (last % interval > 0)


def check_sizes_given(origins: Mapping[str, str], device: torch.device) -> None:
    """Refuses to train the default model, which is GPT-2 124M, on a CPU if nobody asked for it.

    Raises:
        ConfigError: the device is a CPU, and no file and no flag sets a size of the model or of the batch.
    """
    if device.type == "cpu" and all(origins[key] == "default" for key in _SIZES):
        raise ConfigError(
            "found no configuration, no size, and no GPU for the default, GPT-2 124M with 491,520 tokens per "
            "iteration; wanted `make train` or `python -m gptperf.train tiny`, a model that a CPU trains "
            "in minutes, or `python -m gptperf.train gpt2_124m` to train GPT-2 124M on the CPU"
        )


def estimate(
    config: Config,
    world_size: int,
    device: torch.device,
    plan: Plan | None,
    val_tokens: Sequence[int],
    task_tokens: int = 0,
) -> Estimate | None:
    """Estimates the times of a run, or returns None if a component has no card, or on a GPU without a plan.

    Every rank of a job on CPUs should call this at the same time, because they share the cores.

    Args:
        config: the run.
        world_size: ranks of the job.
        device: device of this rank.
        plan: plan of the run, on a GPU.
        val_tokens: tokens of the validation split of each data set.
        task_tokens: tokens of the tasks of `eval_tasks`.
    """
    if flops.uncountable_parameters(config.model) is not None:
        return None
    micro_batches = config.train.gradient_accumulation_steps / world_size
    if device.type == "cuda":
        if plan is None:
            return None
        micro_s, iteration_s = plan.step_ms / 1e3 / micro_batches, plan.step_ms / 1e3
        token_s = 2e-4 * config.model.n_layer  # a step of generation waits for the host
    else:
        flop_s, pass_s = _measure(config.model, config.system, config.train.batch_size)
        parameters = flops.parameters(config.model).total
        tokens = config.train.batch_size * config.model.block_size
        micro_s = tokens * flops.flops_per_token(config.model).training_per_token / flop_s
        iteration_s = micro_batches * (micro_s + _GRADIENT_PASSES * pass_s * parameters)
        iteration_s += _UPDATE_PASSES * pass_s * parameters
        token_s = parameters * pass_s + 5e-4 * config.model.n_layer
    batch_tokens = config.train.batch_size * config.model.block_size
    batches = [min(config.train.eval_iters, max(1, tokens // batch_tokens)) for tokens in val_tokens]
    evaluation_s = sum(-(-count // world_size) for count in batches) * micro_s * _FORWARD
    tasks_s = task_tokens / batch_tokens / world_size * micro_s * _FORWARD
    return Estimate(iteration_s, evaluation_s, config.log.sample_tokens * token_s, tasks_s)


def slow_warning(found: Estimate, config: Config, device: torch.device) -> str | None:
    """Returns a warning about an iteration of more than `SLOW_S`, or about too little memory on a CPU, or None."""
    parameters, reasons = flops.parameters(config.model).total, []
    if found.iteration_s > SLOW_S:
        reasons.append(
            f"an iteration of {config.tokens_per_iter:,} tokens with {parameters / 1e6:,.1f}M parameters takes about "
            f"{rough_duration(found.iteration_s)} here, and the run {rough_duration(found.total_s(config))}"
        )
    free_gb, needed_gb = available_gb(), _STATE_BYTES * parameters / 1e9
    if device.type == "cpu" and free_gb is not None and needed_gb > free_gb:
        reasons.append(f"weights and optimizer need {needed_gb:.1f} GB of memory, and {free_gb:.1f} GB are available")
    if not reasons:
        return None
    remedy = "a smaller configuration (python -m gptperf.train tiny)"
    if found.iteration_s > SLOW_S:
        remedy += f", or a lower gradient_accumulation_steps = {config.train.gradient_accumulation_steps}"
        remedy += f" or batch_size = {config.train.batch_size}"
    return f"{'; '.join(reasons)}. Quicker: {remedy}"


def available_gb() -> float | None:
    """Returns the memory in GB (1e9 bytes) that new processes can use without swapping, or None if it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _smaller(model: ModelConfig) -> ModelConfig:
    """Returns a model of the same components and, if it is not very wide, the same width, that is quick to train."""
    heads = max(1, min(model.n_head, _MOST_WIDTH // model.head_width))
    width = max(1, min(model.n_embd * heads // model.n_head, max(_MOST_WIDTH, heads * model.head_width)))
    changes: dict[str, Any] = {
        "n_head": heads,
        "n_kv_head": None if heads < model.n_head else model.n_kv_head,
        "n_embd": width,
        "d_ff": max(1, min(model.ffn_width * width // model.n_embd, 4 * _MOST_WIDTH)),
        "block_size": min(model.block_size, _MOST_TOKENS),
        "vocab_size": min(model.padded_vocab_size, _MOST_VOCABULARY),
        "vocab_multiple": 1,
        "attention_backend": model.attention_backend if model.attention_backend != "flash_attn" else "sdpa",
    }
    one = dataclasses.replace(model, n_layer=1, **changes)
    count = flops.parameters(one)
    layers = max(1, min(model.n_layer, _MOST_PARAMETERS // (count.attention + count.ffn)))
    return dataclasses.replace(one, n_layer=layers)


def _measure(model: ModelConfig, system: SystemConfig, batch_size: int) -> tuple[float, float]:
    """Returns the FLOP/s of forward and backward, and the seconds of a pass over one float32 number, on this CPU."""
    small, dtype = _smaller(model), DTYPES[system.compute_dtype]
    with torch.random.fork_rng(devices=[]):
        probe = GPT(small)
        for parameter in probe.parameters():
            if parameter.ndim >= 2:  # as the copy of the weights that the model reads in training
                parameter.data = parameter.data.to(dtype)
        begin, best, rows, passes = time.perf_counter(), 0.0, 1, 0
        while time.perf_counter() - begin < _PROBE_S:  # the best rate counts, because the first pass fills caches
            start = time.perf_counter()
            _train_once(probe, rows, dtype)
            passed_s = time.perf_counter() - start
            best = max(best, rows * small.block_size * flops.flops_per_token(small).training_per_token / passed_s)
            passes += 1
            if rows == batch_size and passes > 1:
                break
            rows = min(2 * rows, batch_size)
        numbers = torch.zeros(2, 1 << 20)
        numbers[0].add_(numbers[1])
        start = time.perf_counter()
        numbers[0].add_(numbers[1])
        return best, (time.perf_counter() - start) / numbers.shape[1]


def _train_once(probe: GPT, rows: int, dtype: torch.dtype) -> None:
    tokens = torch.zeros(rows, probe.config.block_size, dtype=torch.int64)
    probe.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = probe(tokens, tokens)
    loss.backward()
