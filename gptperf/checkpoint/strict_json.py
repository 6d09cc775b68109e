"""JSON that reads back equal: it has no NaN, no infinity, and no Python type that JSON would change."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gptperf.errors import CheckpointError, NonFiniteError

__all__ = ["JSON", "STATE_LIMIT", "parse_json", "state_text"]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

STATE_LIMIT = 1 << 26
"""Maximum size of `state.json` in bytes."""
_DEEPEST = 100


def state_text(state: Mapping[str, Any]) -> bytes:
    """Returns the JSON text of a checkpoint's state, which `parse_json` reads back equal.

    Raises:
        CheckpointError: A value has a type that JSON does not have, or the text is longer than `STATE_LIMIT`.
        NonFiniteError: A float is not finite.
    """
    _check(state, "state", 0)
    try:
        text = json.dumps(state, allow_nan=False).encode()
    except ValueError as error:
        raise CheckpointError(f"state cannot be written as JSON: {error}") from error
    if len(text) > STATE_LIMIT:
        raise CheckpointError(f"state is {len(text)} bytes of JSON; wanted at most {STATE_LIMIT}")
    return text


def parse_json(data: bytes, path: Path) -> Any:
    """Parses JSON without NaN and infinity; `path` is for the error message.

    Raises:
        CheckpointError: The data is not JSON, or has a NaN or an infinity.
    """
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: {str(error)[:200]}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _check(value: object, where: str, depth: int) -> None:
    """Checks that a value reads back equal from JSON, or raises an error; `where` names the value."""
    if depth > _DEEPEST:
        raise CheckpointError(f"{where[:200]} is nested deeper than {_DEEPEST} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{where} is {value}; wanted a finite number or None")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r} of type {type(key).__name__}; wanted str")
            _check(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        kind = type(value).__name__
        raise CheckpointError(f"{where} is a {kind}; wanted dict, list, str, int, float, bool or None")
