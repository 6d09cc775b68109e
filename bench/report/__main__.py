"""Reports a folder of results: `python -m bench.report DIR` writes DIR/report.md and DIR/report.html.

The HTML file is self-contained: it includes its charts, loads nothing from other addresses, and every text in it is
escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.sections import verdict_lines
from bench.report.write import write_reports
from bench.results import load_folder
from gptperf.config.flags import Flags, parse
from gptperf.errors import run_main

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _ReportFlags(Flags):
    """Which results."""

    folder: Path
    """Folder that `python -m bench` wrote."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of a folder."""
    args = parse(_ReportFlags, argv, "bench.report", __doc__)
    paths = write_reports(args.folder)
    print("\n".join([*verdict_lines(load_folder(args.folder)), f"report: {paths[0]}, {paths[1]}"]))
    return 0


if __name__ == "__main__":
    run_main(main)
