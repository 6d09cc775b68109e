"""The memory layouts in which the tests of kernels pass tensors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "laid_out"]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)[:, ::2]


def _column_slice(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _offset(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 1,), math.nan)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def _odd_strides(x: Tensor) -> Tensor:
    return x[:1].contiguous().as_strided((1, *x.shape[1:]), (3, x.shape[-1], 1))


def _channels_last(x: Tensor) -> Tensor:
    four = x.expand(3, *x.shape) + torch.arange(3.0, device=x.device, dtype=x.dtype).view(3, 1, 1, 1)
    return four.contiguous(memory_format=torch.channels_last)


def _packed(x: Tensor) -> Tensor:
    return torch.stack([x, -x, x / 2], dim=2).unbind(2)[1]


def _overlapping(x: Tensor) -> Tensor:
    B, T, N = x.shape
    return x.flatten()[: N + B * T].clone().as_strided((B, T, N), (T, 1, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "every other row": _every_other_row,
    "column slice": _column_slice,
    "offset storage": _offset,
    "stride 0": lambda x: x[:1, :1, :1].expand(x.shape),
    "broadcast batch": lambda x: x[:1].expand(x.shape),
    "channels last": _channels_last,
    "size 1, odd strides": _odd_strides,
    "packed qkv": _packed,
    "overlapping rows": _overlapping,
    "DTensor local": lambda x: _dtensor_local(x),
}
"""Name -> makes a tensor of that layout from a contiguous one `(B, T, N)`; values and shape may change."""


def laid_out(name: str, x: Tensor) -> Tensor:
    """Returns x in the layout of this name, and asserts that it is not contiguous if the name says so."""
    y = LAYOUTS[name](x)
    assert name in ("contiguous", "offset storage", "size 1, odd strides", "DTensor local") or not y.is_contiguous()
    return y


def _dtensor_local(x: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(x.device.type, (1,))
    return distribute_tensor(x, mesh, [Shard(0)]).to_local()
