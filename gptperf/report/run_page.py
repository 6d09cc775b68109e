"""Makes the page of one run from its sections and charts, and writes it to a file."""

from pathlib import Path

from gptperf.errors import ConfigError
from gptperf.files import replace_text
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import find_log, load
from gptperf.monitor.runs import is_running
from gptperf.report.charts import CAPTIONS, draw
from gptperf.report.page import clean, render
from gptperf.report.sections import sections

__all__ = ["html", "write_report"]


def html(log: RunLog, running: bool = False) -> str:
    """Returns the page of a run.

    Args:
        log: Log of the run.
        running: Whether the process of the run is still there.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    found = sections(log, running)
    charts = {name: draw(name, log) for section in found for name in section.charts}
    kept = [s for s in found if s.tiles or s.lines or s.tables or s.code or any(charts[name] for name in s.charts)]
    return render(clean(log["run_name"], 100), kept, charts, CAPTIONS)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run. A reader sees the old file or the new one, never an incomplete one.

    Args:
        run: Folder of the run, or one of its logs.
        out: The file to write; default: report.html beside the log.

    Raises:
        ConfigError: `out` does not end in .html.
        DataError: There is no log, or it cannot be read.
        DeviceError: jinja2 or matplotlib is not installed.
        DiskError: The file cannot be written.
    """
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"command line: out: found {str(out)!r}, wanted a name that ends in .html")
    path = find_log(run)
    out = path.parent / "report.html" if out is None else out
    log = load(path)
    replace_text(out, html(log, is_running(path, log)))
    return out
