"""`python -m gptperf.report RUN`: one HTML page about a run, finished, running or damaged.

RUN is the folder of a run, a run_*.jsonl or a run_*.json. The page is self-contained: it includes its charts, loads
nothing from other addresses, and every text in it is escaped. This module does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptperf.config.flags import Flags, parse
from gptperf.errors import run_main
from gptperf.report.run_page import write_report

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _ReportFlags(Flags):
    """Which run, and where the page goes."""

    run: Path
    """Folder of a run, or its run_*.jsonl or run_*.json."""
    out: Path | None = None
    """File to write; default: report.html beside the log."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of a run."""
    flags = parse(
        _ReportFlags, argv, "gptperf.report", "Write one HTML page about a run, finished, running or damaged."
    )
    print(f"report: {write_report(flags.run, flags.out)}")
    return 0


if __name__ == "__main__":
    run_main(main)
