"""The training step: the objects that it works on, and the one place with autocast, backward, clipping and update."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptperf.config import Config, SystemConfig
from gptperf.distributed.buckets import Bucket, gradient_of
from gptperf.distributed.copy_engine import open_collectives
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.process import Process
from gptperf.distributed.replicated import Replicated
from gptperf.distributed.zero1 import Sharded
from gptperf.model import GPT
from gptperf.monitor.gradients import GradientMonitor
from gptperf.ops import Ops, resolve_ops, without_triton
from gptperf.training import build, selftest
from gptperf.training.optimizers.adamw import AdamW, clip_scale, learning_rate

__all__ = ["Engine", "StepResult", "build_engine", "compile_engine", "train_step"]


@dataclass
class Engine:
    """Model, weights and optimizer of this process."""

    config: Config
    process: Process
    ops: Ops
    model: GPT
    weights: Replicated
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    monitor: GradientMonitor
    skipped: Tensor
    """Steps left out because the gradients were not finite, a float32 scalar on the device."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step in this process."""
        return self.config.train.gradient_accumulation_steps // self.process.world_size

    def autocast(self) -> torch.autocast:
        """Compute in the run's dtype, which the matrices have already."""
        dtype = build.DTYPES[self.config.system.compute_dtype]
        return torch.autocast(self.process.device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the device, float32."""

    loss: Tensor
    """Mean over the step's micro-batches in this process."""
    gradient_norm: Tensor
    """Global 2-norm before clipping."""
    gradients: Tensor | None = None
    """Of `GradientMonitor.measure` and `update`, one after the other, where asked for; float64."""


def build_engine(config: Config, process: Process) -> Engine:
    """The objects of a step, with fresh weights; not compiled yet."""
    dtype = build.DTYPES[config.system.compute_dtype]
    ops = resolve_ops(config.system.kernels, process.device.type)
    broken = process.merged(selftest.broken_ops(ops, config.model, process.device, dtype))
    ops = without_triton(ops, config.system.kernels, broken)
    model = build.build_model(config.model, ops, process.device, config.train.seed)
    model.recompute = config.system.recompute
    single = config.train.gradient_accumulation_steps == process.world_size
    weights = make_weights(model, config.system, process, single)
    optimizer = AdamW(weights.buckets, config.optimizer, ops.adamw)
    scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
    monitor = GradientMonitor(weights.places, weights.numel, process.device, weights.summed, weights.largest)
    skipped = torch.zeros((), device=process.device)
    return Engine(config, process, ops, model, weights, optimizer, scaler, monitor, skipped)


def make_weights(model: GPT, system: SystemConfig, process: Process, single: bool) -> Replicated:
    """Take over a model's parameters, by the strategy of the configuration; `single`: one micro-batch a step."""
    collectives = open_collectives(process, system.communication, build.DTYPES[system.reduce_dtype])
    where = model, build.DTYPES[system.weight_copy_dtype], collectives
    if system.use_fsdp:
        return FullySharded(
            *where,
            min_num_params=system.fsdp_min_num_params,
            reduce_once=system.fsdp_reduce_once,
            gather_once=system.fsdp_gather_once,
        )
    if system.use_zero1:
        announces = not (system.compile and system.compile_scope == "model")
        return Sharded(*where, single=single, announces=announces)
    return Replicated(*where, single=single)


def compile_engine(engine: Engine) -> str:
    """Compile model and optimizer where that was asked for and can be done.

    Returns:
        "model", "block", or "off" with the reason, for the log.
    """
    scope = build.compile_model(engine.model, engine.config.system, engine.process.device)
    if not scope.startswith("off") and engine.ops.chosen["adamw"] == "eager":
        engine.optimizer.op = torch.compile(engine.optimizer.op)
    return scope


def train_step(engine: Engine, batches: Iterator[Tensor], step: int, *, watched: bool = False) -> StepResult:
    """One iteration: forward and backward over the micro-batches, reduce, clip, update. Nothing waits for the device.

    Args:
        engine: what is trained.
        batches: int64 `(2, B, T)` a micro-batch, inputs and targets.
        step: iterations done before this one.
        watched: whether the figures of gradients and update are wanted.
    """
    config, weights, process = engine.config, engine.weights, engine.process
    total = torch.zeros((), device=process.device)
    process.progress.start_iteration(step + 1)
    weights.start_step()
    for micro in range(engine.micro_batches):
        _seed_micro_batch(config.train.seed, step, micro * process.world_size + process.rank)
        tokens, targets = next(batches).to(process.device, non_blocking=True)
        weights.start_micro_batch(last=micro == engine.micro_batches - 1)
        with engine.autocast():
            loss = engine.model(tokens, targets)
        engine.scaler.scale(loss / config.train.gradient_accumulation_steps).backward()
        total += loss.detach()
        process.progress.count += 1
    with process.progress.collective("all_reduce of the gradients"):
        weights.finish_gradients()
    engine.scaler.unscale_(engine.optimizer)
    norm = weights.gradient_norm()
    measured = engine.monitor.measure(weights.pieces(gradient_of, to_save=False)) if watched else None
    divisor, found_inf = clip_scale(norm, config.optimizer.grad_clip)
    engine.skipped += found_inf
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.optimizer, config.train.max_iters)
    engine.optimizer.grad_scale, engine.optimizer.found_inf = divisor, found_inf
    if engine.scaler.is_enabled() and weights.is_sharded:
        _agree_on_overflow(engine)
    if watched:
        engine.monitor.start_update()
    engine.optimizer.observe = partial(_observe, engine) if watched else None
    engine.scaler.step(engine.optimizer)
    engine.scaler.update()
    weights.finish_step()
    figures = None if measured is None else torch.cat([measured, engine.monitor.update()])
    return StepResult(total / engine.micro_batches, norm, figures)


def _observe(engine: Engine, bucket: Bucket, before: Tensor) -> None:
    """Tell the monitor what the update has done to a bucket."""
    pieces = engine.weights.pieces_of
    engine.monitor.observe(pieces(bucket, before), pieces(bucket, bucket.master.data))


def _agree_on_overflow(engine: Engine) -> None:
    """A share of the gradients that overflowed is an overflow for every process's scale."""
    state: Any = engine.scaler._per_optimizer_states[id(engine.optimizer)]
    for found in state["found_inf_per_device"].values():
        engine.weights.summed(found)


def _seed_micro_batch(seed: int, step: int, micro: int) -> None:
    """Make dropout a function of the place in the run, so that it does not depend on what ran before or elsewhere."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB) % (1 << 63))
