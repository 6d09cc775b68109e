"""Optimizers over flat buckets, one file each, and the learning-rate schedule."""

from collections.abc import Sequence

from gptperf.config import OptimizerConfig
from gptperf.distributed.buckets import Bucket
from gptperf.ops import Ops
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import Optimizer

__all__ = ["make_optimizer"]


def make_optimizer(buckets: Sequence[Bucket], config: OptimizerConfig, ops: Ops) -> Optimizer:
    """Makes the optimizer of a run, with states of zeros.

    Args:
        buckets: all buckets of the weights.
        config: hyperparameters.
        ops: implementations of the update.
    """
    return AdamW(buckets, config, ops.adamw)
