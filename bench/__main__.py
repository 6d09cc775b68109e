"""The whole bench, cell by cell: `python -m bench [--only CELL ...] [--quick] [--out DIR] [--fresh] [--list]`.

Every cell writes its own file when it is done, so that an interrupted run continues where it stopped: a cell that has
a result with the same sources, versions, driver and device is not measured again. A cell that fails also has a result,
with the reason. At the end a report is written beside the results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import session
from bench.cells import select
from gptperf.errors import main_guard

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the cells that the command line asks for.

    Returns:
        1 if a cell failed, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="cells, or the start of their names")
    parser.add_argument("--quick", action="store_true", help="a few cells, within 3 minutes")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/bench/DEVICE-COMMIT)")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that have a result")
    parser.add_argument("--list", action="store_true", help="print the cells and their budget, and end")
    args = parser.parse_args(argv)
    cells = select(args.only, args.quick)
    return int(session.run(cells, args.out, quick=args.quick, fresh=args.fresh, only_list=args.list) > 0)


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
