"""What a configuration key accepts: its type, its choices or limits, and what is wrong with a value. No torch here."""

import dataclasses
import math
import sys
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

from gptperf import registry

__all__ = ["Choice", "Component", "Key", "Range", "key_of", "value_problem"]


class Range(NamedTuple):
    """Limits of a number; None is no limit. `open` shuts out the lower bound, `below` the upper one."""

    low: float | None = None
    high: float | None = None
    open: bool = False
    below: bool = False

    def __str__(self) -> str:
        if self.high is None:
            return f"a number {'>' if self.open else '>='} {self.low}"
        return f"a number from {self.low} to {'below ' if self.below else ''}{self.high}"

    def holds(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = self.low is None or (value > self.low if self.open else value >= self.low)
        return above and (self.high is None or (value < self.high if self.below else value <= self.high))


class Component(NamedTuple):
    """The choices are the component names that the registry holds for this kind."""

    kind: str


class Choice(NamedTuple):
    """The choices are these names."""

    names: tuple[str, ...]


_LARGEST_FLOAT = int(sys.float_info.max)


class Key(NamedTuple):
    """Schema of one configuration key, read off its annotation."""

    name: str
    section: str
    type: type
    optional: bool
    default: Any
    rule: Range | Component | Choice | None

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Names that a value may have now, or None for a free value."""
        if isinstance(self.rule, Component):
            return registry.component_names(self.rule.kind)
        return self.rule.names if isinstance(self.rule, Choice) else None

    @property
    def wanted(self) -> str:
        """What a value has to be, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if isinstance(self.rule, Range):
            words = str(self.rule).replace("a number", "a whole number" if self.type is int else "a number")
        else:
            words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.type]
        return words + (" (or left out)" if self.optional else "")


def key_of(section: str, field: dataclasses.Field[Any], hint: Any) -> Key:
    """The schema that a section's field and its annotation state."""
    parts = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    optional = type(None) in parts
    hint = next(part for part in parts if part is not type(None))
    rule: Range | Component | Choice | None = None
    if typing.get_origin(hint) is Annotated:
        hint, rule = typing.get_args(hint)[:2]
    if typing.get_origin(hint) is Literal:
        hint, rule = str, Choice(typing.get_args(hint))
    return Key(field.name, section, hint, optional, field.default, rule)


def value_problem(key: Key, value: Any) -> str | None:
    """What is wrong with one value (its type is checked strictly: no text for a number), or None."""
    if value is None and key.optional:
        return None
    wrong_type = type(value) is not key.type and not (key.type is float and type(value) is int)
    if wrong_type:
        return f"found {value!r}, wanted {key.wanted}"
    if key.type is float and type(value) is int and abs(value) > _LARGEST_FLOAT:
        return f"found a whole number of {len(hex(value)) * 4} bits, wanted {key.wanted}"
    if isinstance(value, str) and not value.isprintable():
        return f"found {value!r}, wanted a text without control characters"
    if key.choices is not None and value not in key.choices:
        return f"found {value!r}, wanted {key.wanted}"
    if isinstance(key.rule, Range) and not key.rule.holds(value):
        low, high = key.rule.low, key.rule.high
        nearest = high if high is not None and value >= high else low
        excluded = key.rule.open if nearest == low else key.rule.below
        near = f"; nearest: {nearest}" if nearest is not None and not excluded else ""
        return f"found {value!r}, wanted {key.wanted}{near}"
    return None
