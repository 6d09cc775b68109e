"""Every op in eager PyTorch: the fallback if no kernel can run, the oracle of the tests, the baseline of the bench.

The ops that quantise to 8-bit floats are in `gptperf.kernels.float8_reference`.

Statistics, rotations and the log-sum-exp are computed in float32 (in float64 for float64 input) and rounded once to the
dtype of the input. The weights of the norms may be float32 while the activations have a lower precision.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gptperf.kernels.checks import (
    SEED_NUMEL,
    check_activation,
    check_adamw,
    check_linear_cross_entropy,
    check_norm,
    check_rope,
    check_swiglu,
    check_symmetric_matmul,
)
from gptperf.kernels.linear import add_product, linear

__all__ = ["ACTIVATIONS", "activation", "adamw", "layer_norm", "linear_cross_entropy", "rms_norm", "rope"]
__all__ += ["softcapped", "sum_shares", "swiglu", "symmetric_matmul"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as the released GPT-2: Hendrycks and Gimpel, 2016, section 2
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),  # So et al., 2021, Primer
}
"""Name -> function from a tensor of any shape to one like it."""


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


def activation(x: Tensor, name: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Applies an activation, and, with a weight, the down projection of the result.

    Args:
        x: `(..., F)`.
        name: a key of `ACTIVATIONS`.
        weight: `(C, F)`, the weight of the down projection, or None.
        bias: `(C,)`, the bias of the down projection, or None.

    Returns:
        `(..., F)`, or `(..., C)` with a weight.

    Raises:
        ValueError: the activation is unknown, or the weight or bias does not fit.
    """
    check_activation(x, name, weight, bias)
    y = ACTIVATIONS[name](x)
    return y if weight is None else linear(y, weight, bias)


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


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Returns cap tanh(logits / cap), computed in float32 and rounded once; with a cap of 0 the logits as they are."""
    if softcap == 0:
        return logits
    return (softcap * torch.tanh(logits.to(_accumulator(logits)) / softcap)).to(logits.dtype)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float = 0.0
) -> Tensor:
    """Returns the mean cross-entropy of the logits x weight^T against targets.

    Args:
        x: `(..., C)`.
        weight: `(V, C)` in x's dtype.
        targets: `(...)` int64, 0..V-1 or `ignore_index`.
        ignore_index: a target with this value does not count in the mean.
        softcap: logits are limited to softcap tanh(logits / softcap) first; 0 leaves them as they are.

    Returns:
        A float32 scalar. It is 0 if every target is ignored, and NaN if a target on a GPU is out of range.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, on the CPU, a target is out of range.
    """
    check_linear_cross_entropy(x, weight, targets, ignore_index)
    logits = linear(x, weight)
    logits = softcapped(logits.to(_accumulator(logits)), softcap)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    missing = (targets < 0) | (targets >= weight.shape[0])
    bad = missing & (targets != ignore_index)
    targets = targets.masked_fill(missing | (targets == ignore_index), -100)
    total = F.cross_entropy(logits, targets, reduction="sum")
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
    seeds: Tensor | None = None,
) -> None:
    """Does one AdamW update in place, and writes the copy of the weights that the model reads.

    Args:
        master: the master weights, float32, any shape; updated.
        exp_avg, exp_avg_sq: both moments like master, float32 or bfloat16; updated. bfloat16 is rounded at random.
        grad: like master, float32; may be overwritten.
        compute: like master, in the compute dtype, overwritten with the rounded weights; or None.
        scalars: `(6,)` float32: learning rate, t, 1 - beta1^t, 1 - beta2^t, the divisor of the gradient, and a flag
            that skips the update unless it is 0. t counts updates from 1.
        beta1, beta2: decay rates of the moments.
        eps: added to the square root of the second moment.
        weight_decay: decay rate of the weights; it is multiplied by the learning rate.
        seeds: `(P / 64,)` int32 with moments in bfloat16: a seed for each 64 of the P weights, the same at every step.

    Raises:
        ValueError: tensors differ in shape, device or dtype, or one is not contiguous.

    Source: Loshchilov and Hutter, 2019, algorithm 2.
    """
    check_adamw(master, grad, exp_avg, exp_avg_sq, compute, scalars, seeds)
    lr, t, _, _, divisor, skip = scalars.unbind()
    if seeds is None and not torch.compiler.is_compiling():  # PyTorch's kernel; torch.compile makes one of the formula
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
        _adamw(master, grad, exp_avg, exp_avg_sq, scalars, beta1, beta2, eps, weight_decay, seeds)
    if compute is not None:
        compute.copy_(master)


def _adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seeds: Tensor | None,
) -> None:
    """Does the update by its formula."""
    lr, t, bias1, bias2, divisor, skip = scalars.unbind()
    keep = skip == 0
    g = grad / divisor
    m = torch.lerp(exp_avg.float(), g, 1 - beta1)
    v = torch.lerp(exp_avg_sq.float(), g * g, 1 - beta2)
    w = master * (1 - lr * weight_decay) - (lr / bias1) * m / ((v / bias2).sqrt() + eps)
    if seeds is not None:
        random = _random_bits(seeds, t).flatten()[: m.numel()].view(m.shape)
        m, v = _round_to_bfloat16(m, random & 0xFFFF), _round_to_bfloat16(v, (random >> 16) & 0xFFFF)
    exp_avg.copy_(torch.where(keep, m, exp_avg))
    exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq))
    master.copy_(torch.where(keep, w, master))


def _mix(h: Tensor) -> Tensor:
    """Returns a permutation of int32 in which every bit depends on all bits of h: the finalizer of MurmurHash3."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def _random_bits(seeds: Tensor, t: Tensor) -> Tensor:
    """Returns 32 random bits for each element, `(P / 64, 64)` int32: a hash of t, the seed and the place beside it."""
    lane = torch.arange(SEED_NUMEL, dtype=torch.int32, device=seeds.device)
    h = _mix(seeds ^ (t.to(torch.int32) * (0x9E3779B9 - 2**32)))
    return _mix(h[:, None] + lane * (0x85EBCA77 - 2**32))


def _round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Rounds float32 to values of bfloat16, up or down at random; `random` is an int32 from 0 to 2^16 - 1."""
    bits = (x.view(torch.int32) + random) & -(2**16)
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def symmetric_matmul(
    x: Tensor, z: Tensor | None = None, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Returns alpha x z^T + beta add for each matrix of a batch; x z^T and add are symmetric, and so is the result.

    x x^T is symmetric. So is the product of two symmetric matrices with the same eigenvectors, such as a power of one.

    Args:
        x: `(B, M, K)`, contiguous or the transpose (`mT`) of a contiguous tensor.
        z: like x, with its strides; default: x itself. The kernel computes the lower half of the result alone.
        add: `(B, M, M)`, contiguous symmetric matrices in x's dtype, or None.
        alpha, beta: factors.

    Returns:
        `(B, M, M)` in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    check_symmetric_matmul(x, z, add)
    nothing = x.new_zeros(()) if add is None else add
    return add_product(nothing, x, (x if z is None else z).mT, 0.0 if add is None else beta, alpha)


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
