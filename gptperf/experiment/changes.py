"""Changes of a configuration: `--vary key=value[,key2=value2]`, and other lengths of a run. Does not import torch."""

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from gptperf.config import Config

__all__ = ["LENGTHS", "change_text", "folder_name", "parse_changes", "with_length"]

LENGTHS = ("warmup_iters", "lr_decay_iters")
"""Lengths of the learning rate schedule, which are scaled with `max_iters`."""


def parse_changes(vary: Sequence[str], set_here: Sequence[str], command: str) -> tuple[list[dict[str, str]], list[str]]:
    """Reads changes, each `key=value[,key2=value2 ...]`.

    Args:
        vary: The changes.
        set_here: Keys that no change may name.
        command: What sets those keys, for messages.

    Returns:
        The changes, and a line for each mistake.
    """
    changes, problems = [], []
    for text in vary:
        change: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            key = key.strip().removeprefix("--").replace("-", "_")
            if not (key and equals):
                problems.append(f"--vary {text}: found {part!r}, wanted key=value")
            elif key in set_here:
                problems.append(f"--vary {text}: {key} is set by {command}")
            elif key in change:
                problems.append(f"--vary {text}: {key} appears twice")
            else:
                change[key] = value.strip()
        changes.append(change)
    return changes, problems


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
