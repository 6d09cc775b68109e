"""Optimizers over flat buckets, one file each, and the learning-rate schedule."""

from gptperf.config import OptimizerConfig
from gptperf.distributed.replicated import Replicated
from gptperf.ops import Ops
from gptperf.training.optimizers.adamw import AdamW
from gptperf.training.optimizers.base import Optimizer
from gptperf.training.optimizers.muon import Muon

__all__ = ["make_optimizer"]


def make_optimizer(weights: Replicated, config: OptimizerConfig, ops: Ops) -> Optimizer:
    """Makes the optimizer of a run, with states of zeros.

    Args:
        weights: the weights; for Muon, laid out in whole matrices.
        config: hyperparameters.
        ops: implementations of the update.
    """
    if config.optimizer == "muon":
        return Muon(weights, config, ops)
    return AdamW(weights.buckets, config, ops.adamw, weights.pieces_of)
