"""Rotary position encoding and attention in eager PyTorch, for `gptperf.kernels.reference`, which has every op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf.kernels.checks import check_decode_attention, check_rope

__all__ = ["decode_attention", "packed_attention", "rope"]


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
    """Splits a packed projection into heads, and rotates queries and keys by the angles of their positions.

    Args:
        qkv: `(B, T, (H + 2 K) D)`: H query heads, then K key heads, then K value heads.
        cos, sin: `(T, D / 2)` float32, for the positions 0..T-1; further rows are ignored.
        n_head, n_kv_head: H and K.
        q_weight, k_weight: `(D,)`; if given, each query and key head is RMS-normalised first (QK-norm).
        eps: added to the mean square of that norm.
        interleaved: a pair is the elements 2i and 2i + 1 instead of i and i + D/2.

    Returns:
        q `(B, T, H, D)`, k `(B, T, K, D)`, v `(B, T, K, D)` in qkv's dtype.

    Raises:
        ValueError: the projection does not divide into the heads, head_dim is odd, or tables or weights do not fit.

    Source: Su et al., 2021, eq. 34; Hugging Face's LLaMA uses the pairs i and i + D/2.
    """
    check_rope(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight)
    T, acc = qkv.shape[1], _accumulator(qkv)
    q, k, v = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split([n_head, n_kv_head, n_kv_head], dim=2)
    if q_weight is not None and k_weight is not None:
        q = F.rms_norm(q.to(acc), q_weight.shape, q_weight.to(acc), eps).to(qkv.dtype)
        k = F.rms_norm(k.to(acc), k_weight.shape, k_weight.to(acc), eps).to(qkv.dtype)
    cos, sin = cos[:T, None].to(acc), sin[:T, None].to(acc)  # (T, 1, D/2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved), v


def packed_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    n_head: int,
    n_kv_head: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = False,
) -> Tensor:
    """Computes causal attention of a packed projection: y = softmax(q k^T / sqrt(D)) v, where each k is not after q.

    Args:
        qkv, n_head, n_kv_head: as for `rope`.
        cos, sin: as for `rope`, or None for heads that are not rotated.
        q_weight, k_weight, eps, interleaved: as for `rope`; None without tables.

    Returns:
        y `(B, T, H, D)` in qkv's dtype.

    Raises:
        ValueError: as for `rope`.

    Source: Vaswani et al., 2017, eq. 1.
    """
    if cos is not None and sin is not None:
        q, k, v = rope(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight, eps, interleaved)
    else:
        q, k, v = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split([n_head, n_kv_head, n_kv_head], dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the pairs of x `(B, T, H, D)` by the angles with these cosines and sines, `(T, 1, D/2)`."""
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    one, two = pairs.unbind(-1 if interleaved else -2)
    rotated = (one * cos - two * sin, one * sin + two * cos)
    return torch.stack(rotated, -1 if interleaved else -2).flatten(-2).to(x.dtype)


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
    """Computes attention for one new token of each sequence, and adds its key and value to the cache.

    Args:
        qkv: `(B, 1, (H + 2 K) D)`, the packed projection of the new tokens.
        positions: `(B,)` int64, the position of each new token, 0..S-1.
        keys, values: `(B, S, K, D)` in qkv's dtype, contiguous: the cache, written at `positions`. All of it is finite.
        cos, sin: `(T, D / 2)` float32, the tables of rope for the positions 0..T-1, or None without rope.
        q_weight, k_weight, eps, interleaved: as for `rope`; QK-norm also works without rope.
        window: a token attends to itself and to the window - 1 tokens before it; 0: to all before it.

    Returns:
        `(B, 1, H D)` in qkv's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the window is negative.
    """
    check_decode_attention(qkv, positions, keys, values, cos, sin, q_weight, k_weight, window)
    B, S, K, D = keys.shape
    H = qkv.shape[2] // D - 2 * K
    if cos is not None and sin is not None:  # a token of each sequence, at positions of their own, as one sequence
        rows, tables = qkv.transpose(0, 1), (cos[positions], sin[positions])
        q, k, v = (x[0] for x in rope(rows, *tables, H, K, q_weight, k_weight, eps, interleaved))
    else:
        q, k, v = qkv.view(B, H + 2 * K, D).split([H, K, K], dim=1)
        if q_weight is not None and k_weight is not None:
            acc = _accumulator(qkv)
            q = F.rms_norm(q.to(acc), q_weight.shape, q_weight.to(acc), eps).to(qkv.dtype)
            k = F.rms_norm(k.to(acc), k_weight.shape, k_weight.to(acc), eps).to(qkv.dtype)
    batch = torch.arange(B, device=qkv.device)
    keys[batch, positions], values[batch, positions] = k, v
    if B and qkv.device.type == "cpu":  # elsewhere the host would wait for the device
        S = int(positions.max()) + 1
    place, position = torch.arange(S, device=qkv.device), positions[:, None]
    seen = place <= position if window == 0 else (place <= position) & (place > position - window)
    k, v = keys[:, :S].transpose(1, 2), values[:, :S].transpose(1, 2)
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=H != K)
    return y.view(B, 1, H * D)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
