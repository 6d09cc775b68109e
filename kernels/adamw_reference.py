"""The update of AdamW in eager PyTorch, for `gptperf.kernels.reference`, which has the eager function of every op."""

import torch
from torch import Tensor

from gptperf.kernels.checks import SEED_NUMEL, check_adamw

__all__ = ["adamw"]


def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seeds: Tensor | None = None,
) -> None:
    """Does one AdamW update in place, and writes the copy of the weights that the model reads.

    Args:
        master: the master weights, float32, any shape; updated.
        exp_avg, exp_avg_sq: both moments like master, float32 or bfloat16; updated. bfloat16 is rounded at random.
        grad: like master, float32 or bfloat16; may be overwritten.
        compute: like master, in the compute dtype, overwritten with the rounded weights; or None.
        scalars: `(6,)` float32: learning rate, t, 1 - beta1^t, 1 - beta2^t, the divisor of the gradient, and a flag
            that skips the update unless it is 0. t counts updates from 1.
        beta1, beta2: decay rates of the moments.
        eps: added to the square root of the second moment.
        weight_decay: decay rate of the weights; it is multiplied by the learning rate.
        seeds: `(P / 64,)` int32 with moments in bfloat16: a seed for each 64 of the P weights, the same at every step.

    Raises:
        ValueError: tensors differ in shape, device or dtype, or one is not contiguous.

    Source: Loshchilov and Hutter, 2019, algorithm 2.
    """
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, seeds)
    lr, t, _, _, divisor, skip = scalars.unbind()
    grad = grad.float()
    if seeds is None and not torch.compiler.is_compiling():  # PyTorch's kernel; torch.compile makes one of the formula
        torch._fused_adamw_(
            [master],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [t.clone()],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=(skip != 0).float(),
        )
    else:
        _adamw(master, grad, exp_avg, exp_avg_sq, scalars, beta1, beta2, eps, weight_decay, seeds)
    if compute is not None:
        compute.copy_(master)


def _adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seeds: Tensor | None,
) -> None:
    """Does the update by its formula."""
    lr, t, bias1, bias2, divisor, skip = scalars.unbind()
    keep = skip == 0
    g = grad / divisor
    m = torch.lerp(exp_avg.float(), g, 1 - beta1)
    v = torch.lerp(exp_avg_sq.float(), g * g, 1 - beta2)
    w = master * (1 - lr * weight_decay) - (lr / bias1) * m / ((v / bias2).sqrt() + eps)
    if seeds is not None:
        random = _random_bits(seeds, t).flatten()[: m.numel()].view(m.shape)
        m, v = _round_to_bfloat16(m, random & 0xFFFF), _round_to_bfloat16(v, (random >> 16) & 0xFFFF)
    exp_avg.copy_(torch.where(keep, m, exp_avg))
    exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq))
    master.copy_(torch.where(keep, w, master))


def _mix(h: Tensor) -> Tensor:
    """Returns a permutation of int32 in which every bit depends on all bits of h: the finalizer of MurmurHash3."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def _random_bits(seeds: Tensor, t: Tensor) -> Tensor:
    """Returns 32 random bits for each element, `(P / 64, 64)` int32: a hash of t, the seed and the place beside it."""
    lane = torch.arange(SEED_NUMEL, dtype=torch.int32, device=seeds.device)
    h = _mix(seeds ^ (t.to(torch.int32) * (0x9E3779B9 - 2**32)))
    return _mix(h[:, None] + lane * (0x85EBCA77 - 2**32))


def _round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Rounds float32 to values of bfloat16, up or down at random; `random` is an int32 from 0 to 2^16 - 1."""
    bits = (x.view(torch.int32) + random) & -(2**16)
    return torch.where(x.isnan(), x, bits.view(torch.float32))
