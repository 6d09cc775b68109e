"""Reads TOML files and flags into one checked `Config`, with the origin of each value.

A TOML file is a saved command line: the keys of its tables are read like flags that come before the real ones, and the
last value of a key wins. Every value is checked where it was written, so that all mistakes are reported at once, each
with its file and key. This module loads no torch.
"""

import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptperf import registry
from gptperf.config.keys import Key, value_problem
from gptperf.config.precedence import Layered
from gptperf.config.presets import PRESETS
from gptperf.config.rules import combination_problems
from gptperf.config.sections import KEYS, SECTIONS, Config
from gptperf.errors import ConfigError, DeviceError, nearest

__all__ = ["Resolved", "resolve", "show_config", "world_size"]

_COMMAND_LINE = "command line"
_MAX_FILE_BYTES = 64_000
_MAX_LINE_BYTES = 1_000  # the TOML reader takes quadratic time for a key with many dots
_MOST_MISTAKES = 20
_SHIPPED = Path(__file__).parents[1] / "configs"
_DESCRIPTION = """Train a GPT.

python -m gptperf.train [CONFIG ...] [--key=value ...]

CONFIG is a TOML file or the name of a shipped configuration, such as llama_124m. Files are read from left to right,
then the flags; the last value of a key wins. --show_config prints every value with its origin, as a TOML file, and
exits."""


class _Given(NamedTuple):
    """A key with its value, as the user wrote it."""

    name: str
    value: Any
    """The TOML value in a file, or the string on the command line; `_check` converts it to the type of the key."""
    where: str
    """The file's name as the user wrote it, or "command line"."""


@dataclass(frozen=True)
class Resolved:
    """A checked configuration and where its values come from."""

    config: Config
    origins: dict[str, str]
    """Key -> "default", the preset with its file, the file, or "command line"; then what changed the value, if a value
    of a higher layer did."""
    changes: dict[str, str]
    """Key -> a line about such a change."""
    show_config: bool
    """Whether the command line has `--show_config`."""


def resolve(argv: Sequence[str], *, world_size: int = 1) -> Resolved:
    """Reads the files and flags of a command line.

    Args:
        argv: `[CONFIG ...] [--key=value ...]`, without the program's name. CONFIG is a TOML file or the name of a
            shipped configuration.
        world_size: ranks of the job; gradient_accumulation_steps must be a multiple of it.

    Raises:
        ConfigError: the command line or a file is wrong; the message has one line for each mistake.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        _print_help()
    problems: list[str] = []
    files: list[str] = []
    flags = list(_parse(argv, files, problems))
    _load_plugins(flags, problems)
    show = [given for given in flags if given.name == "show_config"]
    sources = [list(_read_file(path, problems)) for path in files]
    sources.append([given for given in flags if given.name != "show_config"])
    typed = [[checked for given in source if (checked := _checked(given, problems))] for source in sources]
    layered = _overlay(typed)
    bad = {given.name for source in sources for given in source} - {given.name for source in typed for given in source}
    layered.adjust(frozenset(bad))
    values, origins = layered.values, layered.origins
    for keys, text in combination_problems(values, frozenset(bad)):
        problems.append(f"{_places(keys, origins)}: {text}")
    if "gradient_accumulation_steps" not in bad:
        problems += _indivisible(values["gradient_accumulation_steps"], world_size, origins)
    if problems:
        more = " or more; the first ones are" if len(problems) >= _MOST_MISTAKES else ""
        count = "" if len(problems) == 1 else f"{len(problems)} mistakes{more}\n  "
        raise ConfigError(count + "\n  ".join(problems))
    shows = bool(show) and show[-1].value.lower() not in ("false", "0")
    return Resolved(Config.from_flat(values), origins, layered.changes, shows)


def _print_help() -> None:
    """Prints the help, which tyro builds from the docstrings of the sections and their keys, and exits."""
    import tyro  # imported here because only --help needs it

    tyro.cli(
        Config,
        prog="python -m gptperf.train",
        description=_DESCRIPTION,
        args=["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )


def _parse(argv: Sequence[str], files: list[str], problems: list[str]) -> Iterator[_Given]:
    """Yields the flags of a command line, and appends its configurations to `files`.

    A flag is `--key=value`, `--key value` or, for a boolean, `--key`. A dash in a key means an underscore.
    """
    rest = list(argv)
    while rest:
        text = rest.pop(0)
        if not text.startswith("--"):
            if not text.startswith("-") and (text.endswith(".toml") or os.path.exists(_config_path(text))):
                files.append(text)
            else:
                near = nearest(text, [path.stem for path in _shipped()])
                problems.append(
                    f"{_COMMAND_LINE}: found {text!r}, wanted CONFIG.toml, the name of a shipped configuration or "
                    f"--key=value{near}"
                )
            continue
        name, equals, value = text[2:].partition("=")
        name = name.replace("-", "_")
        is_bool = name == "show_config" or (name in KEYS and KEYS[name].type is bool)
        if not equals and is_bool and (not rest or rest[0].lower() not in ("true", "false")):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                near = "" if name in KEYS else f" and is not a key{nearest(name, KEYS)}"
                problems.append(f"{_COMMAND_LINE}: --{name} has no value{near}")
                continue
            value = rest.pop(0)
        yield _Given(name, value, _COMMAND_LINE)


def _load_plugins(flags: Iterable[_Given], problems: list[str]) -> None:
    """Imports the modules of `--plugins`. Must run before values are checked, because plugins add component names."""
    for given in flags:
        if given.name == "plugins":
            try:
                registry.load_plugins(given.value)
            except ConfigError as error:
                problems.append(f"{_COMMAND_LINE}: {error}")


def _read_file(path: str, problems: list[str]) -> Iterator[_Given]:
    """Yields the keys of a TOML file in their order; `path` is the name of the file as the user wrote it."""
    try:
        raw = _config_path(path).read_bytes()
    except OSError as error:
        problems.append(f"{path}: {error.strerror}{_nearest_file(path)}")
        return
    if len(raw) > _MAX_FILE_BYTES:
        problems.append(f"{path}: found {len(raw):,} bytes, wanted a configuration of at most {_MAX_FILE_BYTES:,}")
        return
    if any(len(line) > _MAX_LINE_BYTES for line in raw.splitlines()):
        problems.append(f"{path}: found a line of more than {_MAX_LINE_BYTES:,} bytes, wanted shorter ones")
        return
    try:
        page = tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, a number of thousands of digits
        problems.append(f"{path}: not a TOML file: {error}")
        return
    for name, value in page.items():
        if len(problems) >= _MOST_MISTAKES:
            return
        if not isinstance(value, dict):
            yield _Given(name, value, path)
        elif name not in SECTIONS:
            problems.append(
                f"{path}: unknown table [{name}]; wanted one of {', '.join(SECTIONS)}{nearest(name, SECTIONS)}"
            )
        else:
            for key, inner in value.items():
                if key in KEYS and KEYS[key].section != name:
                    problems.append(f"{path}: {key}: found in [{name}], wanted in [{KEYS[key].section}]")
                else:
                    yield _Given(key, inner, path)


def _shipped() -> list[Path]:
    """Returns the configuration files that come with the package."""
    return sorted(_SHIPPED.glob("*.toml"))


def _config_path(text: str) -> Path:
    """Returns the file that a CONFIG of the command line means: an existing file, else the shipped one of that name.

    `NAME`, `NAME.toml` and `configs/NAME.toml` can name a shipped configuration; a path in another folder cannot.
    """
    path = Path(text if text.endswith(".toml") else f"{text}.toml")
    if path.parent in (Path(), Path("configs")) and not os.path.exists(path):
        shipped = _SHIPPED / path.name
        return shipped if os.path.exists(shipped) else path
    return path


def _nearest_file(path: str) -> str:
    """Returns a hint at the existing or shipped file whose name is closest to a file that does not exist."""
    folder = Path(path).parent
    names = {str(p) for p in folder.glob("*.toml")} if os.path.isdir(folder) else set()
    if folder in (Path(), Path("configs")):
        names |= {str(folder / p.name) for p in _shipped()}
    return nearest(path, sorted(names))


def _checked(given: _Given, problems: list[str]) -> _Given | None:
    """Returns what `_check` returns, or None if many mistakes are known already: more would only take time."""
    return _check(given, problems) if len(problems) < _MOST_MISTAKES else None


def _check(given: _Given, problems: list[str]) -> _Given | None:
    """Returns the value in the type of its key, or None after it appended what is wrong to `problems`."""
    key = KEYS.get(given.name)
    if key is None:
        problems.append(f"{given.where}: unknown key {given.name!r}{nearest(given.name, KEYS)}")
        return None
    if given.name == "plugins" and given.where != _COMMAND_LINE:
        problems.append(f"{given.where}: plugins: can be named on the command line only, since it runs code")
        return None
    value = _from_text(key, given.value) if given.where == _COMMAND_LINE else given.value
    wrong = value_problem(key, value)
    if wrong is not None:
        near = nearest(str(value), key.choices) if key.choices is not None else ""
        problems.append(f"{given.where}: {given.name}: {wrong}{near}")
        return None
    return _Given(given.name, float(value) if key.type is float and value is not None else value, given.where)


def _from_text(key: Key, text: str) -> Any:
    """Returns the value of a flag in the type of its key, or the text itself if it cannot be read as that type."""
    if key.optional and text.lower() == "none":
        return None
    if key.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if key.type in (int, float):
        try:
            return key.type(text)
        except ValueError:
            return text
    return text


def _overlay(sources: Sequence[Sequence[_Given]]) -> Layered:
    """Returns the defaults, overridden by each source in turn.

    The preset of a source comes before the other keys of that source, whatever their order in it.
    """
    layered = Layered({name: key.default for name, key in KEYS.items()})
    for layer, source in enumerate(sources, 1):
        presets = [given for given in source if given.name == "arch_preset"]
        if presets:
            preset = presets[-1]
            for name, value in PRESETS[preset.value].items():
                layered.put(name, value, f"preset {preset.value} ({preset.where})", layer)
        for given in source:
            layered.put(given.name, given.value, given.where, layer)
    return layered


def _indivisible(micro_batches: int, world_size: int, origins: dict[str, str]) -> list[str]:
    """Returns what is wrong if the ranks cannot share the micro-batches of an iteration equally, else an empty list."""
    if micro_batches % world_size == 0:
        return []
    below, above = micro_batches // world_size * world_size, -(-micro_batches // world_size) * world_size
    return [
        f"{_places(('gradient_accumulation_steps',), origins)}: found {micro_batches} micro-batches per iteration for "
        f"{world_size} ranks, wanted a multiple of {world_size}; nearest: {f'{below} or ' if below else ''}{above}"
    ]


def _places(keys: Sequence[str], origins: dict[str, str]) -> str:
    """Returns `ORIGIN: key` for each key that was set, and the bare name for each key that has its default."""
    return ", ".join(key if origins[key] == "default" else f"{origins[key]}: {key}" for key in keys)


def show_config(resolved: Resolved) -> str:
    """Returns every value with its origin, as a TOML file that gives the same configuration."""
    lines: list[str] = []
    for section, keys in resolved.config.sections().items():
        lines += ["", f"[{section}]"]
        for name, value in keys.items():
            shown = f"# {name} = (none)" if value is None else f"{name} = {_toml(value)}"
            if name == "plugins":
                shown = "# " + shown
            lines.append(f"{shown:<44}  # {resolved.origins[name]}")
    return "\n".join(lines[1:])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in escaped) + '"'
    return repr(value)


def world_size() -> int:
    """Returns the number of ranks of this job, which torchrun sets; 1 without torchrun.

    Raises:
        DeviceError: the environment variable WORLD_SIZE is not a positive number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise DeviceError(f"WORLD_SIZE: found {text!r}, wanted the number of ranks. Start the job with torchrun.")
    return int(text)
