"""Reads the flags of a command line, in one way for every command. This module loads no torch.

A flag is `--key=value`, `--key value` or, for a boolean, `--key`; a dash in a key means an underscore. The flags of a
command are the fields of a frozen dataclass: the annotation of a field is its schema, as in `gptperf.config.sections`,
and its docstring is its text in `--help`. A field without a default is a word that needs no `--key=`, and so is a field
named in `WORDS`.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import gptperf
from gptperf.config.keys import Key, key_of, value_problem
from gptperf.config.sections import SECTIONS
from gptperf.config.synonyms import VALUE_SYNONYMS, near_key
from gptperf.errors import mistakes, nearest

__all__ = [
    "COMMAND_LINE",
    "Flags",
    "Given",
    "Taken",
    "check",
    "parse",
    "split",
    "stray",
    "take",
    "versions",
]

COMMAND_LINE = "command line"
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

_FLAGS_OF_COMMANDS = {
    "ablate": "vary seeds tune_lr lr_factors parallel equal out html list",
    "compare": "runs configs gpu html json",
    "doctor": "json",
    "evaluate": "tasks shots seed limit dataset split data_dir eval_iters block_size batch_size contains ngram "
    "checkpoint device plugins json",
    "flops": "json",
    "hardware": "json measure again",
    "hugging_face": "model nanogpt tokenizer eot vocab_multiple",
    "hugging_face export": "step checkpoint dtype tokenizer",
    "plan": "gpu gpu_tflops gpu_memory_gb gpu_bandwidth_gb_s num_gpus tokens json",
    "prepare": "name data_dir tokenizer eot val_fraction split text_field group_by dedup shard_tokens dtype plan "
    "overwrite verify",
    "race": "vary seeds lr_factors tolerance parallel minutes price keep_models out html list",
    "report": "out",
    "sample": "prompt tokens num_samples temperature top_k top_p stop stop_at_eot seed checkpoint device plugins",
    "seen": "data_dir json",
    "train": "show_config",
}
"""Command -> its optional flags. A test compares this copy with the commands, which no module may import."""
_MOST_OWNERS = 3
"""A flag of more commands than this says nothing about the command that was meant."""


class Given(NamedTuple):
    """A key with its value, as the user wrote it."""

    name: str
    value: Any
    """The TOML value in a file, or the text on the command line (a list of texts if the key takes several values);
    `check` converts it to the type of the key."""
    where: str
    """The file's name as the user wrote it, or "command line"."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Base class of the flags of a command."""

    WORDS: ClassVar[str] = ""
    """Name of the field that takes the words without a flag, if it has a default."""

    def problems(self) -> Sequence[str]:
        """Returns what is wrong between the flags.

        A flag that is wrong itself has its default; one that is required and missing is None.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class _EveryCommand(Flags):
    """The flags of every command."""

    version: bool = False
    """Print the versions of gptperf, Python, torch and triton, and exit."""


@dataclass(frozen=True, kw_only=True)
class _Common(_EveryCommand):
    """The flags of every command."""

    debug: bool = False
    """Show the stack trace of an error."""


F = TypeVar("F", bound=Flags)


@dataclass(frozen=True)
class Taken(Generic[F]):
    """The flags of a command, and what `command_line.resolve` reads."""

    flags: F
    """The flags; one that is wrong has its default."""
    names: tuple[str, ...]
    """Their names."""
    rest: list[str]
    """The rest of the command line: configurations and keys."""
    problems: list[str]
    """What is wrong with the flags."""
    command: str
    """Name of the module, such as `gptperf.plan`."""


def parse(
    kind: type[F], argv: Sequence[str] | None, command: str, about: str, after: str = "", *, greedy: bool = True
) -> F:
    """Reads the command line of a command that takes no configuration.

    Args:
        kind: dataclass of the flags.
        argv: the command line without the program's name; None means the command line of this process.
        command: name of the module, such as `gptperf.sample`.
        about: what the command does, for `--help`.
        after: text at the end of `--help`, printed as it is.
        greedy: whether a flag that takes several values takes all words after it, or one each time it is given.

    Raises:
        ConfigError: the command line is wrong; the message has one line for each mistake.
        SystemExit: after `--help` or `--version`.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _keys(kind)
    words = [name for name, key in keys.items() if _required(key) or name == kind.WORDS]
    usage = " ".join(["python -m", command, *(f"{word.upper()}{' ...' * keys[word].many}" for word in words)])
    _print_help(argv, command, f"{usage} [--key=value ...]\n\n{about}", {"command": kind, "common": _Common}, after)
    known = keys | _keys(_Common)
    given, rest, problems = split(argv, known, greedy=greedy)
    free = [keys[word] for word in words if word not in {one.name for one in given}]
    given += _placed(rest, free, usage, known, problems)
    bad = {one.name for one in given}
    values = _checked(given, known, problems, command)
    bad -= values.keys()
    missing = [name for name, key in keys.items() if _required(key) and name not in values]
    problems += [f"{COMMAND_LINE}: found no {name.upper()}, wanted {usage}" for name in missing if name not in bad]
    flags = kind(**dict.fromkeys(missing), **{name: value for name, value in values.items() if name in keys})
    problems += flags.problems()
    if problems:
        raise mistakes(problems)
    return flags


def take(kind: type[F], argv: Sequence[str] | None, command: str, about: str, after: str = "") -> Taken[F]:
    """Takes the flags of a command out of a command line that also has configurations and their keys.

    A flag takes one value; one whose field is a tuple may be given several times. The arguments are those of `parse`.
    Mistakes are returned, so that `command_line.resolve` reports them with its own.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _keys(kind)
    usage = f"python -m {command} [CONFIG ...] [--key=value ...]"
    _print_help(argv, command, f"{usage}\n\n{about}", {"command": kind, **SECTIONS, "common": _EveryCommand}, after)
    given, rest, problems = split(argv, keys, others=True)
    flags = kind(**_checked(given, keys, problems, command))
    return Taken(flags, tuple(keys), rest, [*problems, *flags.problems()], command)


def split(
    argv: Sequence[str], keys: Mapping[str, Key], *, greedy: bool = False, others: bool = False
) -> tuple[list[Given], list[str], list[str]]:
    """Separates the flags of a command line from its other words.

    Args:
        argv: the command line without the program's name.
        keys: the keys that are known.
        greedy: whether a flag that takes several values takes all words up to the next flag.
        others: whether flags that are not in `keys` stay with the other words.

    Returns:
        The flags, the other words, and a line for each flag without a value.
    """
    given: dict[tuple[str, int], Given] = {}
    words: list[str] = []
    problems: list[str] = []
    queue = list(argv)
    while queue:
        text = queue.pop(0)
        name, equals, value = text[2:].partition("=")
        name = name.replace("-", "_")
        key = keys.get(name)
        if not text.startswith("--") or (others and key is None):
            words.append(text)
            continue
        values = [value]
        if not equals:
            values = list(_values(queue, key, greedy))
        if not values and key is not None:
            problems.append(f"{COMMAND_LINE}: --{name} has no value, wanted {key.wanted}")
        elif key is not None and key.many:
            earlier = given.get((name, 0))
            given[name, 0] = Given(name, [*(earlier.value if earlier else []), *values], COMMAND_LINE)
        else:
            given[name, len(given) + 1] = Given(name, values[0] if values else "", COMMAND_LINE)
    return list(given.values()), words, problems


def _values(queue: list[str], key: Key | None, greedy: bool) -> Iterator[str]:
    """Removes the values of a flag without "=" from the front of the words after it, and yields them."""
    if key is not None and key.type is bool and not (queue and queue[0].lower() in ("true", "false", *key.words)):
        yield "true"
        return
    several = greedy and key is not None and key.many
    while queue and not queue[0].startswith("--"):
        yield queue.pop(0)
        if not several:
            return


def _placed(
    words: list[str], keys: list[Key], usage: str, known: Mapping[str, Key], problems: list[str]
) -> Iterator[Given]:
    """Yields the words without a flag as the values of `keys`, in their order; the last one may take several."""
    for key in keys:
        if words:
            count = len(words) if key.many else 1
            yield Given(key.name, words[:count] if key.many else words[0], COMMAND_LINE)
            del words[:count]
    for word in words:
        problems.append(f"{COMMAND_LINE}: found {word!r}, wanted {stray(word, known) or usage}")


def stray(word: str, keys: Mapping[str, Key]) -> str:
    """Returns the flag that a word without "--" seems to mean, or ""."""
    name, equals, _ = word.lstrip("-").partition("=")
    if name.replace("-", "_") in keys and (equals or word.startswith("-") or keys[name].type is bool):
        return "--" + word.lstrip("-")
    return ""


def check(
    given: Given, keys: Mapping[str, Key], problems: list[str], command: str, also: Sequence[str] = ()
) -> Given | None:
    """Returns the value in the type of its key, or None after it appended what is wrong to `problems`.

    Args:
        given: the key and its value.
        keys: the keys that are known.
        problems: list of mistakes.
        command: name of the module whose `--help` lists the keys.
        also: other names that the nearest of an unknown key can be.
    """
    key, read = keys.get(given.name), given.where == COMMAND_LINE
    if key is None:
        near = near_key(given.name, [*also, *keys, "help", "version"]) + (_owners(given.name) if read else "")
        near = near or f"; python -m {command} --help lists the keys"
        problems.append(f"{given.where}: unknown key {given.name!r}{near}")
        return None
    values = [_from_text(key, one) if read else one for one in (given.value if key.many else [given.value])]
    for value in values:
        wrong = value_problem(key, value)
        if wrong is not None:
            near = nearest(str(value), key.choices, VALUE_SYNONYMS) if key.choices is not None else ""
            problems.append(f"{given.where}: {given.name}: {wrong}{near}")
            return None
    if key.type is float:
        values = [value if value is None else float(value) for value in values]
    return given._replace(value=tuple(values) if key.many else values[0])


def _owners(name: str) -> str:
    """Returns "; --NAME is a flag of COMMANDS" for the few commands that have such a flag, or ""."""
    owners = [f"gptperf.{command}" for command, names in _FLAGS_OF_COMMANDS.items() if name in names.split()]
    if any(name == field.name for section in SECTIONS.values() for field in dataclasses.fields(section)):
        owners = ["gptperf.train"]
    return f"; --{name} is a flag of {' and '.join(owners)}" if 0 < len(owners) <= _MOST_OWNERS else ""


def _checked(given: Sequence[Given], keys: Mapping[str, Key], problems: list[str], command: str) -> dict[str, Any]:
    """Returns key -> value for the flags that are right."""
    right = (check(one, keys, problems, command) for one in given)
    return {one.name: one.value for one in right if one is not None}


def _from_text(key: Key, text: str) -> Any:
    """Returns the value of a flag in the type of its key, or the text itself if it cannot be read as that type."""
    if key.optional and text.lower() == "none":
        return None
    if key.type is bool:
        return _BOOLEANS.get(text.lower(), text)
    if key.type in (int, float):
        try:
            return key.type(text)
        except ValueError:
            return text
    return Path(text) if key.type is Path and text else text


def _keys(kind: type) -> dict[str, Key]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: key_of("", field, hints[field.name]) for field in dataclasses.fields(kind)}


def _required(key: Key) -> bool:
    return key.default is dataclasses.MISSING


def _print_help(argv: Sequence[str], command: str, about: str, groups: Mapping[str, type], after: str = "") -> None:
    """Prints the help or the versions and exits, if the command line asks for them.

    Args:
        argv: the command line without the program's name.
        command: name of the module.
        about: text above the flags.
        groups: title -> dataclass with the flags of a group. The texts are the docstrings of the fields.
        after: text below the flags.

    Raises:
        SystemExit: after the help or the versions.
    """
    if "--version" in argv:
        print(versions())
        raise SystemExit(0)
    if "--help" not in argv and "-h" not in argv:
        return
    import tyro  # imported here because only --help needs it

    with contextlib.suppress(SystemExit):
        tyro.cli(
            dataclasses.make_dataclass("Command", list(groups.items())),
            prog=f"python -m {command}",
            description=about,
            args=["--help"],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff, tyro.conf.PositionalRequiredArgs),
            use_underscores=True,
        )
    print(after, end="")
    raise SystemExit(0)


def versions() -> str:
    """Returns the versions of gptperf, Python, torch and triton in one line."""
    found = {"gptperf": gptperf.__version__, "Python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return ", ".join(f"{name} {version}" for name, version in found.items())
