"""Two questions, one place: which class a component's name means, and with what code an op runs.

Components say what is computed (`normalization = "rmsnorm"`), `kernels = auto|triton|eager` says with what. A component
from outside is added by `register(kind, name, cls)` in a module named by `--plugins`. Importing this module imports
no torch, so that a configuration is checked before torch is loaded.
"""

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gptperf.errors import ConfigError, DeviceError

__all__ = ["KINDS", "OPS", "Ops", "component", "component_names", "load_plugins", "register", "register_built_in"]
__all__ += ["resolve_ops", "without_triton"]

KINDS: dict[str, tuple[str, ...]] = {
    "normalization": ("layernorm", "layernorm_nobias", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "relu_squared"),
    "position_encoding": ("learned_absolute", "rope", "none"),
    "attention_backend": ("sdpa", "manual", "flash_attn"),
    "norm_position": ("pre", "post"),
    "ffn_type": ("standard", "swiglu"),
}
"""Component kind -> the names that `gptperf.model` registers for it."""

OPS = {
    "rms_norm": "gptperf.kernels.rms_norm",
    "layer_norm": "gptperf.kernels.layer_norm",
    "rope": "gptperf.kernels.rope",
    "swiglu": "gptperf.kernels.swiglu",
    "linear_cross_entropy": "gptperf.kernels.linear_cross_entropy",
    "adamw": "gptperf.kernels.adamw",
}
"""Op name -> module of its Triton implementation. Every op has an eager reference of that name."""

_OLDEST_CAPABILITY = (7, 0)

_components: dict[tuple[str, str], Any] = {}
_T = TypeVar("_T")


def register(kind: str, name: str, cls: _T) -> _T:
    """Make `name` a value of the configuration key `kind`.

    Args:
        kind: one of `KINDS`.
        name: the value in TOML and on the command line.
        cls: a function of a tensor for `activation`, for the other kinds a `nn.Module` class that is built and called
            as those in `gptperf.model` are.

    Raises:
        ValueError: unknown kind, or the name is taken by another class.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"unknown component kind {kind!r}; wanted one of {', '.join(KINDS)}{hint}")
    if name in KINDS[kind]:
        raise ValueError(f"{kind} {name!r} is gptperf's own; wanted another name")
    if _components.setdefault((kind, name), cls) is not cls:
        raise ValueError(f"{kind} {name!r} is registered already, as {_components[kind, name].__qualname__}")
    return cls


def register_built_in(classes: dict[str, dict[str, Any]]) -> None:
    """Fill in the names of `KINDS`: kind -> name -> class. For `gptperf.model`."""
    for kind, named in classes.items():
        assert tuple(named) == KINDS[kind], f"{kind}: {tuple(named)}"
        _components.update({(kind, name): cls for name, cls in named.items()})


def component_names(kind: str) -> tuple[str, ...]:
    """Names that `kind` may have now: the built-in ones, then those of plugins in the order of registration."""
    added = (name for k, name in _components if k == kind and name not in KINDS[kind])
    return KINDS[kind] + tuple(added)


def component(kind: str, name: str) -> Any:
    """The class or function registered for a component.

    Raises:
        ValueError: no such name; the nearest one is named.
    """
    importlib.import_module("gptperf.model")  # registers the built-in ones
    if (kind, name) not in _components:
        near = difflib.get_close_matches(name, component_names(kind), 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"unknown {kind} {name!r}; wanted one of {', '.join(component_names(kind))}{hint}")
    return _components[kind, name]


def load_plugins(modules: str) -> None:
    """Import the comma-separated modules of `--plugins`, each of which calls `register`.

    Raises:
        ConfigError: a module is not on the path, or cannot be imported.
    """
    for module in filter(None, (part.strip() for part in modules.split(","))):
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError, ValueError, TypeError, NameError, AttributeError) as error:
            raise ConfigError(f"plugins: {module}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Ops:
    """The implementation of every op that a model calls, chosen once. Signatures: `gptperf.kernels.reference`."""

    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    adamw: Callable[..., None]
    chosen: dict[str, str]
    """Op name -> "eager" or "triton"."""
    reasons: dict[str, str]
    """Op name -> why `auto` left it to eager PyTorch."""


def resolve_ops(kernels: str, device_type: str) -> Ops:
    """Choose the implementation of every op.

    Args:
        kernels: "eager", "triton" (each op or an error) or "auto" (Triton where it can run, eager elsewhere).
        device_type: "cuda" or "cpu".

    Raises:
        DeviceError: `kernels = "triton"` and an op cannot run with Triton; the causes are named.
    """
    reference = importlib.import_module("gptperf.kernels.reference")
    functions = {op: getattr(reference, op) for op in OPS}
    chosen = dict.fromkeys(OPS, "eager")
    reasons: dict[str, str] = {}
    for op, module in OPS.items():
        if kernels == "eager":
            continue
        reason = _why_not_triton(device_type)
        if reason is None:
            chosen[op], functions[op] = "triton", getattr(importlib.import_module(module), op)
        else:
            reasons[op] = reason
    _refuse(kernels, reasons)
    return Ops(**functions, chosen=chosen, reasons=reasons)


def without_triton(ops: Ops, kernels: str, reasons: dict[str, str]) -> Ops:
    """The same ops, but those in `reasons` (op name -> why) in eager PyTorch.

    Raises:
        DeviceError: there is one, and `kernels = "triton"`.
    """
    _refuse(kernels, reasons)
    reference = importlib.import_module("gptperf.kernels.reference")
    functions = {op: getattr(reference, op) for op in reasons}
    chosen = ops.chosen | dict.fromkeys(reasons, "eager")
    return replace(ops, **functions, chosen=chosen, reasons=ops.reasons | reasons)


def _refuse(kernels: str, reasons: dict[str, str]) -> None:
    if kernels == "triton" and reasons:
        causes = "; ".join(f"{op}: {reason}" for op, reason in reasons.items())
        raise DeviceError(f"kernels = 'triton' cannot be had: {causes}. Use kernels = 'auto' or 'eager'.")


def _why_not_triton(device_type: str) -> str | None:
    """The reason that Triton cannot run on this device, or None."""
    if device_type != "cuda":
        return f"Triton runs on a CUDA GPU, and the device is {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    torch = importlib.import_module("torch")
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        return f"Triton needs compute capability 7.0 or higher, and this GPU has {capability[0]}.{capability[1]}"
    return None
