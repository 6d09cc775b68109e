"""The registry of components: maps a name in the configuration to its class.

A plugin is a module that `--plugins` names; it adds a component with `register(kind, name, cls)`. Importing this module
loads no torch, so that a configuration can be checked before torch is loaded.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from gptperf.errors import ConfigError, nearest

__all__ = ["KINDS", "component", "component_names", "built_in", "load_plugins", "register"]

KINDS: dict[str, tuple[str, ...]] = {
    "normalization": ("layernorm", "layernorm_nobias", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "relu_squared"),
    "position_encoding": ("learned_absolute", "rope", "none"),
    "attention_backend": ("sdpa", "manual", "flash_attn"),
    "norm_position": ("pre", "post"),
    "ffn_type": ("standard", "swiglu"),
}
"""Component kind, which is also its configuration key -> the names of the built-in components."""

_components: dict[tuple[str, str], Any] = {}
_T = TypeVar("_T")


def register(kind: str, name: str, cls: _T) -> _T:
    """Makes `name` a valid value of the configuration key `kind`.

    Args:
        kind: a key of `KINDS`.
        name: the value in TOML files and on the command line.
        cls: for `activation` a function from a tensor to a tensor; for the other kinds an `nn.Module` class with the
            constructor and `forward` of its counterparts in `gptperf.model`.

    Returns:
        `cls`.

    Raises:
        ValueError: the kind is unknown, or the name belongs to another class.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown component kind {kind!r}; wanted one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if name in KINDS[kind]:
        raise ValueError(f"{kind} {name!r} is one of gptperf's own components; wanted another name")
    if _components.setdefault((kind, name), cls) is not cls:
        raise ValueError(f"{kind} {name!r} is already registered as {_components[kind, name].__qualname__}")
    return cls


def built_in(kind: str, name: str) -> Callable[[_T], _T]:
    """Returns a decorator that registers a class of `gptperf.model` under one of the names in `KINDS[kind]`."""
    assert name in KINDS[kind], f"{kind}: {name}"

    def add(cls: _T) -> _T:
        _components[kind, name] = cls
        return cls

    return add


def component_names(kind: str) -> tuple[str, ...]:
    """Returns the valid names of a kind: the built-in ones, then those of plugins in the order of registration."""
    added = (name for k, name in _components if k == kind and name not in KINDS[kind])
    return KINDS[kind] + tuple(added)


def component(kind: str, name: str) -> Any:
    """Returns the class or function of a component. The built-in ones are registered when `gptperf.model` is imported.

    Raises:
        ValueError: no component of that kind has the name.
    """
    if (kind, name) not in _components:
        names = component_names(kind)
        raise ValueError(f"unknown {kind} {name!r}; wanted one of {', '.join(names)}{nearest(name, names)}")
    return _components[kind, name]


def load_plugins(modules: str) -> None:
    """Imports the comma-separated modules of `--plugins`; each calls `register` when it is imported.

    Raises:
        ConfigError: a module is not found or fails to import.
    """
    for module in filter(None, (part.strip() for part in modules.split(","))):
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError, ValueError, TypeError, NameError, AttributeError) as error:
            raise ConfigError(f"plugins: {module}: {type(error).__name__}: {error}") from error
