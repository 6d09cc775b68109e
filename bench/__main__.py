"""The whole bench, cell by cell: `python -m bench [--only CELL ...] [--quick] [--out DIR] [--fresh] [--list]`.

Every cell writes its own file when it is done, so that an interrupted run continues where it stopped: a cell that has
a result with the same sources, versions, driver and device is not measured again. A cell that fails also has a result,
with the reason. At the end a report is written beside the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import session
from bench.cells import select
from gptperf.config.flags import Flags, parse
from gptperf.errors import run_main

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _BenchFlags(Flags):
    """What to measure."""

    only: tuple[str, ...] = ()
    """Cells, or the start of their names."""
    quick: bool = False
    """A few cells, within 3 minutes."""
    out: Path | None = None
    """Folder of the results; default: out/bench/DEVICE-COMMIT."""
    fresh: bool = False
    """Measure cells again that have a result."""
    list: bool = False
    """Print the cells and their budget, and end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the cells that the command line asks for.

    Returns:
        1 if a cell failed, else 0.
    """
    args = parse(_BenchFlags, argv, "bench", __doc__)
    cells = select(args.only, args.quick)
    return int(session.run(cells, args.out, quick=args.quick, fresh=args.fresh, only_list=args.list) > 0)


if __name__ == "__main__":
    run_main(main)
