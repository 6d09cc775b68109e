"""Reports a folder of results: `python -m bench.report DIR` writes DIR/report.md and DIR/report.html.

The HTML file is self-contained: it includes its charts, loads nothing from other addresses, and every text in it is
escaped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report.sections import verdict_lines
from bench.report.write import write_reports
from bench.results import load_folder
from gptperf.errors import main_guard

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder that `python -m bench` wrote")
    args = parser.parse_args(argv)
    paths = write_reports(args.folder)
    print("\n".join([*verdict_lines(load_folder(args.folder)), f"report: {paths[0]}, {paths[1]}"]))
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
