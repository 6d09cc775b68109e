"""Every op in eager PyTorch: the fallback if no kernel can run, the oracle of the tests, the baseline of the bench.

Statistics, rotations and the log-sum-exp are computed in float32 (in float64 for float64 input) and rounded once to the
dtype of the input. The weights of the norms may be float32 while the activations have a lower precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf.kernels.checks import (
    check_adamw,
    check_linear_cross_entropy,
    check_norm,
    check_quantize,
    check_rope,
    check_swiglu,
)
from gptperf.kernels.float8 import INVERSE, PROGRAMS, format_of, scale_of
from gptperf.kernels.linear import linear

__all__ = ["adamw", "layer_norm", "linear_cross_entropy", "quantize", "quantize_swiglu", "quantize_swiglu_backward"]
__all__ += ["rms_norm", "rope", "sum_shares", "swiglu", "swiglu_backward"]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: `(..., N)`.
        weight: `(N,)`, in x's dtype or float32.
        eps: added to the mean square.
        residual: like x; if given, x + residual is normalised.

    Returns:
        y like x; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: a dtype, shape or device does not match x.

    Source: Zhang and Sennrich, 2019, eq. 4.
    """
    check_norm("rms_norm", x, weight, None, residual)
    if residual is not None:
        x = x + residual
    acc = _accumulator(x)
    y = F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)
    return y if residual is None else (y, x)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes LayerNorm over the last dimension: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Args:
        x: `(..., N)`.
        weight: `(N,)`, in x's dtype or float32.
        bias: `(N,)` or None.
        eps: added to the (biased) variance.
        residual: like x; if given, x + residual is normalised.

    Returns:
        y like x; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: a dtype, shape or device does not match x.

    Source: Ba, Kiros and Hinton, 2016, eq. 4.
    """
    check_norm("layer_norm", x, weight, bias, residual)
    if residual is not None:
        x = x + residual
    acc = _accumulator(x)
    y = F.layer_norm(x.to(acc), weight.shape, weight.to(acc), None if bias is None else bias.to(acc), eps).to(x.dtype)
    return y if residual is None else (y, x)


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
    B, T, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    q, k, v = qkv.view(B, T, heads, width // heads).split([n_head, n_kv_head, n_kv_head], dim=2)
    if q_weight is not None and k_weight is not None:
        acc = _accumulator(qkv)
        q = F.rms_norm(q.to(acc), q_weight.shape, q_weight.to(acc), eps).to(qkv.dtype)
        k = F.rms_norm(k.to(acc), k_weight.shape, k_weight.to(acc), eps).to(qkv.dtype)
    acc = _accumulator(qkv)
    cos, sin = cos[:T, None].to(acc), sin[:T, None].to(acc)  # (T, 1, D/2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the pairs of x `(B, T, H, D)` by the angles with these cosines and sines, `(T, 1, D/2)`."""
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    one, two = pairs.unbind(-1 if interleaved else -2)
    rotated = (one * cos - two * sin, one * sin + two * cos)
    return torch.stack(rotated, -1 if interleaved else -2).flatten(-2).to(x.dtype)


def swiglu(gate_up: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Computes silu(gate) * up on the packed projection, and, with a weight, the down projection of that product.

    Args:
        gate_up: `(..., 2 F)`: F gate columns, then F up columns.
        weight: `(C, F)`, the weight of the down projection, or None.
        bias: `(C,)`, the bias of the down projection, or None.

    Returns:
        `(..., F)`, or `(..., C)` with a weight.

    Raises:
        ValueError: the last dimension of gate_up is odd, or the weight or bias does not fit.

    Source: Shazeer, 2020, eq. 6.
    """
    check_swiglu(gate_up, weight, bias)
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if weight is None else linear(product, weight, bias)


def swiglu_backward(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    """Computes the gradient of `swiglu` without a weight, and its product again.

    Args:
        dy: `(..., F)`, the gradient of the product.
        gate_up: `(..., 2 F)`, like the argument of `swiglu`.
        product: whether the product is wanted.

    Returns:
        The gradient of gate_up, like gate_up, and the product, like dy; it is empty if it is not wanted.
    """
    dgate_up, y = _swiglu_backward(dy, gate_up)
    return dgate_up.to(gate_up.dtype), y.to(gate_up.dtype) if product else y.new_empty(0, dtype=gate_up.dtype)


def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of gate_up and the product in float32."""
    gate, up = gate_up.to(_accumulator(gate_up)).chunk(2, dim=-1)
    dy, sigmoid = dy.to(gate.dtype), gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu], -1), silu * up


def quantize(
    x: Tensor,
    scale: Tensor,
    *,
    e5m2: bool = False,
    rows: bool = True,
    columns: bool = False,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantises a matrix to 8-bit floats: q = round(clamp(x s)); infinities become NaN.

    Args:
        x: `(M, N)`.
        scale: float32, of which the first element is s; 0 stands for the scale of x's own largest value.
        e5m2: whether the format is E5M2, else E4M3.
        rows, columns: whether q and its transpose are wanted.
        after: None in the first use of x in a step. A later use, in backward, gives the scale that the first one has
            returned and gets no statistics; it gives a tensor of backward here, without which torch.compile would move
            it to the forward pass, and keep q until backward.

    Returns:
        q `(M, N)`, q transposed `(N, M)`, factors `(FACTORS,)` float32 with the scale at 0 and its inverse at
        `INVERSE`, and the statistics of x in `PROGRAMS` parts, `(4, PROGRAMS)` float32. What is not wanted is empty.
        The names are those of `gptperf.kernels.float8`.

    Raises:
        ValueError: x is not a matrix of floating-point numbers, or the scale does not fit.

    Source: Micikevicius et al., 2022, section 3.
    """
    check_quantize(x, scale)
    fresh = after is None
    form, wide = format_of(e5m2), x.to(_accumulator(x))
    size = wide.abs()
    amax = size.max().float() if x.numel() else scale.new_zeros(())
    used = torch.where(scale.flatten()[0] == 0, scale_of(amax, form.top), scale.flatten()[0]) if fresh else scale[0]
    q = torch.where(size < torch.inf, (wide * used).clamp(-form.largest, form.largest), torch.nan).to(form.dtype)
    scaled, nothing = size * used, q.new_empty(0)
    saturated = ((scaled > form.largest) & (size < torch.inf)).sum()
    flushed = ((scaled <= form.smallest / 2) & (size > 0)).sum()
    counts = torch.stack([amax, saturated.float(), flushed.float(), torch.full_like(amax, x.numel())])
    parts = F.pad(counts[:, None], (0, PROGRAMS - 1))
    factors = torch.stack([used, 1 / used]).repeat_interleave(INVERSE) if fresh else scale.new_empty(0)
    transposed = q.t().contiguous() if columns else nothing
    return q if rows else nothing, transposed, factors, parts if fresh else scale.new_empty(0)


def quantize_swiglu(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes silu(gate) * up in E4M3.

    Args:
        gate_up: `(M, 2 F)`: F gate columns, then F up columns.
        scale: see `quantize`.

    Returns:
        The product `(M, F)`, its factors, and its statistics, as from `quantize`.

    Raises:
        ValueError: gate_up or the scale does not fit.
    """
    check_swiglu(gate_up, None, None)
    gate, up = gate_up.to(_accumulator(gate_up)).chunk(2, dim=-1)
    q, _, factors, statistics = quantize(gate * gate.sigmoid() * up, scale)
    return q, factors, statistics


def quantize_swiglu_backward(
    dy: Tensor, gate_up: Tensor, scale: Tensor, product_scale: Tensor, *, e5m2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradient of gate_up in 8 bits, and the product of `quantize_swiglu` again, transposed.

    Args:
        dy: `(M, F)`, the gradient of the product.
        gate_up: `(M, 2 F)`.
        scale: of the gradient, see `quantize`.
        product_scale: the scale that `quantize_swiglu` has returned.
        e5m2: whether the format of the gradient is E5M2, else E4M3.

    Returns:
        The gradient `(M, 2 F)` and transposed `(2 F, M)`, the product transposed `(F, M)`, and the gradient's
        factors and statistics, as from `quantize`.

    Raises:
        ValueError: gate_up or a scale does not fit.
    """
    check_swiglu(gate_up, None, None)
    dgate_up, product = _swiglu_backward(dy, gate_up)
    q, columns, factors, statistics = quantize(dgate_up, scale, e5m2=e5m2, columns=True)
    return q, columns, quantize(product, product_scale, rows=False, columns=True, after=dy)[1], factors, statistics


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns the mean cross-entropy of the logits x weight^T against targets.

    Args:
        x: `(..., C)`.
        weight: `(V, C)` in x's dtype.
        targets: `(...)` int64, 0..V-1 or `ignore_index`.
        ignore_index: a target with this value does not count in the mean.

    Returns:
        A float32 scalar. It is 0 if every target is ignored, and NaN if a target on a GPU is out of range.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, on the CPU, a target is out of range.
    """
    check_linear_cross_entropy(x, weight, targets, ignore_index)
    logits = linear(x, weight)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    missing = (targets < 0) | (targets >= weight.shape[0])
    bad = missing & (targets != ignore_index)
    targets = targets.masked_fill(missing | (targets == ignore_index), -100)
    total = F.cross_entropy(logits.to(_accumulator(logits)), targets, reduction="sum")
    return (total / (targets != -100).sum().clamp(min=1)).masked_fill(bad.any(), torch.nan)


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
    """Does one AdamW update in place, and writes the copy of the weights that the model reads.

    Args:
        master, exp_avg, exp_avg_sq: the master weights and both moments, float32, any shape; updated.
        grad: like master, float32; may be overwritten.
        compute: like master, in the compute dtype, overwritten with the rounded weights; or None.
        scalars: `(6,)` float32: learning rate, t, 1 - beta1^t, 1 - beta2^t, the divisor of the gradient, and a flag
            that skips the update unless it is 0. t counts updates from 1.
        beta1, beta2: decay rates of the moments.
        eps: added to the square root of the second moment.
        weight_decay: decay rate of the weights; it is multiplied by the learning rate.

    Raises:
        ValueError: tensors differ in shape, device or dtype, or one is not contiguous.

    Source: Loshchilov and Hutter, 2019, algorithm 2.
    """
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars)
    lr, t, bias1, bias2, divisor, skip = scalars.unbind()
    if not torch.compiler.is_compiling():  # PyTorch's own kernel; torch.compile makes one kernel of the formula below
        torch._fused_adamw_(
            [master],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [t.clone()],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=(skip != 0).float(),
        )
    else:
        keep = skip == 0
        g = grad / divisor
        m = torch.lerp(exp_avg, g, 1 - beta1)
        v = torch.lerp(exp_avg_sq, g * g, 1 - beta2)
        w = master * (1 - lr * weight_decay) - (lr / bias1) * m / ((v / bias2).sqrt() + eps)
        exp_avg.copy_(torch.where(keep, m, exp_avg))
        exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq))
        master.copy_(torch.where(keep, w, master))
    if compute is not None:
        compute.copy_(master)


def sum_shares(out: Tensor, own: Tensor, pulled: Tensor, rank: int, add: bool) -> None:
    """Writes the sum of the shards of all n ranks, in rank order, to `out`, or adds it to `out`.

    Args:
        out: `(P,)` float32; it may be `own`.
        own: `(P,)`, this rank's shard, in any dtype.
        pulled: `(n - 1, P)`, the shards of the other ranks in rank order, in own's dtype.
        rank: this rank.
        add: add the sum to `out` instead of overwriting it.
    """
    total = torch.zeros_like(out)
    for x in (*pulled[:rank], own, *pulled[rank:]):
        total += x.float()
    out.copy_(out + total if add else total)
