"""AdamW on the flat float32 master weights, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gptperf.config import OptimizerConfig

__all__ = ["build_optimizer", "clip_scale", "init_state", "learning_rate"]


def build_optimizer(
    decayed: Iterable[nn.Parameter], others: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with its state allocated, weight decay on the first group alone.

    Fused, it reads `grad_scale` and `found_inf` on the device: gradients are clipped inside its one pass, and a step
    whose gradients are not finite changes nothing, without a look from the host.
    """
    groups = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    init_state(optimizer)
    return optimizer


def init_state(optimizer: torch.optim.AdamW) -> None:
    """Zero moments and step counts, which AdamW would otherwise make in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def clip_scale(norm: Tensor, grad_clip: float) -> tuple[Tensor, Tensor]:
    """What the fused optimizer divides gradients by, and whether it has to leave the step out.

    Args:
        norm: global gradient norm, a float32 scalar on the device.
        grad_clip: largest norm; 0 turns clipping off.

    Returns:
        The divisor max(norm / grad_clip, 1) and 1.0 where the norm is not finite, both float32 scalars.
    """
    divisor = (norm / grad_clip).clamp(min=1.0) if grad_clip > 0 else torch.ones_like(norm)
    return divisor, (~torch.isfinite(norm)).float()


def learning_rate(iteration: int, config: OptimizerConfig, max_iters: int) -> float:
    """Learning rate of iteration 0, 1, ..., max_iters - 1.

    Linear warm-up over `warmup_iters`, then by `lr_schedule` to `min_lr` at `lr_decay_iters` (default: max_iters):
    cosine, linear, wsd (constant, then linear over the last `wsd_decay_fraction`), or constant.
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
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return config.min_lr + shape * (config.learning_rate - config.min_lr)
