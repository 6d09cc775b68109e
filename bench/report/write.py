"""Writes the report of a folder of results, as Markdown and as a page."""

from collections.abc import Mapping
from pathlib import Path

from bench.report import charts
from bench.report.sections import sections
from bench.results import Record, load_folder
from gptperf.files import replace_text
from gptperf.report.page import Section, render
from gptperf.report.tables import escaped
from gptperf.report.tables import markdown as markdown_table

__all__ = ["html", "markdown", "write_reports"]


def _title(records: Mapping[str, Record]) -> str:
    """Returns the title of the report: devices and date of the results."""
    devices = dict.fromkeys(record["environment"]["device"] for record in records.values())
    last = max(record["date"] for record in records.values())
    return f"gptperf bench: {', '.join(devices)}, {last[:10]}"


def _markdown_section(section: Section) -> list[str]:
    lines = [f"## {escaped(section.title)}", ""]
    for line in section.lines:
        lines += [escaped(line), ""]
    for table in section.tables:
        lines += [markdown_table(table), ""]
    if section.code:
        lines += [*(f"    {line}" for line in section.code), ""]
    return lines


def markdown(records: Mapping[str, Record]) -> str:
    """Returns the report in Markdown, without charts."""
    lines = [f"# {escaped(_title(records))}", ""]
    for section in sections(records):
        if section.tables or section.lines or section.code:
            lines += _markdown_section(section)
    return "\n".join(lines).rstrip() + "\n"


def html(records: Mapping[str, Record]) -> str:
    """Returns the report as one HTML page.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    found = sections(records)
    drawn = {name: charts.draw(name, records) for section in found for name in section.charts}
    return render(_title(records), found, drawn)


def write_reports(folder: Path) -> tuple[Path, Path]:
    """Writes `report.md` and `report.html` into a folder of results, and returns their paths.

    Raises:
        ConfigError: There are no results.
        DeviceError: jinja2 or matplotlib is not installed; the Markdown file is written anyway.
        DiskError: A file cannot be written.
    """
    records = load_folder(folder)
    paths = folder / "report.md", folder / "report.html"
    for path, make in zip(paths, (markdown, html), strict=True):
        replace_text(path, make(records))
    return paths
