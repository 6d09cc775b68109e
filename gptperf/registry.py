"""The registry of components: maps a name in the configuration to its class.

A plugin is a module that `--plugins` names; it adds a component with `register(kind, name, cls)`. Importing this module
loads no torch, so that a configuration can be checked before torch is loaded.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from gptperf.cards import activation, attention, block, ffn, norm, position
from gptperf.errors import ConfigError, nearest

__all__ = ["KINDS", "built_in", "card", "component", "component_names", "load_plugins", "no_card", "register"]

_BUILT_IN: dict[str, dict[str, Any]] = {
    "normalization": {
        "layernorm": norm.LAYERNORM,
        "layernorm_nobias": norm.LAYERNORM_NOBIAS,
        "rmsnorm": norm.RMSNORM,
    },
    "activation": {
        "gelu": activation.GELU,
        "gelu_tanh": activation.GELU_TANH,
        "silu": activation.SILU,
        "relu": activation.RELU,
        "leaky_relu": activation.LEAKY_RELU,
        "relu_squared": activation.RELU_SQUARED,
    },
    "position_encoding": {
        "learned_absolute": position.LEARNED_ABSOLUTE,
        "rope": position.ROPE,
        "none": position.NO_POSITION,
    },
    "attention_backend": {
        "sdpa": attention.SDPA,
        "manual": attention.MANUAL,
        "flash_attn": attention.FLASH_ATTN,
    },
    "norm_position": {"pre": block.PRE_NORM, "post": block.POST_NORM},
    "ffn_type": {"standard": ffn.STANDARD, "swiglu": ffn.SWIGLU},
}
"""Component kind (a configuration key) -> name -> card. `gptperf.model` registers the class of every row."""

KINDS: dict[str, tuple[str, ...]] = {kind: tuple(rows) for kind, rows in _BUILT_IN.items()}
"""Component kind -> the built-in names."""

_components: dict[tuple[str, str], Any] = {}
_cards: dict[tuple[str, str], Any] = {
    (kind, name): row for kind, rows in _BUILT_IN.items() for name, row in rows.items()
}
_T = TypeVar("_T")


def register(kind: str, name: str, cls: _T, card: Any = None) -> _T:
    """Registers a component, so that `name` is a valid value of the configuration key `kind`.

    Args:
        kind: a key of `KINDS`.
        name: the value in TOML files and on the command line.
        cls: for `activation` a function from a tensor to a tensor; for the other kinds an `nn.Module` class with the
            constructor and `forward` of its counterparts in `gptperf.model`.
        card: an object of `gptperf.cards` for this kind. A model has no FLOP count, no MFU and no plan if one of its
            components has no card.

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
    if card is not None:
        _cards[kind, name] = card
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


def card(kind: str, name: str) -> Any:
    """Returns the card of a component, or None if the plugin registered it without a card."""
    return _cards.get((kind, name))


def no_card(**components: str) -> str | None:
    """Returns a sentence about the first component (kind -> name) that has no card, or None if all have one."""
    for kind, name in components.items():
        if card(kind, name) is None:
            return f"component {kind} = {name!r} has no card"
    return None


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
