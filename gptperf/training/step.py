"""The training step: forward, backward, clipping and update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptperf.distributed.buckets import Bucket, gradient_of
from gptperf.model.mask import document_pairs
from gptperf.training.engine import Engine
from gptperf.training.optimizers.base import clip_scale
from gptperf.training.optimizers.schedule import learning_rate
from gptperf.training.stopping import Dropped

__all__ = ["StepResult", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """The results of one step. Tensors are float32 on the device, and reading one waits for the step."""

    loss: Tensor
    """Mean loss over this rank's micro-batches, a scalar."""
    gradient_norm: Tensor
    """Global 2-norm of the gradients before clipping, a scalar."""
    learning_rate: float
    gradients: Tensor | None = None
    """The figures of `GradientMonitor.measure` followed by those of `update`, a float64 vector; None if the step is not
    watched."""
    pairs: Tensor | None = None
    """(query, key) pairs of this rank's sequences, of one head and over all layers, an int64 scalar on the device; None
    if a sequence is one document, so that the configuration tells them."""


def train_step(
    engine: Engine,
    batches: Iterator[Tensor],
    step: int,
    *,
    watched: bool = False,
    drops: Callable[[], bool] | None = None,
) -> StepResult:
    """Runs one iteration: forward and backward over the micro-batches, reduction, clipping, update.

    The host never waits for the device here.

    Args:
        engine: model, weights and optimizer.
        batches: yields int64 `(2, B, T)` per micro-batch, inputs and targets.
        step: iterations done before this one.
        watched: whether to measure gradients and update.
        drops: called before each micro-batch but the first one; if it returns True, the iteration is dropped.

    Raises:
        Dropped: the iteration was dropped. The weights and the optimizer are as before it.
    """
    config, weights, process = engine.config, engine.weights, engine.process
    loss, pairs = _forward_and_backward(engine, batches, step, drops)
    with process.progress.collective("all_reduce of the gradients"):
        weights.finish_gradients()
    # Gradients are divided by the loss scale first, so that norm, monitor and optimizer see their true values.
    engine.scaler.unscale_(engine.optimizer)  # type: ignore[arg-type]
    norm = weights.gradient_norm()
    measured = engine.monitor.measure(weights.pieces(gradient_of, to_save=False)) if watched else None
    divisor, found_inf = clip_scale(norm, config.optimizer.grad_clip)
    engine.skipped += found_inf
    rate = learning_rate(step, config.optimizer, config.train.max_iters)
    _update(engine, divisor, found_inf, rate, watched=watched)
    weights.finish_step()
    figures = None if measured is None else torch.cat([measured, engine.monitor.update()])
    return StepResult(loss, norm, rate, figures, pairs)


def _forward_and_backward(
    engine: Engine, batches: Iterator[Tensor], step: int, drops: Callable[[], bool] | None
) -> tuple[Tensor, Tensor | None]:
    """Runs all micro-batches of a step, and returns their mean loss and `StepResult.pairs`."""
    config, weights, process, model = engine.config, engine.weights, engine.process, engine.model
    total, pairs = torch.zeros((), device=process.device), None
    process.progress.start_iteration(step + 1, engine.micro_batches)
    weights.start_step()
    for micro in range(engine.micro_batches):
        if micro and drops is not None and drops():
            weights.finish_gradients()  # completes the reductions that have begun
            raise Dropped
        _seed_micro_batch(config.train.seed, step, micro * process.world_size + process.rank)
        tokens, targets = next(batches).to(process.device, non_blocking=True)
        weights.start_micro_batch(last=micro == engine.micro_batches - 1)
        if model.document_end is not None:
            count = document_pairs(tokens, model.document_end, model.windows)
            pairs = count if pairs is None else pairs + count
        with engine.autocast():
            loss = model(tokens, targets)
        # The loss is divided by the micro-batches of the whole job, because gradients are summed over micro-batches and
        # ranks.
        engine.scaler.scale(loss / config.train.gradient_accumulation_steps).backward()
        total += loss.detach()
        process.progress.end_part()
    return total / engine.micro_batches, pairs


def _update(engine: Engine, divisor: Tensor, found_inf: Tensor, rate: float, *, watched: bool) -> None:
    """Writes the numbers that vary from step to step into the optimizer's scalars, and updates the weights.

    Args:
        engine: model, weights with reduced gradients, and optimizer.
        divisor, found_inf: the results of `clip_scale`.
        rate: learning rate.
        watched: whether to measure the update.
    """
    optimizer = engine.optimizer
    optimizer.learning_rate.fill_(rate)
    optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
    if engine.scaler.is_enabled() and engine.weights.is_sharded:
        _agree_on_overflow(engine)
    if watched:
        engine.monitor.start_update()
    optimizer.observe = partial(_observe, engine) if watched else None
    # With float16, the scaler first replaces `found_inf` with the value from `unscale_`.
    engine.scaler.step(optimizer)  # type: ignore[arg-type]
    engine.scaler.update()


def _observe(engine: Engine, bucket: Bucket, before: Tensor) -> None:
    """Passes the weights of a bucket before and after the update to the monitor."""
    pieces = engine.weights.pieces_of
    engine.monitor.observe(pieces(bucket, before), pieces(bucket, bucket.master.data))


def _agree_on_overflow(engine: Engine) -> None:
    """Spreads an overflow in one rank's shard to all ranks, so that all skip the step and lower the loss scale."""
    state: Any = engine.scaler._per_optimizer_states[id(engine.optimizer)]
    for found in state["found_inf_per_device"].values():
        engine.weights.summed(found)  # changes it in place; `scaler.step` and `scaler.update` read it


def _seed_micro_batch(seed: int, step: int, micro: int) -> None:
    """Seeds dropout from the position in the run, so that it depends on neither earlier work nor the number of ranks.

    Args:
        seed: seed of the run.
        step: iterations done before this one.
        micro: index of the micro-batch among those of the whole job.
    """
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB) % (1 << 63))
