"""Causal attention of a packed projection, by cuDNN. Backward writes the packed gradient.

    q, k, v = the heads of qkv;  q and k are rotated if there are tables;  y = softmax(q k^T / sqrt(D)) v, causal

PyTorch's `scaled_dot_product_attention` runs the same cuDNN kernels, but returns the gradients of q, k and v as three
tensors, which another kernel has to join. Here cuDNN writes them side by side, and rotation changes queries and keys in
place, forward and backward. So the values are never copied. Elements moved by rotation for S = B T (H + K) D: 2 S in
each direction, with QK-norm 3 S in backward.

The op is not registered with torch.library, because it overwrites its input; compilers and tracers see `rope` and
PyTorch's attention. It needs the package nvidia-cudnn-frontend, an interface to the cuDNN that PyTorch has loaded.

Eager reference: `gptperf.kernels.reference.packed_attention`.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptperf.kernels.checks import check_rope
from gptperf.kernels.rope import rotate, rotate_back

__all__ = ["packed_attention"]


def _fits(qkv: Tensor, n_head: int, n_kv_head: int) -> bool:
    """Returns whether the op can run now: nothing watches the ops, and cuDNN takes the dtype and the shape.

    With deterministic algorithms it cannot, because cuDNN's backward adds up dq in an order that varies.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch.are_deterministic_algorithms_enabled():
        return False
    D = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    takes = qkv.dtype in _CUDNN_TYPES and D % 8 == 0 and D <= 128 and qkv.shape[1] > 1 and qkv.numel() > 0
    return takes and type(qkv) is Tensor


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        heads: tuple[int, int],
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        ctx.heads, ctx.eps, ctx.interleaved = heads, eps, interleaved
        q, k, v = _split(qkv, heads)
        normed = None
        if cos is not None and sin is not None:
            if q_weight is not None:  # its backward reads queries and keys as they were, so they are not overwritten
                normed = qkv.new_empty((*qkv.shape[:2], sum(heads), q.shape[-1]))
                q, k = normed.split(heads, dim=2)
            elif not qkv.is_inference():
                torch.autograd.graph.increment_version(qkv)  # autograd then refuses backward of an op that kept it
            rotate(qkv, (cos, sin), (q_weight, k_weight), eps, interleaved, (q, k), None)
        y, statistics = _attend(q, k, v)
        ctx.save_for_backward(qkv, normed, y, statistics, cos, sin, q_weight, k_weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, normed, y, statistics, cos, sin, *weights = ctx.saved_tensors
        q, k, v = _split(qkv, ctx.heads)
        if normed is not None:
            q, k = normed.split(ctx.heads, dim=2)
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = _split(dqkv, ctx.heads)
        _attend_backward(dy.contiguous(), (q, k, v), y, statistics, (dq, dk, dv))
        dweights: tuple[Tensor | None, Tensor | None] = (None, None)
        if cos is not None:
            before = None if normed is None else qkv
            options = (cos, sin), tuple(weights), ctx.eps, ctx.interleaved
            dweights = rotate_back((dq, dk), None, before, *options, dqkv)
        return dqkv, None, None, None, *dweights, None, None


def _split(packed: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """Returns views of the heads of q `(B, T, H, D)`, and of k and v `(B, T, K, D)`."""
    H, K = heads
    return packed.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns causal attention `(B, T, H, D)`, contiguous, and its logsumexp `(B, H, T, 1)` float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y, statistics, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return y.transpose(1, 2).contiguous(), statistics


def _attend_backward(
    dy: Tensor, qkv: tuple[Tensor, Tensor, Tensor], y: Tensor, statistics: Tensor, out: tuple[Tensor, ...]
) -> None:
    """Writes the gradients of q, k and v to `out`, from dy and y `(B, T, H, D)`, contiguous."""
    tensors = [x.detach().transpose(1, 2) for x in (*qkv, y, dy)]
    tensors += [statistics, *(x.transpose(1, 2) for x in out)]
    layout = tuple((tuple(x.shape), x.stride()) for x in tensors)
    graph, names = _backward_graph(layout, dy.dtype, dy.device.index)
    handle = _handle(dy.device.index)
    cudnn = importlib.import_module("cudnn")
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(dy.device).cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=dy.device)
    graph.execute(dict(zip(names, tensors, strict=True)), workspace, handle=handle)


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


@functools.cache
def _backward_graph(
    layout: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], dtype: torch.dtype, device: int
) -> tuple[Any, list[Any]]:
    """Returns cuDNN's graph for these shapes and strides, and its tensors in the order of `_attend_backward`."""
    cudnn = importlib.import_module("cudnn")
    kind, single = getattr(cudnn.data_type, _CUDNN_TYPES[dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=single, compute_data_type=single, handle=_handle(device)
    )
    given = [
        graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=single if name == "stats" else kind)
        for name, (shape, stride) in zip(_INPUTS, layout, strict=False)
    ]
    scale = layout[0][0][-1] ** -0.5
    found = graph.sdpa_backward(
        name="sdpa_backward", **dict(zip(_INPUTS, given, strict=True)), attn_scale=scale, use_causal_mask=True
    )
    for tensor, (shape, stride) in zip(found, layout[len(given) :], strict=True):
        tensor.set_output(True).set_dim(list(shape)).set_stride(list(stride))
    try:
        graph.build([cudnn.heur_mode.A])
    except cudnn.cudnnGraphNotSupportedError as error:  # of no class that callers know
        raise RuntimeError(f"cuDNN has no backward of attention for these tensors: {error}") from error
    return graph, [*given, *found]


_CUDNN_TYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
_INPUTS = ("q", "k", "v", "o", "dO", "stats")


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
) -> Tensor | None:
    """Computes causal attention of a packed projection; see `gptperf.kernels.reference.packed_attention`.

    Returns:
        y `(B, T, H, D)`; qkv, which nothing else may read, is overwritten. None where cuDNN cannot run the op now: in
        float32, with a head_dim that it does not have, QK-norm without tables, torch.compile or deterministic
        algorithms. Then qkv is as it was.
    """
    if (cos is None and q_weight is not None) or not _fits(qkv, n_head, n_kv_head):
        return None
    if cos is not None and sin is not None:
        check_rope(qkv, cos, sin, n_head, n_kv_head, q_weight, k_weight)
    qkv = qkv.contiguous()
    return _PackedAttention.apply(qkv, cos, sin, (n_head, n_kv_head), q_weight, k_weight, eps, interleaved)
