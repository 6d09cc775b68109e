"""AdamW: one pass over gradient, moments, float32 weights and the copy that the model reads.

    g' = g / divisor,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2,
    w = w (1 - lr decay) - (lr / (1 - b1^t)) m / (sqrt(v / (1 - b2^t)) + eps)

In float32, in place; where the step is to be skipped nothing changes. What depends on the step is read from the GPU, so
that nothing waits. Bytes moved for P weights: 28 P, with a copy in 16 bits 30 P.

Eager reference: `gptperf.kernels.reference.adamw`. Source: Loshchilov and Hutter, 2019, algorithm 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_adamw, check_triton
from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["adamw"]

BLOCK = 1024


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
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if master.numel():
        programs = ceil_div(master.numel(), BLOCK)
        tensors = (master, grad, exp_avg, exp_avg_sq, master if compute is None else compute, scalars)
        numbers = (master.numel(), beta1, beta2, eps, weight_decay)
        constants = {"HAS_COMPUTE": compute is not None, "BLOCK": BLOCK, "num_warps": 4}
        launch(_adamw_kernel, (programs,), tensors, numbers, constants)


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
    """One update in place; arguments and errors as `gptperf.kernels.reference.adamw`. The gradient is only read."""
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars)
    check_triton("adamw", master)
    _adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, beta1, beta2, eps, weight_decay)
