"""Draws a token for each row of logits from the likeliest ones, with top_k and top_p.

    w_i = exp((x_i - max x) / temperature) for the top_k largest logits x, in falling order
    kept: the tokens before which less than top_p of the sum of w is reached
    drawn: the first kept token up to which more than u of the sum of the kept w is reached

The first kernel finds the top_k largest logits of each chunk of a row. A second one finds those of a few chunks
together, and is repeated until few are left; a sort within one program takes longer than a kernel. Among what is left
the last kernel finds the top_k largest of the row, and draws. A logit and its id are one integer: larger logits come
first, and equal ones in the order of their ids, so the same logits give the same token. The integer has 32 bits where
logits and ids have 16 each, else 64. The sums are in float32. NaN counts as infinity, and -0 as 0.

Elements moved: the logits once, and top_k for each chunk, written and read.

Eager reference: `gptperf.kernels.reference.draw`, which also runs where more than `MAX_TOP_K` tokens may be drawn, or
all of a small vocabulary, which it does not sort.
Sources: Fan et al., 2018 (top_k); Holtzman et al., 2020 (top_p).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels import reference
from gptperf.kernels.checks import check_draw, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register, wait_for_previous

__all__ = ["draw"]

MAX_TOP_K = 64
"""Most tokens that the kernels draw from."""
CHUNKS = 64
"""Most chunks of a row."""
CHUNK = 1024
"""Least number of logits of a chunk."""
KEYS = 512
"""Most integers that a program sorts after the first kernel, in as many warps as `WARPS`."""
WARPS = 4
LEAST, MOST = 1e-30, 1e30
"""Temperatures beyond these change no draw in float32."""


@triton.jit
def _keys(x, ids, NARROW: tl.constexpr):
    """Returns the integers of logits and their ids."""
    value = x.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    value = tl.where(value == 0.0, 0.0, value)
    if NARROW:
        bits = value.to(x.dtype).to(tl.int16, bitcast=True).to(tl.int32)
        order = bits ^ ((bits >> 15) & 0x7FFF)  # integers in the order of the floats
        key = (order << 16) + (0xFFFF - ids).to(tl.int32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = (order << 32) + (0x7FFFFFFF - ids)
    return key


@triton.jit
def _logits_and_ids(key, DTYPE: tl.constexpr):
    """Returns what `_keys` made integers of: logits of this dtype as float32, and ids."""
    if key.dtype == tl.int32:
        order = key >> 16
        x = (order ^ ((order >> 15) & 0x7FFF)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        ids = (0xFFFF - (key & 0xFFFF)).to(tl.int64)
    else:
        order = (key >> 32).to(tl.int32)
        x = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        ids = 0x7FFFFFFF - (key & 0xFFFFFFFF)
    return x, ids


@triton.jit
def _largest(FOUND, first, count, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the largest of BLOCK_N integers of this row, from `first` on, in falling order."""
    LEAST_KEY: tl.constexpr = -0x80000000 if FOUND.dtype.element_ty == tl.int32 else -0x8000000000000000
    at = first + tl.arange(0, BLOCK_N).to(tl.int64)
    keys = tl.load(FOUND + tl.program_id(0).to(tl.int64) * count + at, mask=at < count, other=LEAST_KEY)
    return tl.topk(keys, BLOCK_K)


@triton.jit
def _candidates_kernel(
    X, FOUND, stride, vocab_size, EARLY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    wait_for_previous(EARLY)
    NARROW: tl.constexpr = FOUND.dtype.element_ty == tl.int32
    LEAST_KEY: tl.constexpr = -0x80000000 if NARROW else -0x8000000000000000
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    ids = chunk * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    x = tl.load(X + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
    found = tl.topk(tl.where(ids < vocab_size, _keys(x, ids, NARROW), LEAST_KEY), BLOCK_K)
    chunks = tl.num_programs(1)
    tl.store(FOUND + (row * chunks + chunk) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64), found)


@triton.jit
def _merge_kernel(FOUND, FEWER, count, EARLY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    wait_for_previous(EARLY)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    found = _largest(FOUND, group * BLOCK_N, count, BLOCK_K, BLOCK_N)
    groups = tl.num_programs(1)
    tl.store(FEWER + (row * groups + group) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64), found)


@triton.jit
def _draw_kernel(
    FOUND, UNIFORM, IDS, count, top_k, temperature, top_p,
    DTYPE: tl.constexpr, EARLY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    x, ids = _logits_and_ids(_largest(FOUND, 0, count, BLOCK_K, BLOCK_N), DTYPE)
    rank = tl.arange(0, BLOCK_K)
    largest = tl.sum(tl.where(rank == 0, x, 0.0), axis=0)
    below = tl.where(x == largest, 0.0, x - largest)  # not NaN where both are infinite
    weight = tl.where(rank < top_k, tl.exp(below / temperature), 0.0)
    sums = tl.cumsum(weight, axis=0)
    kept = (sums - weight < top_p * tl.sum(weight, axis=0)) & (rank < top_k)
    weight = tl.where(kept, weight, 0.0)
    sums = tl.cumsum(weight, axis=0)
    bound = tl.load(UNIFORM + row) * tl.max(sums, axis=0)
    before = tl.sum((kept & (sums <= bound)).to(tl.int32), axis=0)
    last = tl.max(tl.where(weight > 0, rank, 0), axis=0)  # a sum may be rounded up to the bound
    drawn = tl.where(rank == tl.minimum(before, last), ids, 0)
    tl.store(IDS + row, tl.sum(drawn, axis=0))


def _forward(logits: Tensor, uniform: Tensor, vocab_size: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    B = logits.shape[0]
    ids = torch.empty_like(uniform, dtype=torch.int64)
    if B:
        block_k = max(16, power_of_2(top_k))
        block_v = max(CHUNK, power_of_2(ceil_div(vocab_size, CHUNKS)))
        count = ceil_div(vocab_size, block_v)
        narrow = logits.element_size() == 2 and vocab_size <= 1 << 16
        found = torch.empty((B, count * block_k), dtype=torch.int32 if narrow else torch.int64, device=logits.device)
        common = {"EARLY": True, "BLOCK_K": block_k}
        constants = {**common, "BLOCK_V": block_v, "num_warps": 4}
        launch(_candidates_kernel, (B, count), (logits, found), (logits.stride(0), vocab_size), constants)
        while found.shape[1] > max(KEYS, 2 * block_k):
            block_n = max(KEYS, 2 * block_k)
            fewer = found.new_empty((B, ceil_div(found.shape[1], block_n) * block_k))
            constants = {**common, "BLOCK_N": block_n, "num_warps": WARPS}
            launch(_merge_kernel, (B, fewer.shape[1] // block_k), (found, fewer), (found.shape[1],), constants)
            found = fewer
        scalars = (found.shape[1], top_k, min(max(temperature, LEAST), MOST), top_p)
        dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(logits.dtype, tl.float32)
        constants = {"DTYPE": dtype, **common, "BLOCK_N": power_of_2(found.shape[1]), "num_warps": WARPS}
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
    check_draw(logits, uniform, vocab_size, temperature, top_k, top_p)
    check_triton("draw", logits)
    top_k = 1 if temperature == 0 else min(top_k or vocab_size, vocab_size)
    if top_k > MAX_TOP_K or (top_k == vocab_size and top_p == 1):
        return reference.draw(logits, uniform, vocab_size, temperature, top_k, top_p)
    return _draw(logits, uniform, vocab_size, temperature or 1.0, top_k, top_p)
