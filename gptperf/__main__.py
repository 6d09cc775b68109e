"""Runs a command by its name: `gptperf NAME ...` and `python -m gptperf NAME ...` are `python -m gptperf.NAME ...`."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import NoReturn

from gptperf.config.flags import versions
from gptperf.config.synonyms import COMMAND_SYNONYMS, PROGRAMS
from gptperf.errors import ConfigError, nearest, run_main

__all__ = ["COMMANDS", "command", "main"]

COMMANDS = {
    "train": "train a GPT, or continue a run",
    "sample": "generate text with a trained model",
    "prepare": "turn text into a data set",
    "doctor": "examine this machine: what it has, and what is missing or broken",
    "plan": "predict memory and speed of a run on any known GPU",
    "flops": "count parameters, FLOPs and bytes of a model",
    "hardware": "print the GPU table, or measure what this GPU reaches",
    "evaluate": "score a model: loss on a data set, tasks by likelihood, tasks that its training data contains",
    "seen": "list the documents that a run read between two iterations",
    "report": "write a page about a run",
    "compare": "rank runs, or compare architectures",
    "ablate": "train changes of a configuration over several seeds, and compare them",
    "hugging_face": "import models of Hugging Face, nanoGPT and GGUF files; export runs for transformers",
    "monitor.schema": "print the JSON Schema of a run's log",
}
"""Name of a command and of its module in `gptperf` -> what the command does."""


def main(argv: Sequence[str]) -> int:
    """Runs the command that the first argument names, and returns its exit code.

    Raises:
        ConfigError: there is no such command.
    """
    first = argv[0] if argv else "--help"
    if first in ("--help", "-h", "help"):
        print(_help())
        return 0
    if first == "--version":
        print(versions())
        return 0
    name = first.replace("-", "_")
    if name not in COMMANDS:
        raise ConfigError(_unknown(first))
    spec = importlib.util.find_spec(f"gptperf.{name}")
    is_package = spec is not None and spec.submodule_search_locations is not None
    module = importlib.import_module(f"gptperf.{name}.__main__" if is_package else f"gptperf.{name}")
    return int(module.main(argv[1:]) or 0)


def _help() -> str:
    lines = [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptperf COMMAND ...      (or python -m gptperf COMMAND ..., python -m gptperf.COMMAND ...)",
            "",
            *lines,
            "",
            "gptperf COMMAND --help lists the flags of a command; gptperf --version prints the versions.",
        ]
    )


def _unknown(first: str) -> str:
    """Returns what is wrong with a command line whose first word is not a command."""
    found = f"command line: found {first!r}, wanted a command"
    program = first.rpartition("/")[2].removesuffix(".py")
    if program in PROGRAMS:
        return f"{found}; nearest: {PROGRAMS[program]}"
    from gptperf.config.config_files import is_config

    if first.startswith("-"):
        return f"{found} before the flags; nearest: train {first}"
    if is_config(first):
        return f"{found}; nearest: train {first}"
    return found + (nearest(first, COMMANDS, COMMAND_SYNONYMS) or f": {', '.join(COMMANDS)}")


def command() -> NoReturn:
    """Runs the console script `gptperf`."""
    run_main(main)


if __name__ == "__main__":
    command()
