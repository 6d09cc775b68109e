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
    config, process = engine.config, engine.process
    loss, pairs = _forward_and_backward(engine, batches, step, drops)
    rate = learning_rate(step, config.optimizer, config.train.max_iters)
    engine.optimizer.learning_rate.fill_(rate)
    if engine.graphs is None or process.world_size > 1:
        norm, figures = _reduce_and_update(engine, watched=watched)
    else:
        norm, figures = engine.graphs.run(("update", watched), lambda: _reduce_and_update(engine, watched=watched))
        norm, figures = norm.clone(), None if figures is None else figures.clone()
    return StepResult(loss, norm, rate, figures, pairs)


def _forward_and_backward(
    engine: Engine, batches: Iterator[Tensor], step: int, drops: Callable[[], bool] | None
) -> tuple[Tensor, Tensor | None]:
    """Runs all micro-batches of a step, and returns their mean loss and `StepResult.pairs`."""
    config, weights, process, model = engine.config, engine.weights, engine.process, engine.model
    total, pairs = torch.zeros((), device=process.device), None
    process.progress.start_iteration(step + 1, engine.micro_batches)
    weights.start_step()
    if engine.float8 is not None:
        engine.float8.start_step()
    for micro in range(engine.micro_batches):
        if micro and drops is not None and drops():
            weights.finish_gradients()  # completes the reductions that have begun
            raise Dropped
        _seed_micro_batch(config.train.seed, step, micro * process.world_size + process.rank)
        first, last = micro == 0, micro == engine.micro_batches - 1
        graphs = engine.graphs if _is_local(engine, first=first, last=last) else None
        batch = next(batches)
        batch = batch.to(process.device, non_blocking=True) if graphs is None else graphs.static(batch)
        weights.start_micro_batch(last)
        if model.document_end is not None:
            count = document_pairs(batch[0], model.document_end, model.windows)
            pairs = count if pairs is None else pairs + count
        if graphs is None:
            total += _micro_batch(engine, batch)
        else:
            total += graphs.run(("micro-batch", first, last), partial(_micro_batch, engine, batch))
        process.progress.end_part()
    return total / engine.micro_batches, pairs


def _is_local(engine: Engine, *, first: bool, last: bool) -> bool:
    """Whether a micro-batch neither sends nor receives anything, so that a CUDA graph can record it.

    In the last micro-batch of a step gradients are reduced. In the first one, ZeRO-1 gathers the updated weights.
    """
    return engine.process.world_size == 1 or not (last or (first and engine.weights.is_sharded))


def _micro_batch(engine: Engine, batch: Tensor) -> Tensor:
    """Runs forward and backward of a micro-batch `(2, B, T)`, and returns its loss, a float32 scalar."""
    if engine.float8 is not None:
        engine.float8.start_micro_batch()
    with engine.autocast():
        loss = engine.model(batch[0], batch[1])
    # The loss is divided by the micro-batches of the whole job, because gradients are summed over micro-batches and
    # ranks.
    engine.scaler.scale(loss / engine.config.train.gradient_accumulation_steps).backward()
    if engine.float8 is not None:
        engine.float8.collect()
    return loss.detach()


def _reduce_and_update(engine: Engine, *, watched: bool) -> tuple[Tensor, Tensor | None]:
    """Completes the gradients and updates the weights.

    Args:
        engine: model, weights and optimizer, whose learning rate is set.
        watched: whether to measure gradients and update.

    Returns:
        The gradient norm, and `StepResult.gradients`.
    """
    weights = engine.weights
    with engine.process.progress.collective("all_reduce of the gradients"):
        weights.finish_gradients()
    if engine.scaler.is_enabled():
        # The scaler refuses a second `unscale_` before its `update`, and the recording of a CUDA graph may have stopped
        # between them.
        engine.scaler._per_optimizer_states.clear()
    # Gradients are divided by the loss scale first, so that norm, monitor and optimizer see their true values.
    engine.scaler.unscale_(engine.optimizer)  # type: ignore[arg-type]
    norm = weights.gradient_norm()
    measured = None
    if watched:
        measured = engine.monitor.measure(weights.pieces(gradient_of, to_save=False))
    divisor, found_inf = clip_scale(norm, engine.config.optimizer.grad_clip)
    engine.skipped += found_inf
    _update(engine, divisor, found_inf, watched=watched)
    if engine.float8 is not None:
        engine.float8.update(engine.process)
    weights.finish_step()
    return norm, None if measured is None else torch.cat([measured, engine.monitor.update()])


def _update(engine: Engine, divisor: Tensor, found_inf: Tensor, *, watched: bool) -> None:
    """Writes what the gradients decided into the optimizer's scalars, and updates the weights.

    Args:
        engine: model, weights with reduced gradients, and optimizer.
        divisor, found_inf: the results of `clip_scale`.
        watched: whether to measure the update.
    """
    optimizer = engine.optimizer
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
