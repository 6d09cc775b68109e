"""Trains a GPT: `python -m gptperf.train [CONFIG ...] [--key=value ...]`, alone or under torchrun.

This module reads and checks the command line before torch is loaded; `gptperf.training.trainer` runs the training.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from gptperf.config import command_line
from gptperf.config.flags import Flags, take
from gptperf.distributed.agreement import told_once
from gptperf.errors import run_main
from gptperf.hardware.cpu import set_up_threads

__all__ = ["main"]

_ABOUT = """Train a GPT, alone or under torchrun.

CONFIG is a TOML file or the name of a shipped configuration, such as llama_124m. Files are read from left to right,
then the flags; the last value of a key wins."""


@dataclass(frozen=True, kw_only=True)
class _TrainFlags(Flags):
    """What to do with the configuration."""

    show_config: bool = False
    """Print every value with its origin, as a TOML file, and exit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the run failed; the class says what was wrong.
    """
    taken = take(_TrainFlags, argv, "gptperf.train", _ABOUT)
    with told_once():
        world_size = command_line.world_size()
        resolved = command_line.resolve(taken.rest, world_size=world_size, taken=taken)
        if taken.flags.show_config:
            if os.environ.get("RANK", "0") == "0":
                print(command_line.show_config(resolved))
            return 0
        if world_size > 1 and not resolved.config.system.debug:
            # The watchdog reports a lost connection in one line; this hides PyTorch's warning with its C++ stack.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        set_up_threads()
        from gptperf.training.trainer import train

        return train(resolved.config, resolved.origins, resolved.changes)


if __name__ == "__main__":
    run_main(main)
