"""Draws a token for each row of logits from the likeliest ones, with top_k and top_p.

    w_i = exp((x_i - max x) / temperature) for the top_k largest logits x, in falling order
    kept: the tokens before which less than top_p of the sum of w is reached
    drawn: the first kept token up to which more than u of the sum of the kept w is reached

The first kernel finds the top_k largest logits of each chunk of a row. Among them the second kernel finds the top_k
largest of the row, and draws. A logit and its id are one integer of 64 bits: larger logits come first, and equal ones
in the order of their ids, so the same logits give the same token. The sums are in float32.

Elements moved: the logits once, and top_k for each chunk, written and read.

Eager reference: `gptperf.kernels.reference.draw`, which also runs where more than `MAX_TOP_K` tokens may be drawn.
Sources: Fan et al., 2018 (top_k); Holtzman et al., 2020 (top_p).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels import reference
from gptperf.kernels.checks import check_draw, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register

__all__ = ["draw"]

MAX_TOP_K = 64
"""Most tokens that the kernels draw from."""
CHUNKS = 64
"""Most chunks of a row, so that the second kernel sorts at most CHUNKS MAX_TOP_K = 4096 numbers."""
CHUNK = 1024
"""Least number of logits of a chunk."""
LEAST, MOST = 1e-30, 1e30
"""Temperatures beyond these change no draw in float32."""


@triton.jit
def _candidates_kernel(X, FOUND, stride, vocab_size, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    ids = chunk * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    x = tl.load(X + row * stride + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # integers in the order of the floats
    key = (order << 32) + (0x7FFFFFFF - ids)
    key = tl.where(ids < vocab_size, key, -0x8000000000000000)
    found = tl.topk(key, BLOCK_K)
    chunks = tl.num_programs(1)
    tl.store(FOUND + (row * chunks + chunk) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64), found)


@triton.jit
def _draw_kernel(
    FOUND, UNIFORM, IDS, count, top_k, temperature, top_p, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_N).to(tl.int64)
    keys = tl.load(FOUND + row * count + at, mask=at < count, other=-0x8000000000000000)
    key = tl.topk(keys, BLOCK_K)
    order = (key >> 32).to(tl.int32)
    x = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    rank = tl.arange(0, BLOCK_K)
    largest = tl.sum(tl.where(rank == 0, x, 0.0), axis=0)
    weight = tl.where(rank < top_k, tl.exp((x - largest) / temperature), 0.0)
    sums = tl.cumsum(weight, axis=0)
    kept = (sums - weight < top_p * tl.sum(weight, axis=0)) & (rank < top_k)
    weight = tl.where(kept, weight, 0.0)
    sums = tl.cumsum(weight, axis=0)
    bound = tl.load(UNIFORM + row) * tl.max(sums, axis=0)
    before = tl.sum((kept & (sums <= bound)).to(tl.int32), axis=0)
    last = tl.max(tl.where(weight > 0, rank, 0), axis=0)  # a sum may be rounded up to the bound
    drawn = tl.where(rank == tl.minimum(before, last), 0x7FFFFFFF - (key & 0xFFFFFFFF), 0)
    tl.store(IDS + row, tl.sum(drawn, axis=0))


def _forward(logits: Tensor, uniform: Tensor, vocab_size: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    B = logits.shape[0]
    ids = torch.empty_like(uniform, dtype=torch.int64)
    if B:
        block_k = max(16, power_of_2(top_k))
        block_v = max(CHUNK, power_of_2(ceil_div(vocab_size, CHUNKS)))
        chunks = ceil_div(vocab_size, block_v)
        found = torch.empty((B, chunks * block_k), dtype=torch.int64, device=logits.device)
        constants = {"BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": 4}
        launch(_candidates_kernel, (B, chunks), (logits, found), (logits.stride(0), vocab_size), constants)
        scalars = (chunks * block_k, top_k, min(max(temperature, LEAST), MOST), top_p)
        constants = {"BLOCK_K": block_k, "BLOCK_N": power_of_2(chunks * block_k), "num_warps": 8}
        launch(_draw_kernel, (B,), (found, uniform.contiguous(), ids), scalars, constants)
    return ids


def _fake(logits: Tensor, uniform: Tensor, *_: object) -> Tensor:
    return torch.empty_like(uniform, dtype=torch.int64)


_draw = register(
    "draw(Tensor logits, Tensor uniform, int vocab_size, float temperature, int top_k, float top_p) -> Tensor",
    _forward,
    _fake,
)


def draw(
    logits: Tensor, uniform: Tensor, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draws tokens; see `gptperf.kernels.reference.draw` for arguments, result and errors."""
    check_draw(logits, uniform, vocab_size, top_k, top_p)
    check_triton("draw", logits)
    top_k = 1 if temperature == 0 else min(top_k or vocab_size, vocab_size)
    if top_k > MAX_TOP_K:
        return reference.draw(logits, uniform, vocab_size, temperature, top_k, top_p)
    return _draw(logits, uniform, vocab_size, temperature or 1.0, top_k, top_p)
