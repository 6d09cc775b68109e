"""Makes the JSON Schema of a run's log from the classes of `gptperf.monitor.events`, and reads logs of this version.

`python -m gptperf.monitor.schema > run_log.schema.json` prints the schema.
"""

import ast
import functools
import inspect
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from gptperf.config.flags import Flags, parse
from gptperf.errors import DataError, run_main
from gptperf.monitor.events import EVENTS, SCHEMA_VERSION, RunLog

__all__ = ["main", "read_run", "schema"]

_ENTRIES = {
    "training_iterations": "iteration",
    "eval_steps": "eval",
    "checkpoints": "checkpoint",
    "profiles": "profile",
    "messages": "message",
    "resumes": "resume",
}
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the schema."""
    parse(Flags, argv, "gptperf.monitor.schema", "Print the JSON Schema of a run's log, run_*.json.")
    print(json.dumps(schema(), indent=2))
    return 0


def schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of `<run_name>.json`; it allows additional fields."""
    defs: dict[str, Any] = {}
    whole = _table(RunLog, defs)
    for field, event in _ENTRIES.items():
        whole["properties"][field] |= {"items": _of(EVENTS[event], defs)}
    whole["properties"]["schema_version"] |= {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:gptperf:run-log:{SCHEMA_VERSION}",
        "title": "Log of a gptperf run",
        **whole,
        "$defs": dict(sorted(defs.items())),
    }


def read_run(path: Path) -> RunLog:
    """Reads the JSON file of a run.

    Raises:
        DataError: the file cannot be read, is not the log of a run, or has a version that this gptperf does not know.
    """
    try:
        log = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(log, dict) or "schema_version" not in log:
        raise DataError(f"{path}: found no schema_version; wanted the JSON file of a run, run_*.json")
    found = log["schema_version"]
    if type(found) is not int or found != SCHEMA_VERSION:
        hint = "; a newer gptperf wrote it" if type(found) is int and found > SCHEMA_VERSION else ""
        raise DataError(f"{path}: schema_version: found {found!r}, wanted {SCHEMA_VERSION}{hint}")
    missing = RunLog.__required_keys__ - log.keys()
    if missing:
        raise DataError(f"{path}: found no {', '.join(sorted(missing))}")
    return log  # type: ignore[return-value]


def _table(kind: type, defs: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a TypedDict."""
    described = _docstrings().get(kind.__name__, {})
    properties = {}
    for field, hint in get_type_hints(kind).items():
        properties[field] = _of(hint, defs) | ({"description": described[field]} if field in described else {})
    about = {"description": described[""]} if "" in described else {}
    required = [field for field in properties if field in kind.__required_keys__]  # type: ignore[attr-defined]
    return {**about, "type": "object", "properties": properties, "required": required}


def _of(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a type; a TypedDict is stored in `defs` under its name and referred to."""
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if is_typeddict(hint):
        if hint.__name__ not in defs:
            defs[hint.__name__] = {}
            defs[hint.__name__] = _table(hint, defs)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(arguments, defs)
    if origin is list or origin is Sequence:
        return {"type": "array", "items": _of(arguments[0], defs)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        values = _of(arguments[1], defs)
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    raise TypeError(f"no JSON type is known for {hint!r}")


def _union(arguments: tuple[Any, ...], defs: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a union.

    `Mapping[str, Any]` beside a TypedDict is dropped: the TypedDict allows additional fields anyway.
    """
    if any(map(is_typeddict, arguments)):
        arguments = tuple(hint for hint in arguments if hint != Mapping[str, Any])
    found = [_of(hint, defs) for hint in arguments]
    if len(found) == 1:
        return found[0]
    if all(one.keys() == {"type"} for one in found):
        return {"type": [one["type"] for one in found]}
    return {"anyOf": found}


@functools.cache
def _docstrings() -> dict[str, dict[str, str]]:
    """Returns class -> field -> the string below the field; the docstring of the class is under "".

    The result is empty if the source is not available.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[RunLog.__module__]))
    except OSError:
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        about = ast.get_docstring(node)
        described = found[node.name] = {} if about is None else {"": _line(about)}
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = below.value if isinstance(below, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    described[field.target.id] = _line(value.value)
    return found


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run_main(main)
