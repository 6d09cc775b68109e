"""AdamW in one pass over the gradient, both moments, the float32 master weights and the compute copy.

    g' = g / divisor,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2,
    w = w (1 - lr decay) - (lr / (1 - b1^t)) m / (sqrt(v / (1 - b2^t)) + eps)

The update is in float32 and in place; a skipped step changes nothing. The kernel reads every number that depends on the
step from a tensor on the GPU, so the host never waits. Elements moved for P weights: 7 P of float32, and P more with a
compute copy (28 P bytes, or 30 P bytes with a 16-bit copy).

Eager reference: `gptperf.kernels.reference.adamw`. Source: Loshchilov and Hutter, 2019, algorithm 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_adamw, check_triton
from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["adamw"]

BLOCK = 1024
"""Elements of a program."""


@triton.jit
def _adamw_kernel(
    MASTER, GRAD, EXP_AVG, EXP_AVG_SQ, COMPUTE, SCALARS, n, beta1, beta2, eps, weight_decay,
    HAS_COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = at < n
    w = tl.load(MASTER + at, mask=mask, other=0.0)
    if tl.load(SCALARS + 5) == 0:
        lr, bias1, bias2 = tl.load(SCALARS), tl.load(SCALARS + 2), tl.load(SCALARS + 3)
        g = tl.load(GRAD + at, mask=mask, other=0.0) / tl.load(SCALARS + 4)
        m = tl.load(EXP_AVG + at, mask=mask, other=0.0)
        v = tl.load(EXP_AVG_SQ + at, mask=mask, other=0.0)
        m += (1.0 - beta1) * (g - m)
        v += (1.0 - beta2) * (g * g - v)
        w = w * (1.0 - lr * weight_decay) - (lr / bias1) * m / (tl.sqrt_rn(v / bias2) + eps)
        tl.store(EXP_AVG + at, m, mask=mask)
        tl.store(EXP_AVG_SQ + at, v, mask=mask)
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
    *hyperparameters: float,
) -> None:
    if master.numel():
        programs = ceil_div(master.numel(), BLOCK)
        tensors = (master, grad, exp_avg, exp_avg_sq, master if compute is None else compute, scalars)
        constants = {"HAS_COMPUTE": compute is not None, "BLOCK": BLOCK, "num_warps": 4}
        launch(_adamw_kernel, (programs,), tensors, (master.numel(), *hyperparameters), constants)


_adamw = register(
    "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? compute, "
    "Tensor scalars, float beta1, float beta2, float eps, float weight_decay) -> ()",
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
) -> None:
    """Does one AdamW update in place; see `gptperf.kernels.reference.adamw` for arguments and errors.

    Unlike the reference, it never overwrites the gradient.
    """
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars)
    check_triton("adamw", master)
    _adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, beta1, beta2, eps, weight_decay)
