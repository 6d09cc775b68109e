"""The learning-rate schedule."""

import math

from gptperf.config import OptimizerConfig

__all__ = ["learning_rate"]


def learning_rate(iteration: int, config: OptimizerConfig, max_iters: int) -> float:
    """Returns the learning rate of one iteration.

    The rate rises linearly over `warmup_iters`. Then it stays (`lr_schedule` constant), or falls to `min_lr` at
    `lr_decay_iters` (default: max_iters): cosine, linear, or wsd (constant, then linear over the last
    `wsd_decay_fraction`).

    Args:
        iteration: 0, 1, ..., max_iters - 1.
        config: peak and schedule.
        max_iters: iterations of the run.
    """
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    end = config.lr_decay_iters or max_iters
    start = config.warmup_iters
    if config.lr_schedule == "wsd":
        start = max(start, round(end * (1 - config.wsd_decay_fraction)))
    if iteration >= end:
        return config.min_lr
    if iteration < start:
        return config.learning_rate
    done = (iteration - start) / (end - start)
    fallen = 0.5 * (1 - math.cos(math.pi * done)) if config.lr_schedule == "cosine" else done
    return config.learning_rate - fallen * (config.learning_rate - config.min_lr)
