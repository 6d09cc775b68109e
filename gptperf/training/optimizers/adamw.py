"""AdamW on the flat float32 master weights, and the learning-rate schedule."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptperf.config import OptimizerConfig
from gptperf.distributed.buckets import ALIGN, Bucket

__all__ = ["AdamW", "clip_scale", "learning_rate"]


class AdamW(torch.optim.Optimizer):
    """AdamW in one pass over each flat bucket, which also writes the copy that the model reads.

    It clips, skips and counts on the device: `grad_scale` (what gradients are divided by) and `found_inf` (not 0: leave
    this step out) are float32 scalars set before each step, under the names by which GradScaler sets them.

    Args:
        buckets: of the weights; their group says which get weight decay.
        config: hyperparameters.
        op: the update, with the signature of `gptperf.kernels.reference.adamw`.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to leave both to the step
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    observe: Callable[[Bucket, Tensor], None] | None = None
    """Is given each bucket with its master weights before the update, in the steps in which it is set."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimizerConfig, op: Callable[..., None]):
        groups = [
            {"params": [b.master for b in buckets if b.group.has_weight_decay is decayed], "weight_decay": rate}
            for decayed, rate in ((True, config.weight_decay), (False, 0.0))
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": config.learning_rate})
        self.config = config
        self.op = op
        self.buckets = {b.master: b for b in buckets}
        self.steps = torch.zeros((), device=buckets[0].master.device)  # updates made, without those left out
        for parameter in self.buckets:
            self.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update masters and copies from the masters' gradients."""
        config, one = self.config, torch.ones_like(self.steps)
        divisor = one if self.grad_scale is None else self.grad_scale
        skip = torch.zeros_like(one) if self.found_inf is None else self.found_inf.view(())
        self.steps += (skip == 0).float()
        t = self.steps.clamp(min=1)
        for group in self.param_groups:
            lr = torch.full_like(one, group["lr"])
            scalars = torch.stack([lr, t, 1 - config.beta1**t, 1 - config.beta2**t, divisor.view(()), skip])
            for parameter in group["params"]:
                state = self.state[parameter]
                tensors = (
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    self.buckets[parameter].copy,
                )
                before = None if self.observe is None else parameter.detach().clone()
                rows = (None if x is None else x.detach().view(-1, ALIGN) for x in tensors)
                self.op(*rows, scalars, config.beta1, config.beta2, config.adam_eps, group["weight_decay"])
                if self.observe is not None and before is not None:
                    self.observe(self.buckets[parameter], before)


def clip_scale(norm: Tensor, grad_clip: float) -> tuple[Tensor, Tensor]:
    """What the optimizer divides gradients by, and whether it has to leave the step out.

    Args:
        norm: global gradient norm, a float32 scalar on the device.
        grad_clip: largest norm; 0 turns clipping off.

    Returns:
        The divisor max(norm / grad_clip, 1), and 1.0 where the norm is not finite or else 0.0; float32 scalars.
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
    fallen = 0.5 * (1 - math.cos(math.pi * done)) if config.lr_schedule == "cosine" else done
    return config.learning_rate - fallen * (config.learning_rate - config.min_lr)
