"""Checks the arguments of every op, for eager PyTorch and Triton alike, and raises a ValueError before anything runs.

Each check takes the arguments of the op of that name in `gptperf.kernels.reference`, and returns nothing.
"""

import math

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "SEED_NUMEL", "check_activation", "check_adamw", "check_decode_attention", "check_draw"]
__all__ += ["check_linear_cross_entropy", "check_norm", "check_quantize", "check_rope", "check_swiglu"]
__all__ += ["DECODE_ROWS", "DECODE_WIDTH", "check_decode_linear", "check_symmetric_matmul", "check_triton"]
__all__ += ["interpreter_is_on"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SEED_NUMEL = 64
"""Elements that share a seed in adamw."""
DECODE_ROWS, DECODE_WIDTH = 4, 16384
"""Most rows and columns of the input of decode_linear."""
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "relu_squared")
"""Names that the op `activation` takes."""


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Checks the arguments of rms_norm or layer_norm.

    Args:
        op: name of the op, for the message.
        x: `(..., N)`.
        weight: `(N,)`.
        bias: `(N,)` or None.
        residual: like x, or None.

    Raises:
        ValueError: a dtype, shape or device does not match x.
    """
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"{op}: found x {_describe(x)}, wanted (..., N) in a floating-point dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_vector(op, name, tensor, x, x.shape[-1:])
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"{op}: found residual {_describe(residual)}, wanted {_describe(x)} like x")


def check_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    """Checks the arguments of rope.

    Raises:
        ValueError: the projection does not divide into the heads, head_dim is odd, or tables or weights do not fit.
    """
    if qkv.dtype not in FLOATS or qkv.dim() != 3:
        raise ValueError(f"rope: found qkv {_describe(qkv)}, wanted (B, T, (H + 2 K) D) in a floating-point dtype")
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(
            f"rope: found {n_head} query heads and {n_kv_head} key heads, wanted a number of query heads that is a "
            "multiple of the number of key heads"
        )
    heads, width = n_head + 2 * n_kv_head, qkv.shape[2]
    if width % heads:
        nearest = max(round(width / heads), 1) * heads
        raise ValueError(
            f"rope: found a projection of width {width}, wanted a multiple of {heads} heads; nearest: {nearest}"
        )
    D, T = width // heads, qkv.shape[1]
    if D % 2:
        raise ValueError(f"rope: found head_dim {D}, wanted an even head_dim; nearest: {D + 1}")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 2 and table.shape[0] >= T and table.shape[1] * 2 == D
        precise = table.dtype == torch.float32 or table.dtype == qkv.dtype == torch.float64
        if not fits or not precise or table.device != qkv.device:
            wanted = f"({T}, {D // 2}) torch.float32 on {qkv.device}"
            raise ValueError(f"rope: found {name} {_describe(table)}, wanted {wanted}")
    if cos.shape != sin.shape:
        raise ValueError(f"rope: found cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, wanted the same shape")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rope: found only one of q_weight and k_weight, wanted both or neither")
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(f"rope: found q_weight {q_weight.dtype} and k_weight {k_weight.dtype}, wanted the same dtype")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_vector("rope", name, weight, qkv, torch.Size([D]))


def check_activation(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> None:
    """Checks the arguments of activation.

    Raises:
        ValueError: the activation is unknown, or the weight or bias does not fit.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: found {name!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"activation: found x {_describe(x)}, wanted (..., F) in a floating-point dtype")
    _check_down_projection("activation", x, x.shape[-1], weight, bias)


def check_swiglu(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Checks the arguments of swiglu.

    Raises:
        ValueError: the last dimension is odd, or the weight or bias does not fit.
    """
    if gate_up.dtype not in FLOATS or gate_up.dim() == 0:
        raise ValueError(f"swiglu: found gate_up {_describe(gate_up)}, wanted (..., 2 F) in a floating-point dtype")
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"swiglu: found a last dimension of {width}, wanted an even one; nearest: {width + 1}")
    _check_down_projection("swiglu", gate_up, width // 2, weight, bias)


def check_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Checks the arguments of linear_cross_entropy.

    The values of targets on a GPU are not checked, because the check would wait for the GPU. There a target out of
    range makes the loss NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, on the CPU, a target is out of range.
    """
    op = "linear_cross_entropy"
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"{op}: found x {_describe(x)}, wanted (..., C) in a floating-point dtype")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0 or _does_not_match(weight, x):
        wanted = f"(V, {x.shape[-1]}) {x.dtype} on {x.device}, V at least 1"
        raise ValueError(f"{op}: found weight {_describe(weight)}, wanted {wanted}")
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64 or targets.device != x.device:
        wanted = f"{tuple(x.shape[:-1])} torch.int64 on {x.device}"
        raise ValueError(f"{op}: found targets {_describe(targets)}, wanted {wanted}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        V = weight.shape[0]
        bad = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        if bad.numel():
            wanted = f"0 to {V - 1} or ignore_index = {ignore_index}"
            raise ValueError(f"{op}: found target {int(bad[0])}, wanted {wanted}")


def check_adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute: Tensor | None,
    scalars: Tensor,
    seeds: Tensor | None,
) -> None:
    """Checks the arguments of adamw.

    Raises:
        ValueError: tensors differ in shape, device or dtype, or one is not contiguous.
    """
    moment = exp_avg.dtype if exp_avg.dtype == torch.bfloat16 else torch.float32
    named = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in named.items():
        dtype = moment if name.startswith("exp") else torch.float32
        if name == "grad" and tensor.dtype == torch.bfloat16:
            dtype = torch.bfloat16
        wanted = f"{tuple(master.shape)} {dtype} on {master.device}, contiguous"
        if tensor.dtype != dtype or not _is_laid_out_like(tensor, master):
            raise ValueError(f"adamw: found {name} {_describe(tensor)} with strides {tensor.stride()}, wanted {wanted}")
    if compute is not None and not _is_laid_out_like(compute, master):
        wanted = f"{tuple(master.shape)} on {master.device}, contiguous"
        raise ValueError(f"adamw: found compute {_describe(compute)} with strides {compute.stride()}, wanted {wanted}")
    if scalars.shape != (6,) or scalars.dtype != torch.float32 or not scalars.is_contiguous():
        raise ValueError(f"adamw: found scalars {_describe(scalars)}, wanted (6,) torch.float32, contiguous")
    if scalars.device != master.device:
        raise ValueError(f"adamw: found scalars {_describe(scalars)}, wanted them on {master.device}")
    if moment == torch.float32:
        if seeds is not None:
            raise ValueError("adamw: found seeds with moments in float32, wanted None")
        return
    shape = (-(-master.numel() // SEED_NUMEL),)
    wanted = f"{shape} torch.int32 on {master.device}, contiguous, because the moments are bfloat16"
    if seeds is None:
        raise ValueError(f"adamw: found no seeds, wanted {wanted}")
    of_int32 = seeds.dtype == torch.int32 and seeds.is_contiguous() and seeds.device == master.device
    if seeds.shape != shape or not of_int32:
        raise ValueError(f"adamw: found seeds {_describe(seeds)}, wanted {wanted}")


def check_accumulate(total: Tensor, gradient: Tensor) -> None:
    """Checks the arguments of accumulate.

    Raises:
        ValueError: total is not contiguous float32, or the gradient has another shape or device.
    """
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(f"accumulate: found total {_describe(total)}, wanted torch.float32, contiguous")
    if gradient.shape != total.shape or gradient.device != total.device:
        wanted = f"{tuple(total.shape)} on {total.device}"
        raise ValueError(f"accumulate: found gradient {_describe(gradient)}, wanted {wanted}")


def check_symmetric_matmul(x: Tensor, z: Tensor | None, add: Tensor | None) -> None:
    """Checks the arguments of symmetric_matmul.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    op = "symmetric_matmul"
    if x.dtype not in FLOATS or x.dim() != 3 or not (x.is_contiguous() or x.mT.is_contiguous()):
        wanted = "(B, M, K) in a floating-point dtype, contiguous or the transpose of that"
        raise ValueError(f"{op}: found x {_describe(x)} with strides {x.stride()}, wanted {wanted}")
    for name, tensor, shape in (("z", z, tuple(x.shape)), ("add", add, (x.shape[0], x.shape[1], x.shape[1]))):
        if tensor is None:
            continue
        same = tensor.dtype == x.dtype and tensor.device == x.device
        laid_out = tensor.stride() == x.stride() if name == "z" else tensor.is_contiguous()
        if tensor.shape != shape or not same or not laid_out:
            wanted = f"{shape} {x.dtype} on {x.device}, " + ("with the strides of x" if name == "z" else "contiguous")
            raise ValueError(f"{op}: found {name} {_describe(tensor)} with strides {tensor.stride()}, wanted {wanted}")


def check_decode_attention(
    qkv: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    window: int,
) -> None:
    """Checks the arguments of decode_attention. The values of positions are not checked.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the window is negative.
    """
    op = "decode_attention"
    if qkv.dtype not in FLOATS or qkv.dim() != 3 or qkv.shape[1] != 1:
        raise ValueError(f"{op}: found qkv {_describe(qkv)}, wanted (B, 1, (H + 2 K) D) in a floating-point dtype")
    for name, cache in (("keys", keys), ("values", values)):
        fits = cache.dim() == 4 and cache.shape == keys.shape and cache.shape[0] == qkv.shape[0]
        if not fits or cache.dtype != qkv.dtype or cache.device != qkv.device or not cache.is_contiguous():
            wanted = f"({qkv.shape[0]}, S, K, D) {qkv.dtype} on {qkv.device}, contiguous"
            raise ValueError(f"{op}: found {name} {_describe(cache)} with strides {cache.stride()}, wanted {wanted}")
    if positions.shape != qkv.shape[:1] or positions.dtype != torch.int64 or positions.device != qkv.device:
        wanted = f"({qkv.shape[0]},) torch.int64 on {qkv.device}"
        raise ValueError(f"{op}: found positions {_describe(positions)}, wanted {wanted}")
    K, D = keys.shape[2:]
    heads, rest = divmod(qkv.shape[2], D) if K and D else (0, 0)
    if rest or heads <= 2 * K or heads % K:
        raise ValueError(
            f"{op}: found a projection of width {qkv.shape[2]}, wanted (H + 2 K) D with K = {K} and D = {D}, "
            "and H a multiple of K"
        )
    if window < 0:
        raise ValueError(f"{op}: found window {window}, wanted 0 or more")
    if cos is not None and sin is not None:
        check_rope(qkv, cos, sin, heads - 2 * K, K, q_weight, k_weight)
    elif cos is not None or sin is not None:
        raise ValueError(f"{op}: found only one of cos and sin, wanted both or neither")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: found only one of q_weight and k_weight, wanted both or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_vector(op, name, weight, qkv, torch.Size([D]))


def check_decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    center: bool,
    activation: str,
    residual: Tensor | None,
) -> None:
    """Checks the arguments of decode_linear.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, x is too large, or the activation is unknown.
    """
    op = "decode_linear"
    K = x.shape[-1] if x.dim() else 0
    if x.dtype not in FLOATS or not 0 < K <= DECODE_WIDTH or x.numel() // K > DECODE_ROWS:
        wanted = f"(..., K) in a floating-point dtype, at most {DECODE_ROWS} rows of 1 to {DECODE_WIDTH} columns"
        raise ValueError(f"{op}: found x {_describe(x)}, wanted {wanted}")
    if weight.dim() != 2 or weight.shape[1] != K or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"{op}: found weight {_describe(weight)}, wanted (N, {K}) {x.dtype} on {x.device}")
    if activation not in ("", "swiglu", *ACTIVATIONS):
        raise ValueError(f"{op}: found {activation!r}, wanted '', swiglu or one of {', '.join(ACTIVATIONS)}")
    N = weight.shape[0]
    if activation == "swiglu" and N % 2:
        raise ValueError(f"{op}: found N = {N} rows in weight, wanted an even number for swiglu; nearest: {N + 1}")
    for name, tensor, n in (("bias", bias, N), ("norm_weight", norm_weight, K), ("norm_bias", norm_bias, K)):
        if tensor is not None:
            _check_vector(op, name, tensor, x, torch.Size([n]))
    if norm_bias is not None and (norm_weight is None or not center):
        raise ValueError(f"{op}: found norm_bias, wanted it only with norm_weight and center")
    shape = (*x.shape[:-1], N // 2 if activation == "swiglu" else N)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"{op}: found residual {_describe(residual)}, wanted {shape} {x.dtype} on {x.device}")


def check_draw(logits: Tensor, uniform: Tensor, vocab_size: int, temperature: float, top_k: int, top_p: float) -> None:
    """Checks the arguments of draw.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a number is out of range.
    """
    if logits.dtype not in FLOATS or logits.dim() != 2:
        raise ValueError(f"draw: found logits {_describe(logits)}, wanted (B, V) in a floating-point dtype")
    if uniform.shape != logits.shape[:1] or uniform.dtype != torch.float32 or uniform.device != logits.device:
        wanted = f"({logits.shape[0]},) torch.float32 on {logits.device}"
        raise ValueError(f"draw: found uniform {_describe(uniform)}, wanted {wanted}")
    if not 1 <= vocab_size <= logits.shape[1]:
        raise ValueError(f"draw: found vocab_size {vocab_size}, wanted 1 to {logits.shape[1]}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"draw: found temperature {temperature}, wanted a finite number of 0 or more")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"draw: found top_k {top_k} and top_p {top_p}, wanted top_k >= 0 and 0 < top_p <= 1")


def check_quantize(x: Tensor, scale: Tensor) -> None:
    """Checks the arguments of quantize.

    Raises:
        ValueError: x is not a matrix of floating-point numbers, or the scale does not fit.
    """
    if x.dtype not in FLOATS or x.dim() != 2:
        raise ValueError(f"quantize: found x {_describe(x)}, wanted (M, N) in a floating-point dtype")
    if scale.dtype != torch.float32 or not scale.numel() or scale.device != x.device:
        raise ValueError(f"quantize: found scale {_describe(scale)}, wanted at least one torch.float32 on {x.device}")


def check_triton(op: str, x: Tensor) -> None:
    """Checks that a Triton kernel can run on x, the op's first argument. On a CPU only Triton's interpreter can.

    Raises:
        ValueError: x is float64, or is not on a GPU and the interpreter is off.
    """
    if x.dtype == torch.float64:
        raise ValueError(f"{op}: found torch.float64, wanted float32, float16 or bfloat16 for the Triton kernel")
    if not x.is_cuda and not interpreter_is_on():
        raise ValueError(f"{op}: found a tensor on {x.device}, wanted one on a CUDA GPU for the Triton kernel")


def interpreter_is_on() -> bool:
    """Returns whether Triton interprets its kernels on the CPU instead of compiling them."""
    import triton  # imported here only, because eager PyTorch runs without it

    return bool(triton.knobs.runtime.interpret)


# What torch.compiler.assume_constant_result sets; that function imports the compiler, which not every run needs.
interpreter_is_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_vector(op: str, name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    """Checks that a tensor has this shape, has x's dtype or float32, and is on x's device."""
    if tensor.shape != shape or tensor.dtype not in (x.dtype, torch.float32) or tensor.device != x.device:
        dtypes = str(x.dtype) if x.dtype == torch.float32 else f"{x.dtype} or torch.float32"
        raise ValueError(f"{op}: found {name} {_describe(tensor)}, wanted {tuple(shape)} {dtypes} on {x.device}")


def _check_down_projection(op: str, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Checks the weight `(C, width)` and bias `(C,)` of a down projection, or that both are None."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{op}: found a bias without a weight, wanted both, a weight alone or neither")
        return
    wanted = f"{x.dtype} on {x.device}"
    if weight.dim() != 2 or weight.shape[1] != width or _does_not_match(weight, x):
        raise ValueError(f"{op}: found weight {_describe(weight)}, wanted (C, {width}) {wanted}")
    if bias is not None and (bias.shape != weight.shape[:1] or _does_not_match(bias, x)):
        raise ValueError(f"{op}: found bias {_describe(bias)}, wanted ({weight.shape[0]},) {wanted}")


def _does_not_match(tensor: Tensor, x: Tensor) -> bool:
    """Returns whether a tensor is on another device than x, or has another dtype that autocast will not change."""
    other_dtype = tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    return other_dtype or tensor.device != x.device


def _is_laid_out_like(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.device == other.device and tensor.is_contiguous()


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
