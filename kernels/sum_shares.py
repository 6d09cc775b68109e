"""Sums the shards of all ranks in rank order, in float32.

    out = x_0 + x_1 + ... + x_{n-1}  (+ out),  where x_rank is this rank's own shard and the others were copied to it

The sum has the same bits on every rank. Elements moved for n shards of P elements: n P read, and P of float32 written;
with `add` another P of float32 read.

Eager reference: `gptperf.kernels.reference.sum_shares`. There is no backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.launch import ceil_div, launch, register

__all__ = ["sum_shares"]

BLOCK = 2048
"""Elements of a program."""


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
    """Writes the sum of the shards of all n ranks to `out`, or adds it to `out`.

    Args:
        out: `(P,)` float32; it may be `own`.
        own: `(P,)`, this rank's shard, in any dtype.
        pulled: `(n - 1, P)`, the shards of the other ranks in rank order, contiguous, in own's dtype.
        rank: this rank.
        add: add the sum to `out` instead of overwriting it.
    """
    _sum_shares(out, own, pulled, rank, add)
