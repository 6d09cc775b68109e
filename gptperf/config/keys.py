"""The schema of a configuration key: its type, its choices or limits, and the check of a value. Loads no torch."""

import dataclasses
import math
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from gptperf import registry

__all__ = ["Choice", "Component", "Key", "Range", "key_of", "value_problem"]


class Range(NamedTuple):
    """Limits of a number: a lower bound and, unless it is None, an upper bound."""

    low: float
    high: float | None = None
    exclude_low: bool = False
    exclude_high: bool = False

    def __str__(self) -> str:
        if self.high is None:
            return f"a number {'>' if self.exclude_low else '>='} {self.low}"
        return f"a number from {self.low} to {'below ' if self.exclude_high else ''}{self.high}"

    def contains(self, value: float) -> bool:
        """Returns whether a number is within the limits; infinity and NaN never are."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.exclude_low else value >= self.low
        return above and (self.high is None or (value < self.high if self.exclude_high else value <= self.high))


class Component(NamedTuple):
    """The choices are the component names that are registered for this kind, plugins included."""

    kind: str


class Choice(NamedTuple):
    """The choices are fixed names."""

    names: tuple[str, ...]


_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
_LARGEST_FLOAT = int(sys.float_info.max)


class Key(NamedTuple):
    """Schema of one configuration key, read from its annotation."""

    name: str
    section: str
    """Its TOML table; "" for a flag of a command, which is no key of a file and may hold any characters."""
    type: type
    optional: bool
    default: Any
    rule: Range | Component | Choice | None
    many: bool = False
    """Whether the value is a tuple; type and rule are then those of each of its elements."""
    words: tuple[str, ...] = ()
    """Words that are valid besides the values of the type, such as "auto" for a boolean."""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The valid names, or None if the value is not a choice of names."""
        if isinstance(self.rule, Component):
            return registry.component_names(self.rule.kind)
        return self.rule.names if isinstance(self.rule, Choice) else None

    @property
    def wanted(self) -> str:
        """Description of the valid values, for messages."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if isinstance(self.rule, Range):
            words = str(self.rule).replace("a number", "a whole number" if self.type is int else "a number")
        else:
            words = ", ".join([*self.words, _WANTED[self.type]])
        return words + (" (or left out)" if self.optional else "")


def key_of(section: str, field: dataclasses.Field[Any], hint: Any) -> Key:
    """Returns the schema that the field of a section and its annotation define."""
    parts = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    optional = type(None) in parts
    words = tuple(w for part in parts[1:] if typing.get_origin(part) is Literal for w in typing.get_args(part))
    hint = next(part for part in parts if part is not type(None))
    rule: Range | Component | Choice | None = None
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Annotated:
        hint, rule = typing.get_args(hint)[:2]
    if typing.get_origin(hint) is Literal:
        hint, rule = str, Choice(typing.get_args(hint))
    return Key(field.name, section, hint, optional, field.default, rule, many, words)


def value_problem(key: Key, value: Any) -> str | None:
    """Returns what is wrong with a value, or None. The type must match: a string is never read as a number."""
    if (value is None and key.optional) or (isinstance(value, str) and value in key.words):
        return None
    wrong_type = type(value) is not key.type and not (key.type is float and type(value) is int)
    if wrong_type and not (key.type is Path and isinstance(value, Path)):
        return f"found {value!r}, wanted {key.wanted}"
    if key.type is float and type(value) is int and abs(value) > _LARGEST_FLOAT:
        return f"found a whole number of {len(hex(value)) * 4} bits, wanted {key.wanted}"
    if key.type is float and type(value) is int and int(float(value)) != value:
        return f"found {value!r}, which would be rounded, wanted {key.wanted}; nearest: {int(float(value))}"
    if isinstance(value, str) and not value.isprintable() and key.section:
        return f"found {value!r}, wanted a string without control characters"
    if key.choices is not None and value not in key.choices:
        return f"found {value!r}, wanted {key.wanted}"
    if isinstance(key.rule, Range) and not key.rule.contains(value):
        low, high = key.rule.low, key.rule.high
        bound = high if high is not None and value >= high else low
        excluded = key.rule.exclude_low if bound == low else key.rule.exclude_high
        near = "" if excluded else f"; nearest: {bound}"
        return f"found {value!r}, wanted {key.wanted}{near}"
    return None
