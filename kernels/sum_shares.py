"""Sum of a share of a buffer over processes, in the order of their ranks, in float32.

    out = x_0 + x_1 + ... + x_{n-1}  (+ out),  where x_rank lies here and the others were copied here

One pass: for shares of P elements of s bytes in n processes, reads s n P and writes 4 P bytes, and with `add` reads 4 P
more. The sum is the same bits in whichever process it is taken.

Eager reference: `gptperf.kernels.reference.sum_shares`.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["sum_shares"]

BLOCK = 2048


@triton.jit
def _sum_shares_kernel(
    OUT, OWN, PULLED, n, WORLD: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(WORLD):
        if rank == RANK:
            total += tl.load(OWN + at, mask=mask, other=0.0).to(tl.float32)
        else:
            row = tl.full((), rank if rank < RANK else rank - 1, tl.int64)
            total += tl.load(PULLED + row * n + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(OUT + at, mask=mask, other=0.0)
    tl.store(OUT + at, total, mask=mask)


def _sum(out: Tensor, own: Tensor, pulled: Tensor, rank: int, add: bool) -> None:
    if out.numel():
        constants = {"WORLD": len(pulled) + 1, "RANK": rank, "ADD": add, "BLOCK": BLOCK, "num_warps": 8}
        launch(_sum_shares_kernel, (ceil_div(out.numel(), BLOCK),), (out, own, pulled), (out.numel(),), constants)


_sum_shares = register(
    "sum_shares(Tensor(a!) out, Tensor own, Tensor pulled, int rank, bool add) -> ()", _sum, lambda *_: None
)


def sum_shares(out: Tensor, own: Tensor, pulled: Tensor, rank: int, add: bool) -> None:
    """Write, or add to `out`, the sum of the shares of all processes.

    Args:
        out: `(P,)` float32; it may be `own`.
        own: `(P,)`, this process's, in any dtype.
        pulled: `(n - 1, P)`, those of the others by rank, contiguous, in the same dtype.
        rank: of this process.
        add: to what `out` holds.
    """
    _sum_shares(out, own, pulled, rank, add)
