"""AdamW in one pass over the gradient, both moments, the float32 master weights and the compute copy.

    g' = g / divisor,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2,
    w = w (1 - lr decay) - (lr / (1 - b1^t)) m / (sqrt(v / (1 - b2^t)) + eps)

The update is in float32 and in place; a skipped step changes nothing. The kernel reads every number that depends on the
step from a tensor on the GPU, so the host never waits. Elements moved for P weights: 7 P of float32, and P more with a
compute copy (28 P bytes, or 30 P bytes with a 16-bit copy; 8 P bytes less with moments in bfloat16).

Moments in bfloat16 are rounded up or down at random, with probabilities that make the expected value exact: a change
below half a unit in the last place would be lost at every step if it were rounded to the nearest. The random bits of an
element are a hash of t, a seed of its 64 neighbours, and its place among them, and need no state.

Eager reference: `gptperf.kernels.reference.adamw`. Source: Loshchilov and Hutter, 2019, algorithm 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import SEED_NUMEL, check_adamw, check_triton
from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["adamw"]

BLOCK = 1024
"""Elements of a program."""


@triton.jit
def _mix(h):
    """Returns a permutation of 32 bits in which every bit depends on all bits of h: the finalizer of MurmurHash3."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _random_bits(seed, t, lane):
    """Returns 32 random bits for each element, as `_random_bits` in `gptperf.kernels.adamw_reference` does."""
    h = _mix(seed.to(tl.uint32, bitcast=True) ^ (t.to(tl.uint32) * 0x9E3779B9))
    return _mix(h + lane.to(tl.uint32) * 0x85EBCA77)


@triton.jit
def _to_bfloat16(x, random):
    """Rounds to bfloat16: adds a random number below one unit in the last place, and cuts off what is below it."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)  # NaN plus a number may be 0


@triton.jit
def _adamw_kernel(
    MASTER, GRAD, EXP_AVG, EXP_AVG_SQ, COMPUTE, SEEDS, SCALARS, n, beta1, beta2, eps, weight_decay,
    HAS_COMPUTE: tl.constexpr, SEED_NUMEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    STOCHASTIC: tl.constexpr = EXP_AVG.dtype.element_ty == tl.bfloat16
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = at < n
    w = tl.load(MASTER + at, mask=mask, other=0.0)
    if tl.load(SCALARS + 5) == 0:
        lr, bias1, bias2 = tl.load(SCALARS), tl.load(SCALARS + 2), tl.load(SCALARS + 3)
        g = tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32) / tl.load(SCALARS + 4)
        m = tl.load(EXP_AVG + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(EXP_AVG_SQ + at, mask=mask, other=0.0).to(tl.float32)
        m += (1.0 - beta1) * (g - m)
        v += (1.0 - beta2) * (g * g - v)
        if STOCHASTIC:
            seed = tl.load(SEEDS + at // SEED_NUMEL, mask=mask, other=0)
            random = _random_bits(seed, tl.load(SCALARS + 1), at % SEED_NUMEL)
            tl.store(EXP_AVG + at, _to_bfloat16(m, random & 0xFFFF), mask=mask)
            tl.store(EXP_AVG_SQ + at, _to_bfloat16(v, random >> 16), mask=mask)
        else:
            tl.store(EXP_AVG + at, m, mask=mask)
            tl.store(EXP_AVG_SQ + at, v, mask=mask)
        w = w * (1.0 - lr * weight_decay) - (lr / bias1) * m / (tl.sqrt_rn(v / bias2) + eps)
        tl.store(MASTER + at, w, mask=mask)
    if HAS_COMPUTE:
        tl.store(COMPUTE + at, w.to(COMPUTE.dtype.element_ty), mask=mask)


def _update(
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
    seeds: Tensor | None,
) -> None:
    if master.numel():
        programs = ceil_div(master.numel(), BLOCK)
        copy, seeds = master if compute is None else compute, scalars if seeds is None else seeds
        tensors = (master, grad, exp_avg, exp_avg_sq, copy, seeds, scalars)
        numbers = (master.numel(), beta1, beta2, eps, weight_decay)
        constants = {"HAS_COMPUTE": compute is not None, "SEED_NUMEL": SEED_NUMEL, "BLOCK": BLOCK, "num_warps": 4}
        launch(_adamw_kernel, (programs,), tensors, numbers, constants)


_adamw = register(
    "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? compute, "
    "Tensor scalars, float beta1, float beta2, float eps, float weight_decay, Tensor? seeds) -> ()",
    _update,
    lambda *_: None,
)


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
    """Does one AdamW update in place; see `gptperf.kernels.reference.adamw` for arguments and errors.

    Unlike the reference, it never overwrites the gradient.
    """
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, seeds)
    check_triton("adamw", master)
    _adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, beta1, beta2, eps, weight_decay, seeds)
