"""Reads TOML files and flags into one checked `Config`, with the origin of each value.

A TOML file is a saved command line: the keys of its tables are read like flags that come before the real ones, and the
last value of a key wins. Every value is checked where it was written, so that all mistakes are reported at once, each
with its file and key. This module loads no torch.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gptperf import registry
from gptperf.config.config_files import is_config, read_file, wrong_word
from gptperf.config.flags import COMMAND_LINE, Given, Taken, check, split, stray
from gptperf.config.fork import fork_of, parent_config
from gptperf.config.precedence import Layered
from gptperf.config.presets import PRESETS
from gptperf.config.rules import combination_problems
from gptperf.config.sections import KEYS, Config
from gptperf.errors import MOST_MISTAKES, ConfigError, DeviceError, mistakes
from gptperf.formats import counted

__all__ = ["Resolved", "load_plugins", "resolve", "show_config", "world_size"]


@dataclass(frozen=True)
class Resolved:
    """A checked configuration and where its values come from."""

    config: Config
    origins: dict[str, str]
    """Key -> "default", the preset with its file, the file, or "command line"; then what changed the value, if a value
    of a higher layer did."""
    changes: dict[str, str]
    """Key -> a line about such a change."""


def resolve(argv: Sequence[str], *, world_size: int = 1, taken: Taken[Any] | None = None) -> Resolved:
    """Reads the files and flags of a command line.

    Args:
        argv: `[CONFIG ...] [--key=value ...]`, without the program's name. CONFIG is a TOML file or the name of a
            shipped configuration.
        world_size: ranks of the job; gradient_accumulation_steps must be a multiple of it.
        taken: the command's own flags, from whose command line `argv` is the rest.

    Raises:
        ConfigError: the command line or a file is wrong; the message has one line for each mistake.
    """
    problems = [] if taken is None else list(taken.problems)
    command, own = ("gptperf.train", ()) if taken is None else (taken.command, taken.names)
    files: list[str] = []
    flags = _parse(argv, own, files, problems)
    load_plugins(flags, problems)
    sources = [list(read_file(path, problems)) for path in files]
    sources.append(flags)
    sources.insert(0, _parent_values([given for source in sources for given in source], problems))
    checked = [[(one.name, _check(one, own, problems, command)) for one in source] for source in sources]
    layered = _overlay([[given for _, given in source if given is not None] for source in checked])
    # A wrong value counts even if a lower layer has a valid one: rules must not judge a value that the user overrode.
    bad = {name for source in checked for name, given in source if given is None}
    layered.adjust(frozenset(bad))
    values, origins = layered.values, layered.origins
    for keys, text in combination_problems(values, frozenset(bad)):
        problems.append(f"{_places(keys, origins)}: {text}")
    if "gradient_accumulation_steps" not in bad:
        problems += _indivisible(values["gradient_accumulation_steps"], world_size, origins)
    if problems:
        raise mistakes(problems)
    return Resolved(Config.from_flat(values), origins, layered.changes)


def _parse(argv: Sequence[str], own: Sequence[str], files: list[str], problems: list[str]) -> list[Given]:
    """Returns the flags of a command line, and appends its configurations to `files`."""
    flags, words, without_value = split(argv, KEYS)
    problems += without_value
    for word in words:
        if is_config(word) and not word.startswith("-"):
            files.append(word)
        else:
            meant = stray(word, {**dict.fromkeys(own, KEYS["debug"]), **KEYS})
            problems.append(f"{COMMAND_LINE}: found {word!r}, wanted {meant}" if meant else wrong_word(word))
    return flags


def _check(given: Given, own: Sequence[str], problems: list[str], command: str) -> Given | None:
    """Returns the value in the type of its key, or None after it appended what is wrong to `problems`.

    After many mistakes it returns None at once: to find more would only take time.
    `own` are flags of the command that are no keys; they are named where one of them is nearest.
    """
    if len(problems) >= MOST_MISTAKES:
        return None
    if given.name == "plugins" and given.where != COMMAND_LINE:
        problems.append(f"{given.where}: plugins: can be named on the command line only, since it runs code")
        return None
    return check(given, KEYS, problems, command, own if given.where == COMMAND_LINE else ())


def load_plugins(flags: Iterable[Given], problems: list[str]) -> None:
    """Imports the modules of `--plugins`. Must run before values are checked, because plugins add component names."""
    for given in flags:
        if given.name == "plugins":
            try:
                registry.load_plugins(given.value)
            except ConfigError as error:
                problems.append(f"{COMMAND_LINE}: {error}")


_NOT_OF_A_PARENT = frozenset({"init_from", "overwrite", "out_dir", "plugins", "debug", "profile", "wandb_run_name"})
"""Keys whose values a fork does not take from its parent."""


def _parent_values(given: Sequence[Given], problems: list[str]) -> list[Given]:
    """Returns the values of the run that a fork continues, which are the lowest layer of its own; else an empty list.

    Args:
        given: the values of all files and flags, the lowest first.
        problems: list to which a line is appended if the checkpoint does not hold a configuration.
    """
    chosen = [one.value for one in given if one.name == "init_from" and isinstance(one.value, str)]
    fork = fork_of(chosen[-1]) if chosen else None
    if fork is None or fork.problem() is not None:  # a rule reports the problem
        return []
    try:
        values = parent_config(fork)
    except (OSError, ValueError) as error:
        problems.append(f"init_from: {error}; wanted an intact checkpoint")
        return []
    taken = {key: value for key, value in values.items() if key in KEYS and value is not None}
    return [Given(key, value, str(fork.path)) for key, value in taken.items() if key not in _NOT_OF_A_PARENT]


def _overlay(sources: Sequence[Sequence[Given]]) -> Layered:
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
    found = counted(micro_batches, "micro-batch", "micro-batches")
    return [
        f"{_places(('gradient_accumulation_steps',), origins)}: found {found} per iteration for {world_size} ranks, "
        f"wanted a multiple of {world_size}; nearest: {f'{below} or ' if below else ''}{above}"
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
