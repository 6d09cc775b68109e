"""Which class a component's name in the configuration means.

A plugin, a module named by `--plugins`, adds a component with `register(kind, name, cls)`. Importing this module loads
no torch, so that a configuration is checked before torch is loaded.
"""

import difflib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from gptperf.cards import activation, attention, block, ffn, norm, position
from gptperf.errors import ConfigError

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
"""Component kind -> name -> card. `gptperf.model` registers the class of every row."""

KINDS: dict[str, tuple[str, ...]] = {kind: tuple(rows) for kind, rows in _BUILT_IN.items()}
"""Component kind -> the built-in names."""

_components: dict[tuple[str, str], Any] = {}
_cards: dict[tuple[str, str], Any] = {
    (kind, name): row for kind, rows in _BUILT_IN.items() for name, row in rows.items()
}
_T = TypeVar("_T")


def register(kind: str, name: str, cls: _T, card: Any = None) -> _T:
    """Make `name` a value of the configuration key `kind`.

    Args:
        kind: one of `KINDS`.
        name: the value in TOML and on the command line.
        cls: a function of a tensor for `activation`, for the other kinds a `nn.Module` class that is built and called
            as those in `gptperf.model` are.
        card: an object of `gptperf.cards` of this kind; without one there are no FLOPs, no MFU and no plan of models
            with this component.

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
    if card is not None:
        _cards[kind, name] = card
    return cls


def built_in(kind: str, name: str) -> Callable[[_T], _T]:
    """Decorator of `gptperf.model`: the class is what `KINDS[kind]` calls `name`."""
    assert name in KINDS[kind], f"{kind}: {name}"

    def add(cls: _T) -> _T:
        _components[kind, name] = cls
        return cls

    return add


def component_names(kind: str) -> tuple[str, ...]:
    """Names that `kind` may have now: the built-in ones, then those of plugins in the order of registration."""
    added = (name for k, name in _components if k == kind and name not in KINDS[kind])
    return KINDS[kind] + tuple(added)


def component(kind: str, name: str) -> Any:
    """The class or function registered for a component; `gptperf.model` registers the built-in ones.

    Raises:
        ValueError: no such name; the nearest one is named.
    """
    if (kind, name) not in _components:
        near = difflib.get_close_matches(name, component_names(kind), 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"unknown {kind} {name!r}; wanted one of {', '.join(component_names(kind))}{hint}")
    return _components[kind, name]


def card(kind: str, name: str) -> Any:
    """The card of a component, or None where its plugin brought none."""
    return _cards.get((kind, name))


def no_card(**components: str) -> str | None:
    """A sentence about the first component (kind -> name) that has no card, or None where all have one."""
    for kind, name in components.items():
        if card(kind, name) is None:
            return f"component {kind} = {name!r} has no card"
    return None


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
