"""Registers an op with torch.library and launches its kernels, with little work on the host.

The step of a small model waits for the host: PyTorch's dispatcher costs a Python op about 30 us in each direction, and
Triton's launcher about as much again. So an op that is called on plain tensors calls its implementation directly, and a
kernel that was launched before with arguments of the same kind is not looked up again. Compilers and tracers see the
registered op.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ceil_div", "compile_ahead", "launch", "power_of_2", "register", "wait_for_previous"]

EARLY = True
"""Whether kernels with the constant `EARLY` are launched early where the GPU can do so; see `wait_for_previous`."""

_library = torch.library.Library("gptperf", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
"""Constants of a launch that go to Triton's compiler and not to the kernel."""
_registered: list[Any] = []
_launched: dict[tuple[Any, ...], Any] = {}
"""Properties that Triton compiles a kernel for -> the compiled kernel."""
_ahead: contextvars.Context | None = None
"""The context in which `launch` only compiles, while `compile_ahead` is active."""


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an op in the namespace `gptperf`.

    Args:
        schema: the schema that torch.library takes, without the namespace.
        forward: the implementation.
        fake: returns contiguous outputs of the right shape and dtype without computing them.
        save: `setup_context` of an autograd function, for an op that has a gradient.
        differentiate: `backward` of that function; it cannot be differentiated again.

    Returns:
        A function that calls the op.
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


def _introduce_to_inductor() -> bool:
    """Registers a lowering of every op with Inductor, while the first call of an op is traced.

    PyTorch 2.11 makes the lowering itself when it meets an op that has none, but first formats a log line with
    everything that the inputs were computed from. Every residual add doubles the length of that line, so the loss of a
    model with 12 layers never compiles.
    """
    from torch._inductor import lowering

    for op in _registered:
        if op not in lowering.lowerings:
            lowering.make_fallback(op, warn=False)
    return True


# What torch.compiler.assume_constant_result sets; that function imports the compiler, which not every run needs.
_introduce_to_inductor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autograd_function(
    name: str, forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the `apply` of an autograd function that joins forward and save.

    They are joined because PyTorch inspects the signature in every call of a separate `setup_context`.
    """

    def forward_and_save(ctx: Any, *arguments: Any) -> Any:
        outputs = forward(*arguments)
        save(ctx, arguments, outputs)
        return outputs

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(once_differentiable(differentiate))}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return function.apply


def ceil_div(a: int, b: int) -> int:
    """Returns a / b rounded up. Triton's own function takes microseconds, because it also works in kernels."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n; n >= 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Waits until the previous kernel of the stream has ended and its results can be read.

    CUDA calls it programmatic dependent launch: the programs of a kernel start as soon as all programs of the previous
    one have called this function or ended. They call it before the previous one has ended, so several kernels in a row
    may run at once. Before the call a kernel may only read what none of them writes, such as weights: what was written
    before the last kernel that does not call it, or that `launch` does not launch early, as those of PyTorch. Every
    program has to call it: then a kernel has ended after all kernels before it, as usual. A kernel that does not call
    it starts when the previous one has ended. `launch` sets the constant.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def _launches_early(device: torch.device) -> bool:
    return EARLY and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@contextlib.contextmanager
def compile_ahead(threads: int) -> Iterator[None]:
    """Compiles kernels in parallel: in the body `launch` starts their compilation in threads, and does not run them.

    So the outputs of ops are undefined in the body. After the body all kernels are compiled. If a kernel cannot be
    compiled, its next launch raises the error.
    """
    global _ahead
    with ThreadPoolExecutor(threads) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        # Backward launches in a thread of its own, which does not see the context variable of Triton's mode.
        _ahead = contextvars.copy_context()
        try:
            yield
        finally:
            _ahead = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    scalars: Sequence[float],
    constants: Mapping[str, Any],
) -> None:
    """Runs kernel[grid](*tensors, *scalars, **constants) on the device of the first tensor.

    Args:
        kernel: a Triton kernel whose parameters are pointers, then numbers, then constants.
        grid: the number of programs in each dimension.
        tensors: the pointers, in the kernel's order.
        scalars: the numbers, in the kernel's order.
        constants: the constants by name, in the kernel's order, then options of Triton's compiler. `EARLY`, if it is
            true and the GPU can do so, launches the kernel before the previous one has ended.
    """
    device = tensors[0].device
    if "EARLY" in constants:
        early = bool(constants["EARLY"]) and _launches_early(device)
        constants = {**constants, "EARLY": early, **({"launch_pdl": True} if early else {})}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, scalars, constants)
    if _ahead is not None:
        _ahead.run(partial(kernel.warmup, *tensors, *scalars, grid=grid, **constants))
        return None
    # Triton's own launcher is used in two cases: the interpreter has no compiled kernel, and a kernel that is compiled
    # for addresses that are multiples of 16 is wrong for other addresses, which views may have.
    if not isinstance(kernel, triton.JITFunction) or any(x.data_ptr() % 16 for x in tensors):
        kernel[grid](*tensors, *scalars, **constants)
        return None
    # Triton compiles a kernel for the dtypes, the constants, and whether each integer is 1, divisible by 16, or wide.
    kinds = [(x == 1, x % 16 == 0, -(2**31) <= x < 2**31) if type(x) is int else None for x in scalars]
    key = (id(kernel), device.index, *(x.dtype for x in tensors), *kinds, *constants.values())
    compiled = _launched.get(key)
    if compiled is None:
        _launched[key] = kernel[grid](*tensors, *scalars, **constants)
    else:
        values = [value for name, value in constants.items() if name not in _COMPILER_OPTIONS]
        compiled[(*grid, 1, 1)[:3]](*tensors, *scalars, *values)
    return None
