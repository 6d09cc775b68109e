"""Rotary position encoding of packed queries, keys and values, optionally with QK-norm in the same kernel.

Forward, for a pair (a, b) of a query or key head and the angle of its position:
    a' = a cos - b sin,  b' = b cos + a sin.
With QK-norm, a and b are elements of x r w, with r = 1 / sqrt(mean(x^2) + eps) over the head x.
Backward is the rotation by the opposite angle:
    da = da' cos + db' sin,  db = db' cos - da' sin.
With QK-norm it continues through the norm, where y is a head of da and db, g = y w and h = x r:
    dx = r (g - h mean(g h)),  dw = sum(y h).

Forward copies the values, so that the packed projection does not have to stay in memory for the backward of attention.
Backward writes into the packed gradient. Angles, statistics and sums are in float32, and each output is rounded once.
Elements moved for S = B T (H + 2 K) D: forward 2 S, backward 2 S; with QK-norm 3 S less the values, and D float32
partial sums for each program, written and read.

Eager reference: `gptperf.kernels.reference.rope`. Source: Su et al., 2021, eq. 34.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gptperf.kernels.checks import check_rope, check_triton
from gptperf.kernels.column_sum import column_sum
from gptperf.kernels.launch import ceil_div, launch, power_of_2, register

__all__ = ["rope", "rotate", "rotate_back"]


def program_shape(n_head: int, n_kv_head: int, head_dim: int, pairs: int) -> dict[str, int]:
    """Returns the tokens, heads and warps of a program that has this number of pairs.

    The heads of a program are all queries, all keys or all values. On an H200, 512 pairs and one warp are among the
    best of 512 to 4096 pairs and 1 to 8 warps, at .97 to .99 of the speed of a copy.
    """
    heads = math.gcd(n_head, n_kv_head)
    heads = min(heads & -heads, 4)  # a power of two that divides both
    half = power_of_2(head_dim // 2)
    return {"BLOCK_T": max(1, pairs // (heads * half)), "BLOCK_H": heads, "BLOCK_D": half, "num_warps": 1}


@triton.jit
def _load_pairs(X, at, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Loads the elements of each pair as two float32 tiles (BLOCK_T, BLOCK_H, BLOCK_D) from the head offsets `at`."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D).to(tl.int64)[None, None, :]
        x = tl.load(X + at + both, mask=mask & (both < D), other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], BLOCK_D, 2]))
    else:
        cols = tl.arange(0, BLOCK_D).to(tl.int64)[None, None, :]
        a = tl.load(X + at + cols, mask=mask & (cols < D // 2), other=0.0)
        b = tl.load(X + at + D // 2 + cols, mask=mask & (cols < D // 2), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(Y, at, mask, a, b, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Stores two tiles a and b in the layout from which `_load_pairs` loads them."""
    a, b = a.to(Y.dtype.element_ty), b.to(Y.dtype.element_ty)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D).to(tl.int64)[None, None, :]
        y = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * BLOCK_D])
        tl.store(Y + at + both, y, mask=mask & (both < D))
    else:
        cols = tl.arange(0, BLOCK_D).to(tl.int64)[None, None, :]
        tl.store(Y + at + cols, a, mask=mask & (cols < D // 2))
        tl.store(Y + at + D // 2 + cols, b, mask=mask & (cols < D // 2))


@triton.jit
def _weight_columns(D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the offsets within a head of the first and of the second element of each pair."""
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    if INTERLEAVED:
        return cols * 2, cols * 2 + 1
    return cols, cols + D // 2


@triton.jit
def _place(T, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns the batch, the tokens (BLOCK_T,) and the first packed head of this program.

    The programs of one block of tokens are neighbours, because they read the same angles.
    """
    head_blocks: tl.constexpr = HEADS // BLOCK_H
    token_block = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * BLOCK_H
    token_blocks = tl.cdiv(T, BLOCK_T)
    batch = (token_block // token_blocks).to(tl.int64)
    tokens = (token_block % token_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    return batch, tokens, head.to(tl.int64)


@triton.jit
def _rope_forward_kernel(
    QKV, COS, SIN, Q_WEIGHT, K_WEIGHT, Q, K_OUT, V, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HAS_NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, tokens, head = _place(T, HEADS, BLOCK_T, BLOCK_H)
    t = tokens[:, None, None]
    h = tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = t < T
    packed = ((batch * T + t) * (H + 2 * K) + head + h) * D
    a, b = _load_pairs(QKV, packed, mask, D, BLOCK_D, INTERLEAVED)
    if head < H + K:
        table = tokens[:, None] * (D // 2) + cols[None, :]
        in_table = (tokens < T)[:, None] & (cols < D // 2)[None, :]
        cos = tl.load(COS + table, mask=in_table, other=0.0)[:, None, :]
        sin = tl.load(SIN + table, mask=in_table, other=0.0)[:, None, :]
        if HAS_NORM:
            WEIGHT = Q_WEIGHT if head < H else K_WEIGHT
            first, second = _weight_columns(D, BLOCK_D, INTERLEAVED)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=2) / D + eps)[:, :, None]
            a *= rstd * tl.load(WEIGHT + first, mask=cols < D // 2, other=0.0).to(tl.float32)[None, None, :]
            b *= rstd * tl.load(WEIGHT + second, mask=cols < D // 2, other=0.0).to(tl.float32)[None, None, :]
        a, b = a * cos - b * sin, b * cos + a * sin
    if HEADS == H + K:
        tl.debug_barrier()  # Q and K_OUT may be parts of QKV: a program reads its heads before it writes them
    if head < H:
        _store_pairs(Q, ((batch * T + t) * Q_ROW + head + h) * D, mask, a, b, D, BLOCK_D, INTERLEAVED)
    elif head < H + K:
        _store_pairs(K_OUT, ((batch * T + t) * K_ROW + head - H + h) * D, mask, a, b, D, BLOCK_D, INTERLEAVED)
    else:
        _store_pairs(V, ((batch * T + t) * K + head - H - K + h) * D, mask, a, b, D, BLOCK_D, INTERLEAVED)


@triton.jit
def _rope_backward_kernel(
    DQ, DK, DV, QKV, COS, SIN, Q_WEIGHT, K_WEIGHT, DQKV, DQ_WEIGHT, DK_WEIGHT,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HAS_NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, tokens, head = _place(T, HEADS, BLOCK_T, BLOCK_H)
    t = tokens[:, None, None]
    h = tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = t < T
    packed = ((batch * T + t) * (H + 2 * K) + head + h) * D
    if head < H:
        a, b = _load_pairs(DQ, batch * dq_b + t * dq_t + (head + h) * dq_h, mask, D, BLOCK_D, INTERLEAVED)
    elif head < H + K:
        a, b = _load_pairs(DK, batch * dk_b + t * dk_t + (head - H + h) * dk_h, mask, D, BLOCK_D, INTERLEAVED)
    else:
        a, b = _load_pairs(DV, batch * dv_b + t * dv_t + (head - H - K + h) * dv_h, mask, D, BLOCK_D, INTERLEAVED)
    if head < H + K:
        table = tokens[:, None] * (D // 2) + cols[None, :]
        in_table = (tokens < T)[:, None] & (cols < D // 2)[None, :]
        cos = tl.load(COS + table, mask=in_table, other=0.0)[:, None, :]
        sin = tl.load(SIN + table, mask=in_table, other=0.0)[:, None, :]
        a, b = a * cos + b * sin, b * cos - a * sin
        if HAS_NORM:
            first, second = _weight_columns(D, BLOCK_D, INTERLEAVED)
            x, y = _load_pairs(QKV, packed, mask, D, BLOCK_D, INTERLEAVED)
            rstd = tl.rsqrt(tl.sum(x * x + y * y, axis=2) / D + eps)[:, :, None]
            x, y = x * rstd, y * rstd
            block = (tl.program_id(0) // (HEADS // BLOCK_H)).to(tl.int64)
            if head < H:
                WEIGHT = Q_WEIGHT
                DWEIGHT = DQ_WEIGHT + (block * (H // BLOCK_H) + head // BLOCK_H) * D
            else:
                WEIGHT = K_WEIGHT
                DWEIGHT = DK_WEIGHT + (block * (K // BLOCK_H) + (head - H) // BLOCK_H) * D
            tl.store(DWEIGHT + first, tl.sum(tl.sum(a * x, axis=0), axis=0), mask=cols < D // 2)
            tl.store(DWEIGHT + second, tl.sum(tl.sum(b * y, axis=0), axis=0), mask=cols < D // 2)
            a *= tl.load(WEIGHT + first, mask=cols < D // 2, other=0.0).to(tl.float32)[None, None, :]
            b *= tl.load(WEIGHT + second, mask=cols < D // 2, other=0.0).to(tl.float32)[None, None, :]
            mean = (tl.sum(a * x + b * y, axis=2) / D)[:, :, None]
            a, b = (a - x * mean) * rstd, (b - y * mean) * rstd
    if HEADS == H + K:
        tl.debug_barrier()  # DQ and DK may be parts of DQKV: a program reads its heads before it writes them
    _store_pairs(DQKV, packed, mask, a, b, D, BLOCK_D, INTERLEAVED)


def _forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.contiguous()
    q, k, v = _forward_fake(qkv, cos, sin, n_head, n_kv_head)
    rotate(qkv, (cos, sin), (q_weight, k_weight), eps, interleaved, (q, k), v)
    return q, k, v


def rotate(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    interleaved: bool,
    out: tuple[Tensor, Tensor],
    v: Tensor | None,
) -> None:
    """Writes normalised and rotated queries and keys, and copies values.

    Args:
        qkv: `(B, T, (H + 2K) D)`, contiguous.
        tables: cosines and sines.
        weights: those of QK-norm, or None twice.
        eps, interleaved: as in `rope`.
        out: q `(B, T, H, D)` and k `(B, T, K, D)`: contiguous, or heads of contiguous rows. They may be the heads of
            qkv itself if v is None.
        v: `(B, T, K, D)`, contiguous; or None, then the values are not copied.
    """
    q, k = out
    B, T, H, D = q.shape
    K = k.shape[2]
    if not q.numel():
        return
    shape, heads = program_shape(H, K, D, pairs=512), H + K if v is None else H + 2 * K
    programs = B * ceil_div(T, shape["BLOCK_T"]) * (heads // shape["BLOCK_H"])
    cos, sin = (x.contiguous() for x in tables)
    given = [cos if w is None else w.contiguous() for w in weights]
    sizes = {"H": H, "K": K, "D": D, "HAS_NORM": weights[0] is not None, "INTERLEAVED": interleaved}
    rows = {"HEADS": heads, "Q_ROW": q.stride(1) // D, "K_ROW": k.stride(1) // D}
    tensors = (qkv, cos, sin, *given, q, k, k if v is None else v)
    launch(_rope_forward_kernel, (programs,), tensors, (T, eps), {**sizes, **rows, **shape})


def _forward_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    q = qkv.new_empty((B, T, n_head, D))
    return q, qkv.new_empty((B, T, n_kv_head, D)), qkv.new_empty((B, T, n_kv_head, D))


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = dq.shape
    dqkv = dq.new_empty((B, T, (H + 2 * dk.shape[2]) * D))
    dweights = rotate_back((dq, dk), dv, qkv, (cos, sin), (q_weight, k_weight), eps, interleaved, dqkv)
    dq_weight, dk_weight = (cos.new_empty(0) if x is None else x for x in dweights)
    return dqkv, dq_weight, dk_weight


def rotate_back(
    grads: tuple[Tensor, Tensor],
    dv: Tensor | None,
    qkv: Tensor | None,
    tables: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    interleaved: bool,
    dqkv: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradients of queries and keys before rotation and norm, and copies those of the values.

    Args:
        grads: dq `(B, T, H, D)` and dk `(B, T, K, D)`. They may be the heads of dqkv itself if dv is None.
        dv: `(B, T, K, D)`, or None, then the gradients of the values are not copied.
        qkv: `(B, T, (H + 2K) D)`, of which QK-norm reads queries and keys; None without it.
        tables, weights, eps, interleaved: as in `rotate`.
        dqkv: `(B, T, (H + 2K) D)`, contiguous.

    Returns:
        The gradients of the weights, or None twice.
    """
    dq, dk = grads
    B, T, H, D = dq.shape
    K, (q_weight, k_weight), (cos, sin) = dk.shape[2], weights, tables
    # With QK-norm a program holds twice as many values in registers.
    shape = program_shape(H, K, D, pairs=512 if q_weight is None else 256)
    blocks, heads = B * ceil_div(T, shape["BLOCK_T"]), H + K if dv is None else H + 2 * K
    has_norm = q_weight is not None
    partials = [cos.new_empty((blocks * n // shape["BLOCK_H"] if has_norm else 0, D)) for n in (H, K)]
    if not dqkv.numel():
        dq_weight, dk_weight = (None if w is None else w.new_zeros(D) for w in weights)
        return dq_weight, dk_weight
    dv = dk if dv is None else dv
    dq, dk, dv = (x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv))
    given = [cos if w is None else w.contiguous() for w in weights]
    packed = dq if qkv is None else qkv.contiguous()
    tensors = (dq, dk, dv, packed, cos.contiguous(), sin.contiguous(), *given, dqkv, *partials)
    strides = [stride for x in (dq, dk, dv) for stride in x.stride()[:3]]
    sizes = {"H": H, "K": K, "D": D, "HAS_NORM": has_norm, "INTERLEAVED": interleaved, "HEADS": heads}
    grid = (blocks * (heads // shape["BLOCK_H"]),)
    launch(_rope_backward_kernel, grid, tensors, (*strides, T, eps), {**sizes, **shape})
    if q_weight is None or k_weight is None:
        return None, None
    return column_sum(partials[0], D, q_weight.dtype)[0], column_sum(partials[1], D, k_weight.dtype)[0]


def _backward_fake(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = dq.shape
    dq_weight, dk_weight = (cos.new_empty(0) if w is None else w.new_empty(D) for w in (q_weight, k_weight))
    return dq.new_empty((B, T, (H + 2 * dk.shape[2]) * D)), dq_weight, dk_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, _, _, q_weight, k_weight, ctx.eps, ctx.interleaved = inputs
    ctx.set_materialize_grads(True)
    ctx.has_norm = q_weight is not None
    ctx.save_for_backward(cos, sin, *((qkv, q_weight, k_weight) if ctx.has_norm else ()))


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *normed = ctx.saved_tensors
    qkv, q_weight, k_weight = normed if ctx.has_norm else (None, None, None)
    dqkv, dq_weight, dk_weight = _rope_backward(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, ctx.eps, ctx.interleaved)
    dweights = (dq_weight, dk_weight) if ctx.has_norm else (None, None)
    return dqkv, None, None, None, None, *dweights, None, None


_rope_backward = register(
    "rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor cos, Tensor sin, Tensor? q_weight, "
    "Tensor? k_weight, float eps, bool interleaved) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_rope = register(
    "rope(Tensor qkv, Tensor cos, Tensor sin, int n_head, int n_kv_head, Tensor? q_weight, Tensor? k_weight, "
    "float eps, bool interleaved) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _differentiate,
)


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection, and normalises and rotates queries and keys.

    Arguments, results and errors are those of `gptperf.kernels.reference.rope`. q, k and v are new tensors, and the
    tables get no gradient.
    """
    check_rope(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight)
    check_triton("rope", qkv)
    return _rope(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight, eps, interleaved)
