"""How an op is registered with torch.library, and how its kernels are launched, with little work on the host.

A small model waits for the host: PyTorch's dispatcher costs a Python op some 30 us each way, Triton's launcher about as
much again. So an op called on plain tensors goes straight to its implementation, and a kernel that was launched before
with arguments of the same kind is not looked up again. Compilers and tracers see the registered op.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ceil_div", "launch", "power_of_2", "register"]

_library = torch.library.Library("gptperf", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_OPTIONS = ("num_warps", "maxnreg")  # of Triton's compiler
_registered: list[Any] = []
_launched: dict[tuple[Any, ...], Any] = {}


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an op in the namespace gptperf.

    Args:
        schema: as torch.library wants it, without the namespace.
        forward: the implementation.
        fake: outputs of the right shape and dtype, contiguous.
        save: `setup_context` of an autograd function, for an op that has a gradient.
        differentiate: its `backward`; once differentiable.

    Returns:
        The op as a function.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.needs_exact_strides)
    _library.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptperf::{name}", fake, lib=_library)
    direct = forward
    if save is not None and differentiate is not None:
        torch.library.register_autograd(f"gptperf::{name}", differentiate, setup_context=save, lib=_library)
        direct = _autograd_function(name, forward, save, differentiate)
    registered = getattr(torch.ops.gptperf, name).default
    _registered.append(registered)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            _introduce_to_inductor()
            return registered(*arguments)
        if torch._C._len_torch_dispatch_stack():
            return registered(*arguments)
        if all(type(x) in _PLAIN for x in arguments if isinstance(x, Tensor)):
            return direct(*arguments)
        return registered(*arguments)

    return call


@torch.compiler.assume_constant_result
def _introduce_to_inductor() -> bool:
    """Give Inductor a lowering of every op, while it traces the first call of one.

    PyTorch 2.11 makes one itself when it meets an op without, but first formats a log line with all that the inputs
    were computed from. With residual adds that doubles with every layer, and the loss of 12 layers never compiles.
    """
    from torch._inductor import lowering

    for op in _registered:
        if op not in lowering.lowerings:
            lowering.make_fallback(op, warn=False)
    return True


def _autograd_function(
    name: str, forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """Forward and save in one: with a `setup_context` of its own PyTorch would look at the signature in every call."""

    def forward_and_save(ctx: Any, *arguments: Any) -> Any:
        outputs = forward(*arguments)
        save(ctx, arguments, outputs)
        return outputs

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(once_differentiable(differentiate))}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return function.apply


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds, being for kernels too."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more; n >= 1."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    scalars: Sequence[float],
    constants: Mapping[str, Any],
) -> None:
    """kernel[grid](*tensors, *scalars, **constants), on the device of the first tensor.

    Args:
        kernel: a Triton kernel whose parameters are pointers, then numbers, then constants, in the order given.
        grid: programs.
        tensors: of the pointers.
        scalars: of the numbers.
        constants: by name: the constants in the kernel's order, then what `_OPTIONS` names.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, scalars, constants)
    if not isinstance(kernel, triton.JITFunction) or any(x.data_ptr() % 16 for x in tensors):  # the interpreter; views
        kernel[grid](*tensors, *scalars, **constants)
        return None
    # What Triton compiles a kernel for: dtypes, which integers are 1, divisible by 16 or wide, and the constants.
    kinds = [(x == 1, x % 16 == 0, -(2**31) <= x < 2**31) if type(x) is int else None for x in scalars]
    key = (id(kernel), device.index, *(x.dtype for x in tensors), *kinds, *constants.values())
    compiled = _launched.get(key)
    if compiled is None:
        _launched[key] = kernel[grid](*tensors, *scalars, **constants)
    else:
        values = [value for name, value in constants.items() if name not in _OPTIONS]
        compiled[(*grid, 1, 1)[:3]](*tensors, *scalars, *values)
    return None
