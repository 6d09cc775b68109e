"""`python -m gptperf.report RUN`: one HTML page about a run, finished, running or damaged.

RUN is a run's folder, a run_*.jsonl or a run_*.json. The page needs nothing beside it: charts are in it, no address is
asked for, and every text is escaped. No torch here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gptperf.errors import ConfigError, main_guard
from gptperf.files import replace_text
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import find_log, load
from gptperf.report.charts import CAPTIONS, draw
from gptperf.report.page import clean, render
from gptperf.report.sections import sections

__all__ = ["html", "main", "write_report"]


def html(log: RunLog) -> str:
    """The page.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    found = sections(log)
    charts = {name: draw(name, log) for section in found for name in section.charts}
    kept = [s for s in found if s.tiles or s.lines or s.tables or s.code or any(charts[name] for name in s.charts)]
    return render(clean(log["run_name"], 100), kept, charts, "report", CAPTIONS)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run; a reader sees the old file or the new one, never a part.

    Args:
        run: a run's folder, or a log of it.
        out: the file; None: report.html beside the log.

    Raises:
        ConfigError: `out` does not end in .html.
        DataError: there is no log, or it cannot be read.
        DeviceError: jinja2 or matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"command line: out: found {str(out)!r}, wanted a name that ends in .html")
    path = find_log(run)
    out = path.parent / "report.html" if out is None else out
    replace_text(out, html(load(path)))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of a run."""
    parser = argparse.ArgumentParser(prog="python -m gptperf.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, or its run_*.jsonl or run_*.json")
    parser.add_argument("--out", type=Path, help="the file; default: report.html beside the log")
    args = parser.parse_args(argv)
    print(f"report: {write_report(args.run, args.out)}")
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
