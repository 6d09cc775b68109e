"""Chooses the code that runs an op, its Triton kernel or eager PyTorch, by the key `kernels` (auto, triton, eager).

Importing this module loads no torch.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gptperf.errors import DeviceError

__all__ = [
    "ALL_TRITON",
    "GENERATION",
    "MEASURED_WITH",
    "OPS",
    "Ops",
    "keeping_ffn",
    "resolve_ops",
    "unmeasured_versions",
    "why_not_packed",
    "without_triton",
]

OPS = {
    "rms_norm": "gptperf.kernels.rms_norm",
    "layer_norm": "gptperf.kernels.layer_norm",
    "rope": "gptperf.kernels.rope",
    "activation": "gptperf.kernels.activation",
    "swiglu": "gptperf.kernels.activation",
    "linear_cross_entropy": "gptperf.kernels.linear_cross_entropy",
    "decode_attention": "gptperf.kernels.decode_attention",
    "decode_linear": "gptperf.kernels.decode_linear",
    "draw": "gptperf.kernels.draw",
    "adamw": "gptperf.kernels.adamw",
    "symmetric_matmul": "gptperf.kernels.symmetric_matmul",
    "accumulate": "gptperf.kernels.accumulate",
}
"""Op name -> module of its Triton kernel. `gptperf.kernels.reference` has an eager function for each name."""
GENERATION = ("decode_attention", "decode_linear", "draw")
"""Ops that generate text. A training run does so for its sample alone."""

ALL_TRITON = "off: every op is a Triton kernel"
"""Why torch.compile is off by default where no op runs in eager PyTorch."""

MEASURED_WITH = {"torch": "2.11.0", "triton": "3.6.0"}
"""Versions with which every GPU figure was measured; `constraints-gpu.txt` pins the same pair."""

_OLDEST_CAPABILITY = {"symmetric_matmul": (8, 0)}
"""Oldest compute capability that an op runs on, if it is not `_OLDEST`: Triton multiplies with the tensor cores of 8.0
and later."""
_OLDEST = (7, 0)


@dataclass(frozen=True)
class Ops:
    """The implementations that a model and its optimizer call, with the signatures of `gptperf.kernels.reference`."""

    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rope: Callable[..., Any]
    activation: Callable[..., Any]
    swiglu: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    decode_attention: Callable[..., Any]
    decode_linear: Callable[..., Any]
    draw: Callable[..., Any]
    adamw: Callable[..., None]
    symmetric_matmul: Callable[..., Any]
    accumulate: Callable[..., None]
    chosen: dict[str, str]
    """Op name -> "eager" or "triton", for the ops that are used."""
    reasons: dict[str, str]
    """Op name -> why it runs in eager PyTorch although `kernels` is "auto"."""
    packed_attention: Callable[..., Any] | None = None
    """Attention of a packed projection, which cuDNN computes; None where the model calls `rope` and SDPA instead."""
    not_packed: str = ""
    """Why there is no `packed_attention`."""


def resolve_ops(kernels: str, device_type: str, unused: Collection[str] = ()) -> Ops:
    """Chooses the implementation of every op.

    Args:
        kernels: "eager", "triton" (an error where Triton cannot run) or "auto" (Triton where it can run, else eager).
        device_type: "cuda" or "cpu".
        unused: ops that the run does not call, or for so short a time that their kernels need not be compiled. They
            run in eager PyTorch and are not in `Ops.chosen`.

    Raises:
        DeviceError: `kernels` is "triton" and an op cannot run with Triton; the message has the reasons.
    """
    reference = importlib.import_module("gptperf.kernels.reference")
    functions = {op: getattr(reference, op) for op in OPS}
    chosen = {op: "eager" for op in OPS if op not in unused}
    reasons: dict[str, str] = {}
    for op, module in OPS.items():
        if kernels == "eager" or op in unused:
            continue
        reason = _why_not_triton(device_type, _OLDEST_CAPABILITY.get(op, _OLDEST))
        if reason is None:
            chosen[op], functions[op] = "triton", getattr(importlib.import_module(module), op)
        else:
            reasons[op] = reason
    _refuse(kernels, reasons)
    not_packed = _why_not_packed() if chosen.get("rope") == "triton" else "rope runs in eager PyTorch"
    packed = None if not_packed else importlib.import_module("gptperf.kernels.packed_attention").packed_attention
    return Ops(**functions, chosen=chosen, reasons=reasons, packed_attention=packed, not_packed=not_packed)


def why_not_packed(capability: tuple[int, int]) -> str | None:
    """Returns why a GPU of this compute capability cannot run `packed_attention`, or None if it can."""
    if capability[0] not in (9, 10):
        return "cuDNN's attention is the fastest on Hopper and on Blackwell's data-centre GPUs only"
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    return None


def _why_not_packed() -> str:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return why_not_packed(torch.cuda.get_device_capability()) or ""


def keeping_ffn(ops: Ops) -> Ops:
    """Returns the ops with those of the FFN keeping their activation for backward, instead of computing it again."""
    return replace(
        ops, activation=partial(ops.activation, recompute=False), swiglu=partial(ops.swiglu, recompute=False)
    )


def without_triton(ops: Ops, kernels: str, reasons: dict[str, str]) -> Ops:
    """Returns the ops with those in `reasons` (op name -> why) replaced by eager PyTorch.

    Raises:
        DeviceError: `kernels` is "triton" and `reasons` is not empty.
    """
    not_packed = reasons.get("packed_attention", "rope runs in eager PyTorch" if "rope" in reasons else "")
    if not_packed:  # rope and SDPA are as good a choice of Triton's ops
        ops = replace(ops, packed_attention=None, not_packed=not_packed)
    reasons = {op: reason for op, reason in reasons.items() if op in OPS}
    _refuse(kernels, reasons)
    reference = importlib.import_module("gptperf.kernels.reference")
    functions = {op: getattr(reference, op) for op in reasons}
    chosen = ops.chosen | dict.fromkeys(reasons, "eager")
    return replace(ops, **functions, chosen=chosen, reasons=ops.reasons | reasons)


def _refuse(kernels: str, reasons: dict[str, str]) -> None:
    if kernels == "triton" and reasons:
        causes = "; ".join(f"{op}: {reason}" for op, reason in reasons.items())
        raise DeviceError(f"kernels = 'triton' is not available: {causes}. Use kernels = 'auto' or 'eager'.")


def _why_not_triton(device_type: str, oldest: tuple[int, int]) -> str | None:
    """Returns why Triton cannot run an op on this device, or None where it can.

    Args:
        device_type: "cuda" or "cpu".
        oldest: oldest compute capability that the op runs on.
    """
    if device_type != "cuda":
        return f"Triton needs a CUDA GPU, and the device is {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    torch = importlib.import_module("torch")
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability()
    if capability < oldest:
        wanted, found = (".".join(map(str, pair)) for pair in (oldest, capability))
        return f"Triton needs compute capability {wanted} or higher, and this GPU has {found}"
    return None


def unmeasured_versions(device_type: str) -> str | None:
    """Returns a note where a GPU runs with another torch or triton than `MEASURED_WITH`, else None."""
    if device_type != "cuda":
        return None
    found = {package: _installed(package) for package in MEASURED_WITH}
    if found == MEASURED_WITH:
        return None
    here, measured = (
        " with ".join(f"{name} {version}" for name, version in pair.items()) for pair in (found, MEASURED_WITH)
    )
    return f"{here} is not measured: every GPU figure was measured on {measured}"


def _installed(package: str) -> str:
    """Returns the public version of a package, without the build ("+cu130"), or "(not installed)"."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
