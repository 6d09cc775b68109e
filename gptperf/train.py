"""Trains a GPT: `python -m gptperf.train [CONFIG ...] [--key=value ...]`, alone or under torchrun.

This module reads and checks the command line before torch is loaded; `gptperf.training.trainer` runs the training.
"""

import os
import sys
from collections.abc import Sequence

from gptperf.config import command_line
from gptperf.errors import main_guard
from gptperf.hardware.cpu import set_up_threads

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = any(text.lower() in ("--debug", "--debug=true") for text in argv)
    with main_guard(debug):
        world_size = command_line.world_size()
        set_up_threads()
        if world_size > 1 and not debug:
            # The watchdog reports a lost connection in one line; this hides PyTorch's warning with its C++ stack.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        resolved = command_line.resolve(argv, world_size=world_size)
        if resolved.show_config:
            print(command_line.show_config(resolved))
            return 0
        from gptperf.training.trainer import train

        return train(resolved.config, resolved.origins)


if __name__ == "__main__":
    sys.exit(main())
