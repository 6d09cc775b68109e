"""Attention of one new token of each sequence over its key-value cache; QK-norm and rope are in the same kernel.

For a query head with key head k and the new token's position p, over the cached positions s < p and the token itself:

    q, k_p = rope(norm(q)), rope(norm(k_p))   (each only where the model has it)
    y = sum_s softmax(q k_s / sqrt(D)) v_s;   keys[p], values[p] = k_p, v_p

The positions are on the device, and a program reads no more of the cache than its sequence has, so that a CUDA graph
can be replayed while sequences grow. A program keeps the new key in registers, so none waits for another's write. Few
sequences with few heads leave multiprocessors idle; then several programs share the keys of a head, and a second kernel
joins their results in a fixed order. And then a program loads keys ahead, the first ones while the previous kernel
still computes the new token; that takes registers which many programs would need. Softmax and sums are in float32; q, k
and y are rounded once.

Elements moved: 2 K D for each position that a sequence attends to.

Eager reference: `gptperf.kernels.reference.decode_attention`. There is no backward.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_decode_attention, check_triton
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register, wait_for_previous

__all__ = ["decode_attention"]

PROGRAMS = 264
"""Most programs among which the keys of a head are shared: two for each multiprocessor of an H200."""
KEYS = 128
"""Least capacity of the cache for each program that shares a head."""
TILE = 8192
"""Most elements of a tile of keys, which a program holds in registers; half as many where it loads keys ahead."""
WARPS = 8


def splits(heads: int, size: int) -> int:
    """Returns how many programs share the keys of a head.

    Args:
        heads: B H, query heads of all sequences.
        size: S, positions of the cache.
    """
    return max(1, min(ceil_div(size, KEYS), PROGRAMS // heads))


@triton.jit
def _head(
    X, COS, SIN, WEIGHT, first, second, table, eps,
    D: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Loads both halves of a head, normalises and rotates them, and rounds them to X's dtype; returns float32."""
    a = tl.load(X + first, mask=first < D, other=0.0).to(tl.float32)
    b = tl.load(X + second, mask=second < D, other=0.0).to(tl.float32)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=0) / D + eps)
        a *= rstd * tl.load(WEIGHT + first, mask=first < D, other=0.0).to(tl.float32)
        b *= rstd * tl.load(WEIGHT + second, mask=second < D, other=0.0).to(tl.float32)
    if HAS_ROPE:
        cos = tl.load(COS + table, mask=first < D, other=0.0)
        sin = tl.load(SIN + table, mask=first < D, other=0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
    return a.to(X.dtype.element_ty).to(tl.float32), b.to(X.dtype.element_ty).to(tl.float32)


@triton.jit
def _columns(D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the columns of a table, of both halves of a head, and of a whole head; D stands for none."""
    half: tl.constexpr = (D + 1) // 2
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    first = tl.where(cols < half, cols * 2 if INTERLEAVED else cols, D)
    second = tl.where(cols < half, cols * 2 + 1 if INTERLEAVED else cols + half, D)
    whole = tl.arange(0, 2 * BLOCK_D).to(tl.int64)
    if not INTERLEAVED and half < BLOCK_D:  # each half is padded
        whole = tl.where(whole < BLOCK_D, tl.where(whole < half, whole, D), whole - BLOCK_D + half)
    return cols, first, second, whole


@triton.jit
def _joined(a, b, INTERLEAVED: tl.constexpr):
    """Returns the elements of both halves as one vector, in the order of memory."""
    pairs = tl.join(a, b) if INTERLEAVED else tl.permute(tl.join(a, b), (1, 0))
    return tl.reshape(pairs, [2 * a.shape[0]])


@triton.jit
def _tile(KEYS, VALUES, base, start, high, stride, whole, D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Loads the keys and values of BLOCK_S positions from `start` on; 0 for those from `high` on."""
    place = start + tl.arange(0, BLOCK_S).to(tl.int64)
    at = (base + place * stride)[:, None] + whole[None, :]
    mask = (place < high)[:, None] & (whole < D)[None, :]
    return tl.load(KEYS + at, mask=mask, other=0.0), tl.load(VALUES + at, mask=mask, other=0.0)


@triton.jit
def _decode_attention_kernel(
    QKV, POSITIONS, COS, SIN, Q_WEIGHT, K_WEIGHT, KEYS, VALUES, Y, PARTS, MAXIMA, SUMS, size, window, eps, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    kv = head // (H // K)
    split, splits = tl.program_id(1), tl.num_programs(1)
    position = tl.load(POSITIONS + row)
    cols, first, second, whole = _columns(D, BLOCK_D, INTERLEAVED)
    begin = tl.maximum(position + 1 - window, 0)
    share = tl.cdiv(position - begin, splits)
    low = begin + split * share
    high = tl.minimum(low + share, position)
    base = (row * size * K + kv) * D
    if AHEAD:
        k, v = _tile(KEYS, VALUES, base, low, high, K * D, whole, D, BLOCK_S)
    wait_for_previous(EARLY)  # it computes the new token; the cache before the token is of earlier steps
    token = QKV + row * ((H + 2 * K) * D)
    table = position * ((D + 1) // 2) + cols
    qa, qb = _head(token + head * D, COS, SIN, Q_WEIGHT, first, second, table, eps, D, HAS_ROPE, HAS_NORM)
    ka, kb = _head(token + (H + kv) * D, COS, SIN, K_WEIGHT, first, second, table, eps, D, HAS_ROPE, HAS_NORM)
    value = tl.load(token + (H + K + kv) * D + whole, mask=whole < D, other=0.0)
    qa, qb = qa * scale, qb * scale
    q, new_key = _joined(qa, qb, INTERLEAVED), _joined(ka, kb, INTERLEAVED)
    # The first program of a head begins with the new token; the others begin with nothing.
    maximum = tl.where(split == 0, tl.sum(qa * ka + qb * kb, axis=0), float("-inf"))
    total = tl.where(split == 0, 1.0, 0.0)
    mean = tl.where(split == 0, value.to(tl.float32), 0.0)
    for start in range(low, high, BLOCK_S):
        if AHEAD:
            next_k, next_v = _tile(KEYS, VALUES, base, start + BLOCK_S, high, K * D, whole, D, BLOCK_S)
        else:
            k, v = _tile(KEYS, VALUES, base, start, high, K * D, whole, D, BLOCK_S)
        place = start + tl.arange(0, BLOCK_S).to(tl.int64)
        scores = tl.where(place < high, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=0))
        kept = tl.exp(maximum - higher)
        weights = tl.exp(scores - higher)
        total = total * kept + tl.sum(weights, axis=0)
        mean = mean * kept + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        maximum = higher
        if AHEAD:
            k, v = next_k, next_v
    if split == 0 and head % (H // K) == 0:
        at = ((row * size + position) * K + kv) * D
        tl.store(KEYS + at + whole, new_key.to(KEYS.dtype.element_ty), mask=(whole < D) & (position < size))
        tl.store(VALUES + at + whole, value, mask=(whole < D) & (position < size))
    if splits == 1:
        total *= tl.exp(maximum - maximum)  # 1, or NaN where the one score of a first token is not finite
        tl.store(Y + (row * H + head) * D + whole, (mean / total).to(Y.dtype.element_ty), mask=whole < D)
    else:
        part = (row * H + head) * splits + split
        tl.store(PARTS + part * D + whole, mean, mask=whole < D)
        tl.store(MAXIMA + part, maximum)
        tl.store(SUMS + part, total)


@triton.jit
def _join_kernel(
    PARTS, MAXIMA, SUMS, Y, splits,
    D: tl.constexpr, EARLY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_previous(EARLY)
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    maxima = tl.load(MAXIMA + head * splits + part, mask=part < splits, other=float("-inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))
    total = tl.sum(weights * tl.load(SUMS + head * splits + part, mask=part < splits, other=0.0), axis=0)
    at = (head * splits + part)[:, None] * D + cols[None, :]
    means = tl.load(PARTS + at, mask=(part < splits)[:, None] & (cols < D)[None, :], other=0.0)
    y = tl.sum(weights[:, None] * means, axis=0) / total
    tl.store(Y + head * D + cols, y.to(Y.dtype.element_ty), mask=cols < D)


def _forward(
    qkv: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    window: int,
) -> Tensor:
    early = positions.is_contiguous()  # else they are copied just now
    qkv, positions = qkv.contiguous(), positions.contiguous()
    B, S, K, D = keys.shape
    H = qkv.shape[2] // D - 2 * K
    y = qkv.new_empty((B, 1, H * D))
    if not y.numel():
        return y
    count = splits(B * H, S)
    joined = B * H * count if count > 1 else 0
    parts = qkv.new_empty((joined, D), dtype=torch.float32)
    maxima, sums = (qkv.new_empty(joined, dtype=torch.float32) for _ in range(2))
    optional = [qkv if x is None else x.contiguous() for x in (cos, sin, q_weight, k_weight)]
    block_d = power_of_2(ceil_div(D, 2))
    ahead = B * H * count <= PROGRAMS
    tile = (TILE // 2 if ahead else TILE) // (2 * block_d)
    sizes: dict[str, int] = {"H": H, "K": K, "D": D, "HAS_ROPE": cos is not None, "HAS_NORM": q_weight is not None}
    sizes |= {"INTERLEAVED": interleaved, "AHEAD": ahead, "EARLY": early, "BLOCK_S": max(16, min(128, tile))}
    tensors = (qkv, positions, *optional, keys, values, y, parts, maxima, sums)
    constants = {**sizes, "BLOCK_D": block_d, "num_warps": WARPS}
    launch(_decode_attention_kernel, (B * H, count), tensors, (S, window or S, eps, 1 / math.sqrt(D)), constants)
    if count > 1:
        blocks = {"EARLY": True, "BLOCK_P": power_of_2(count), "BLOCK_D": 2 * block_d, "num_warps": 4}
        launch(_join_kernel, (B * H,), (parts, maxima, sums, y), (count,), {"D": D, **blocks})
    return y


def _fake(qkv: Tensor, positions: Tensor, keys: Tensor, *_: object) -> Tensor:
    K, D = keys.shape[2:]
    return qkv.new_empty((qkv.shape[0], 1, qkv.shape[2] - 2 * K * D))


_decode_attention = register(
    "decode_attention(Tensor qkv, Tensor positions, Tensor(a!) keys, Tensor(b!) values, Tensor? cos, Tensor? sin, "
    "Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved, int window) -> Tensor",
    _forward,
    _fake,
)


def decode_attention(
    qkv: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = False,
    window: int = 0,
) -> Tensor:
    """Attends over the cache; see `gptperf.kernels.reference.decode_attention` for arguments, result and errors.

    On a GPU that launches kernels early, no kernel that may still run must write positions or the cache before them;
    see `wait_for_previous`.
    """
    check_decode_attention(qkv, positions, keys, values, cos, sin, q_weight, k_weight, window)
    check_triton("decode_attention", qkv)
    return _decode_attention(qkv, positions, keys, values, cos, sin, q_weight, k_weight, eps, interleaved, window)
