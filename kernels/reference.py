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

from gptperf.kernels.adamw_reference import adamw
from gptperf.kernels.attention_reference import decode_attention, packed_attention, rope
from gptperf.kernels.checks import (
    check_accumulate,
    check_activation,
    check_decode_linear,
    check_draw,
    check_linear_cross_entropy,
    check_norm,
    check_swiglu,
    check_symmetric_matmul,
)
from gptperf.kernels.linear import add_product, linear

__all__ = [
    "ACTIVATIONS",
    "accumulate",
    "activation",
    "adamw",
    "decode_attention",
    "decode_linear",
    "draw",
    "layer_norm",
]
__all__ += ["linear_cross_entropy", "packed_attention", "rms_norm", "rope", "softcapped", "sum_shares", "swiglu"]
__all__ += ["symmetric_matmul"]

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
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
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


def activation(
    x: Tensor, name: str, weight: Tensor | None = None, bias: Tensor | None = None, recompute: bool = True
) -> Tensor:
    """Applies an activation, and, with a weight, the down projection of the result.

    Args:
        x: `(..., F)`.
        name: a key of `ACTIVATIONS`.
        weight, bias: those of the down projection, `(C, F)` and `(C,)`, or None.
        recompute: whether the Triton op computes the activation again in backward. PyTorch always keeps it.

    Returns:
        `(..., F)`, or `(..., C)` with a weight.

    Raises:
        ValueError: the activation is unknown, or the weight or bias does not fit.
    """
    check_activation(x, name, weight, bias)
    y = ACTIVATIONS[name](x)
    return y if weight is None else linear(y, weight, bias)


def swiglu(gate_up: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, recompute: bool = True) -> Tensor:
    """Computes silu(gate) * up on the packed projection, and, with a weight, the down projection of that product.

    Args:
        gate_up: `(..., 2 F)`: F gate columns, then F up columns.
        weight, bias: those of the down projection, `(C, F)` and `(C,)`, or None.
        recompute: as in `activation`.

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


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    center: bool = False,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Computes activation(norm(x) W^T + bias) + residual for a few rows, as a step of text generation has them.

    Args:
        x: `(..., K)`, at most `DECODE_ROWS` rows.
        weight, bias: `(N, K)` in x's dtype; `(N,)` or None.
        norm_weight, norm_bias, eps, center: `(K,)` or None; a norm of x, `layer_norm` with `center`, else `rms_norm`.
        activation: a key of `ACTIVATIONS`, "swiglu", or "" for none. With "swiglu", W has the rows of gate, then of up.
        residual: like the result, or None.

    Returns:
        `(..., N)`, with "swiglu" `(..., N / 2)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or x is too large.
    """
    check_decode_linear(x, weight, bias, norm_weight, norm_bias, center, activation, residual)
    if norm_weight is not None:
        x = layer_norm(x, norm_weight, norm_bias, eps) if center else rms_norm(x, norm_weight, eps)  # type: ignore
    y = linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation:
        y = swiglu(y) if activation == "swiglu" else ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def draw(
    logits: Tensor, uniform: Tensor, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draws a token for each row of logits by inverting the distribution function at a given number.

    The function adds up the probabilities of the tokens that may be drawn. With top_k or top_p the likeliest token
    comes first, and of equally likely ones that with the lowest id; else tokens come in the order of their ids.

    Args:
        logits: `(B, V)`; NaN counts as infinity.
        uniform: `(B,)` float32, from 0 to below 1.
        vocab_size: number of ids that may be drawn, 1..V.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: number of the likeliest tokens to draw from; 0 draws from all.
        top_p: draws from the fewest of the likeliest tokens whose probabilities add up to this, above 0 and up to 1.

    Returns:
        The ids `(B,)` int64.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Fan et al., 2018 (top_k); Holtzman et al., 2020 (top_p).
    """
    check_draw(logits, uniform, vocab_size, temperature, top_k, top_p)
    x = logits[:, :vocab_size].float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if temperature == 0:
        return x.argmax(-1)
    ids = None
    if 0 < top_k < vocab_size or top_p < 1:
        bits = (x + 0.0).view(torch.int32).long()  # -0 becomes 0
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        keys = (order << 32) + (0x7FFFFFFF - torch.arange(vocab_size, device=x.device))
        ids = 0x7FFFFFFF - (keys.topk(min(top_k or vocab_size, vocab_size)).values & 0xFFFFFFFF)
        x = x.gather(-1, ids)
    # In float64, and with the maximum at 0 even if it is infinite, no temperature overflows.
    weights = ((x - x.amax(-1, keepdim=True)).nan_to_num(neginf=-torch.inf).double() / temperature).exp()
    sums = weights.cumsum(-1)
    if top_p < 1:
        weights = weights * (sums - weights < top_p * sums[:, -1:])
        sums = weights.cumsum(-1)
    place = (sums <= uniform.double()[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


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


def accumulate(total: Tensor, gradient: Tensor) -> None:
    """Adds a gradient to the sum of those before it.

    Args:
        total: any shape, float32, contiguous; the gradient is added to it.
        gradient: in the shape of total, in any floating-point dtype.

    Raises:
        ValueError: total is not contiguous float32, or the gradient has another shape or device.
    """
    check_accumulate(total, gradient)
    total.add_(gradient)
