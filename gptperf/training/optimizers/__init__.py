"""Optimizers over flat buckets, one file each, and the learning-rate schedule."""

from gptperf.config import OptimizerConfig
from gptperf.distributed.replicated import Replicated
from gptperf.ops import Ops
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import Optimizer

__all__ = ["make_optimizer"]


def make_optimizer(weights: Replicated, config: OptimizerConfig, ops: Ops) -> Optimizer:
    """Makes the optimizer of a run, with states of zeros.

    Args:
        weights: the weights.
        config: hyperparameters.
        ops: implementations of the update.
    """
    return AdamW(weights.buckets, config, ops.adamw, weights.pieces_of)
