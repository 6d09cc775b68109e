"""What every op asks of its arguments, in eager PyTorch and in Triton alike: one clear ValueError before anything runs.

Each check takes the arguments of the op of that name in `gptperf.kernels.reference` and returns nothing.
"""

import torch
from torch import Tensor

__all__ = ["check_adamw", "check_linear_cross_entropy", "check_norm", "check_rope", "check_swiglu", "check_triton"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Arguments of rms_norm and layer_norm.

    Raises:
        ValueError: a dtype, shape or device that does not go with x's.
    """
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"{op}: found x {_of(x)}, wanted (..., N) in a floating-point dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_like(op, name, tensor, x, x.shape[-1:])
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"{op}: found residual {_of(residual)}, wanted {_of(x)} as x")


def check_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    """Arguments of rope.

    Raises:
        ValueError: a projection that does not divide into the heads, an odd head_dim, tables or weights that do not
            fit.
    """
    if qkv.dtype not in FLOATS or qkv.dim() != 3:
        raise ValueError(f"rope: found qkv {_of(qkv)}, wanted (B, T, (H + 2 K) D) in a floating-point dtype")
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"rope: found {n_head} heads and {n_kv_head} key heads, wanted a multiple of the key heads")
    heads, width = n_head + 2 * n_kv_head, qkv.shape[2]
    if width % heads:
        raise ValueError(f"rope: found a projection of width {width}, wanted a multiple of {heads} heads")
    D, T = width // heads, qkv.shape[1]
    if D % 2:
        raise ValueError(f"rope: found head_dim {D}, wanted an even one; nearest: {D + 1}")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.dim() == 2 and table.shape[0] >= T and table.shape[1] * 2 == D
        precise = table.dtype == torch.float32 or table.dtype == qkv.dtype == torch.float64
        if not good or not precise or table.device != qkv.device:
            raise ValueError(f"rope: found {name} {_of(table)}, wanted ({T}, {D // 2}) torch.float32 on {qkv.device}")
    if cos.shape != sin.shape:
        raise ValueError(f"rope: found cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, wanted one shape")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rope: found one of q_weight and k_weight, wanted both or none")
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(f"rope: found q_weight {q_weight.dtype} and k_weight {k_weight.dtype}, wanted one dtype")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_like("rope", name, weight, qkv, torch.Size([D]))


def check_swiglu(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Arguments of swiglu.

    Raises:
        ValueError: an odd last dimension, or a weight or bias that does not fit.
    """
    if gate_up.dtype not in FLOATS or gate_up.dim() == 0:
        raise ValueError(f"swiglu: found gate_up {_of(gate_up)}, wanted (..., 2 F) in a floating-point dtype")
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"swiglu: found a last dimension of {width}, wanted an even one; nearest: {width + 1}")
    if weight is None:
        if bias is not None:
            raise ValueError("swiglu: found a bias without a weight")
        return
    wanted = f"{gate_up.dtype} on {gate_up.device}"
    if weight.dim() != 2 or weight.shape[1] != width // 2 or _differs(weight, gate_up):
        raise ValueError(f"swiglu: found weight {_of(weight)}, wanted (C, {width // 2}) {wanted}")
    if bias is not None and (bias.shape != weight.shape[:1] or _differs(bias, gate_up)):
        raise ValueError(f"swiglu: found bias {_of(bias)}, wanted ({weight.shape[0]},) {wanted}")


def check_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Arguments of linear_cross_entropy.

    Targets on a GPU cannot be looked at without waiting for it: there a target out of range makes the loss NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or, on the CPU, a target out of range.
    """
    op = "linear_cross_entropy"
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"{op}: found x {_of(x)}, wanted (..., C) in a floating-point dtype")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0 or _differs(weight, x):
        raise ValueError(f"{op}: found weight {_of(weight)}, wanted (V, {x.shape[-1]}) {x.dtype} on {x.device}")
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64 or targets.device != x.device:
        wanted = f"{tuple(x.shape[:-1])} torch.int64 on {x.device}"
        raise ValueError(f"{op}: found targets {_of(targets)}, wanted {wanted}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        V = weight.shape[0]
        bad = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        if bad.numel():
            wanted = f"0 to {V - 1} or ignore_index = {ignore_index}"
            raise ValueError(f"{op}: found target {int(bad[0])}, wanted {wanted}")


def check_adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, compute: Tensor | None, scalars: Tensor
) -> None:
    """Arguments of adamw.

    Raises:
        ValueError: tensors of different shapes, devices or dtypes, or not contiguous.
    """
    named = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    wanted = f"{tuple(master.shape)} torch.float32 on {master.device}, contiguous"
    for name, tensor in named.items():
        if tensor.dtype != torch.float32 or _not_laid_as(tensor, master):
            raise ValueError(f"adamw: found {name} {_of(tensor)} with strides {tensor.stride()}, wanted {wanted}")
    if compute is not None and _not_laid_as(compute, master):
        wanted = f"{tuple(master.shape)} on {master.device}, contiguous"
        raise ValueError(f"adamw: found compute {_of(compute)} with strides {compute.stride()}, wanted {wanted}")
    if scalars.shape != (6,) or scalars.dtype != torch.float32 or _not_laid_as(scalars, scalars):
        raise ValueError(f"adamw: found scalars {_of(scalars)}, wanted (6,) torch.float32, contiguous")
    if scalars.device != master.device:
        raise ValueError(f"adamw: found scalars {_of(scalars)}, wanted them on {master.device}")


def _not_laid_as(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape != other.shape or tensor.device != other.device or not tensor.is_contiguous()


def check_triton(op: str, x: Tensor) -> None:
    """That a Triton kernel can run on x, the op's first argument; on a CPU only Triton's interpreter runs one.

    Raises:
        ValueError: float64, or a tensor that is not on a GPU.
    """
    if x.dtype == torch.float64:
        raise ValueError(f"{op}: found torch.float64, wanted float32, float16 or bfloat16 for the Triton kernel")
    if not x.is_cuda and not _interpreted():
        raise ValueError(f"{op}: found a tensor on {x.device}, wanted one on a CUDA GPU for the Triton kernel")


def _differs(tensor: Tensor, x: Tensor) -> bool:
    """On another device, or in another dtype where autocast does not make them one."""
    dtypes = tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    return dtypes or tensor.device != x.device


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton  # only here: eager PyTorch runs without it

    return bool(triton.knobs.runtime.interpret)


def _check_like(op: str, name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    """A vector of `shape` in x's dtype or float32, beside x."""
    if tensor.shape != shape or tensor.dtype not in (x.dtype, torch.float32) or tensor.device != x.device:
        dtypes = str(x.dtype) if x.dtype == torch.float32 else f"{x.dtype} or torch.float32"
        raise ValueError(f"{op}: found {name} {_of(tensor)}, wanted {tuple(shape)} {dtypes} on {x.device}")


def _of(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
