"""Finds the TOML file that a CONFIG of the command line means, and reads it. This module loads no torch."""

import functools
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

from gptperf.config.flags import COMMAND_LINE, Given
from gptperf.config.sections import KEYS, SECTIONS
from gptperf.config.synonyms import PROGRAMS, near_key
from gptperf.errors import MOST_MISTAKES, nearest, note

__all__ = ["is_config", "read_file", "shipped", "wrong_word"]

_MAX_FILE_BYTES = 64_000
_MAX_LINE_BYTES = 1_000  # the TOML reader takes quadratic time for a key with many dots
_SHIPPED = Path(__file__).parents[1] / "configs"
_FOLDERS = (Path(), Path("configs"), Path("config"))
_PREFIXES = ("full_", "preset_")
"""Prefixes that the system description gives to the names of the shipped files."""


def shipped() -> list[str]:
    """Returns the names of the configurations that come with the package."""
    return sorted(path.relative_to(_SHIPPED).with_suffix("").as_posix() for path in _SHIPPED.rglob("*.toml"))


def is_config(text: str) -> bool:
    """Returns whether a word of the command line names a configuration, although it may be one that does not exist."""
    return text.endswith(".toml") or os.path.exists(_path(text)) or _described(text) is not None


def _path(text: str) -> Path:
    """Returns the file that a CONFIG means: an existing file, else the shipped one of that name.

    `NAME`, `NAME.toml` and `configs/NAME.toml` can name a shipped configuration, where NAME may be in a folder, such as
    `speedrun/fineweb_edu_124m`; a path in a folder that is not shipped cannot.
    """
    path = Path(text if text.endswith(".toml") else f"{text}.toml")
    name = path.relative_to("configs") if path.is_relative_to("configs") else path
    if not os.path.exists(path) and name.with_suffix("").as_posix() in shipped():
        return _SHIPPED / name
    return path


def _described(text: str) -> str | None:
    """Returns the shipped name for a name of the system description, such as `config/full_llama_124m.py`."""
    path = Path(text)
    if path.parent not in _FOLDERS or os.path.exists(text) or os.path.exists(_path(text)):
        return None
    stem = path.name.removesuffix(".py").removesuffix(".toml")
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem if stem in shipped() else None


def wrong_word(text: str) -> str:
    """Returns the line for a word of the command line that is neither a flag nor a configuration."""
    found = f"{COMMAND_LINE}: found {text!r}"
    program = Path(text).name.removesuffix(".py")
    if program in PROGRAMS:
        return f"{found}, wanted CONFIG; nearest: {PROGRAMS[program]}"
    if "=" in text:
        return f"{found}, wanted --key=value{near_key(text.partition('=')[0], KEYS)}"
    wanted = f"{found}, wanted CONFIG.toml, the name of a shipped configuration or --key=value"
    if text.endswith(".py"):
        near = _nearest_file(text)
        return f"{found}, wanted CONFIG.toml: a configuration is a TOML file, and no code is executed{near}"
    return wanted + (_nearest_file(text) or _all_shipped())


def _all_shipped() -> str:
    return f"; shipped: {', '.join(shipped())}"


def _nearest_file(text: str) -> str:
    """Returns a hint at the existing or shipped file whose name is closest to a name that does not exist."""
    path = Path(text)
    ending = ".toml" if path.suffix == ".toml" else ""
    names = {found.stem for found in path.parent.glob("*.toml")} if os.path.isdir(path.parent) else set()
    if path.parent in _FOLDERS:
        names |= set(shipped())
    stem = path.name.removesuffix(".py").removesuffix(".toml")
    for prefix in (*_PREFIXES, "train_", "finetune_", "eval_"):
        stem = stem.removeprefix(prefix)
    near = nearest(stem, sorted(names))
    folder = f"{path.parent}/" if ending and path.parent != Path() else ""
    return f"; nearest: {folder}{near.removeprefix('; nearest: ')}{ending}" if near else ""


@functools.cache  # a command may read a file more than once
def _say(text: str, name: str) -> None:
    note(f"{text} means the shipped configuration {name}")


def read_file(text: str, problems: list[str]) -> Iterator[Given]:
    """Yields the keys of a TOML file in their order.

    Args:
        text: the name of the file as the user wrote it.
        problems: list to which a line for each mistake is appended.
    """
    described = _described(text)
    if described is not None:
        _say(text, described)
    path = _path(text) if described is None else _SHIPPED / f"{described}.toml"
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(f"{text}: {error.strerror}{_nearest_file(text) or _all_shipped()}")
        return
    if len(raw) > _MAX_FILE_BYTES:
        problems.append(f"{text}: found {len(raw):,} bytes, wanted a configuration of at most {_MAX_FILE_BYTES:,}")
        return
    if any(len(line) > _MAX_LINE_BYTES for line in raw.splitlines()):
        problems.append(f"{text}: found a line of more than {_MAX_LINE_BYTES:,} bytes, wanted shorter ones")
        return
    try:
        page = tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, a number of thousands of digits
        problems.append(f"{text}: not a TOML file: {error}")
        return
    for name, value in page.items():
        if len(problems) >= MOST_MISTAKES:
            return
        if not isinstance(value, dict):
            yield Given(name, value, text)
        elif name not in SECTIONS:
            problems.append(
                f"{text}: unknown table [{name}]; wanted one of {', '.join(SECTIONS)}{nearest(name, SECTIONS)}"
            )
        else:
            for key, inner in value.items():
                if key in KEYS and KEYS[key].section != name:
                    problems.append(f"{text}: {key}: found in [{name}], wanted in [{KEYS[key].section}]")
                else:
                    yield Given(key, inner, text)
