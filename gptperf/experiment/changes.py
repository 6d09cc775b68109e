"""Changes of a configuration: `--vary key=value[,key2=value2]`, and other lengths of a run. Does not import torch."""

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from gptperf.config import KEYS, Config, command_line
from gptperf.config.flags import COMMAND_LINE, Given, check
from gptperf.errors import ConfigError

__all__ = ["LENGTHS", "change_text", "folder_name", "new_problems", "parse_changes", "with_length"]

LENGTHS = ("warmup_iters", "lr_decay_iters")
"""Lengths of the learning rate schedule, which are scaled with `max_iters`."""


def parse_changes(vary: Sequence[str], set_here: Sequence[str], command: str) -> tuple[list[dict[str, str]], list[str]]:
    """Reads changes, each `key=value[,key2=value2 ...]`. Plugins of the whole command must be loaded before.

    Args:
        vary: The changes.
        set_here: Keys that no change may name.
        command: What sets those keys, for messages.

    Returns:
        The changes without a mistake, and a line for each mistake. Rules between keys are not checked.
    """
    changes, problems = [], []
    for text in vary:
        change: dict[str, str] = {}
        wrong: list[str] = []
        for part in text.split(","):
            key, equals, value = part.partition("=")
            key = key.strip().removeprefix("--").replace("-", "_")
            if not (key and equals):
                wrong.append(f"found {part!r}, wanted key=value")
            elif key in set_here:
                wrong.append(f"{key} is set by {command}")
            elif key in change:
                wrong.append(f"{key} appears twice")
            else:
                change[key] = value.strip()
        wrong += _wrong_values(change)
        problems += [f"--vary {text}: {line}" for line in wrong]
        if not wrong:
            changes.append(change)
    return changes, problems


def _wrong_values(change: Mapping[str, str]) -> list[str]:
    """Returns a line for each unknown key and each wrong value of a change."""
    problems: list[str] = []
    given = [
        Given(key, [text] if key in KEYS and KEYS[key].many else text, COMMAND_LINE) for key, text in change.items()
    ]
    command_line.load_plugins(given, problems)
    for one in given:
        check(one, KEYS, problems, "gptperf.train")
    return [line.removeprefix(f"{COMMAND_LINE}: ") for line in problems]


def new_problems(error: ConfigError, change: Mapping[str, str], of_base: Container[str] = ()) -> list[str]:
    """Returns what is wrong with a configuration and a change, without what is wrong with the configuration alone.

    Args:
        error: What is wrong with both.
        change: The change.
        of_base: What is wrong with the configuration.
    """
    where = f"--vary {change_text(change)}: "
    return [where + line.removeprefix(f"{COMMAND_LINE}: ") for line in error.problems if line not in of_base]


def change_text(change: Mapping[str, str]) -> str:
    """Returns a change as it is written on the command line."""
    return ",".join(f"{key}={value}" for key, value in change.items())


def folder_name(change: Mapping[str, str]) -> str:
    """Returns the name of a change's folder. A hash is added if the text is too long or is not a valid file name."""
    text = change_text(change)
    name = re.sub(r"[^A-Za-z0-9._=,-]", "_", text)[:100]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def with_length(config: Config, iters: int, ratio: float, keep: Container[str] = ()) -> Config:
    """Returns a configuration of another length, with the lengths of its schedule scaled to match.

    Args:
        config: The configuration.
        iters: Its new `max_iters`.
        ratio: Factor of the lengths of the schedule.
        keep: Lengths that stay as they are.
    """
    lengths = {}
    for key in LENGTHS:
        value = getattr(config.optimizer, key)
        if value is not None and key not in keep:
            lengths[key] = max(min(value, 1), round(ratio * value))
    optimizer = replace(config.optimizer, **lengths)
    return replace(config, train=replace(config.train, max_iters=iters), optimizer=optimizer)
