"""Train a GPT: `python -m gptperf.train [CONFIG.toml ...] [--key=value ...]`, also under torchrun.

The command is read and checked here, before torch is loaded; the run itself is `gptperf.trainer`.
"""

import sys
from collections.abc import Sequence

from gptperf import cli
from gptperf.errors import main_guard

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with main_guard(debug=any(text.lower() in ("--debug", "--debug=true") for text in argv)):
        resolved = cli.resolve(argv, world_size=cli.world_size())
        if resolved.show_config:
            print(cli.show_config(resolved))
            return 0
        from gptperf.trainer import train

        return train(resolved.config, resolved.origins)


if __name__ == "__main__":
    sys.exit(main())
