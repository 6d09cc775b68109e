"""`python -m gptperf.report RUN`: one HTML page about a run, finished, running or damaged.

RUN is the folder of a run, a run_*.jsonl or a run_*.json. The page is self-contained: it includes its charts, loads
nothing from other addresses, and every text in it is escaped. This module does not import torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gptperf.errors import main_guard
from gptperf.report.run_page import write_report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of a run."""
    parser = argparse.ArgumentParser(prog="python -m gptperf.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, or its run_*.jsonl or run_*.json")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html beside the log")
    args = parser.parse_args(argv)
    print(f"report: {write_report(args.run, args.out)}")
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
