"""The report of a folder of results: `python -m bench.report DIR` writes DIR/report.md and DIR/report.html.

The HTML file needs nothing beside it: charts are in it, no address is asked for, and every text is escaped.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.report import charts
from bench.report.sections import sections, verdict_lines
from bench.results import Record, load_folder
from gptperf.errors import main_guard
from gptperf.report.page import Section, render

__all__ = ["html", "main", "markdown", "verdict_lines", "write_reports"]


def title_of(records: Mapping[str, Record]) -> str:
    """Device and date."""
    devices = dict.fromkeys(record["environment"]["device"] for record in records.values())
    last = max(record["date"] for record in records.values())
    return f"gptperf bench: {', '.join(devices)}, {last[:10]}"


def _escaped(text: str) -> str:
    """Text that Markdown takes as it is, in one cell of a table; an underscore within a word means nothing there."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|\[\]]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)


def _markdown_section(section: Section) -> list[str]:
    lines = [f"## {_escaped(section.title)}", ""]
    for line in section.lines:
        lines += [_escaped(line), ""]
    for table in section.tables:
        lines.append("| " + " | ".join(map(_escaped, table.columns)) + " |")
        lines.append("| --- " + "| ---: " * (len(table.columns) - 1) + "|")
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in table.rows] + [""]
    if section.code:
        lines += [*(f"    {line}" for line in section.code), ""]
    return lines


def markdown(records: Mapping[str, Record]) -> str:
    """The report without charts."""
    lines = [f"# {_escaped(title_of(records))}", ""]
    for section in sections(records):
        if section.tables or section.lines or section.code:
            lines += _markdown_section(section)
    return "\n".join(lines).rstrip() + "\n"


def html(records: Mapping[str, Record]) -> str:
    """The report as one page.

    Raises:
        DeviceError: jinja2 or matplotlib is not installed.
    """
    found = sections(records)
    drawn = {name: charts.draw(name, records) for section in found for name in section.charts}
    return render(title_of(records), found, drawn, "bench")


def write_reports(folder: Path) -> tuple[Path, Path]:
    """Write both files of a folder of results.

    Raises:
        ConfigError: there are no results.
        DeviceError: a package is not installed; the Markdown file is there then.
    """
    records = load_folder(folder)
    paths = folder / "report.md", folder / "report.html"
    for path, make in zip(paths, (markdown, html), strict=True):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(make(records), encoding="utf-8")
        os.replace(temporary, path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder that `python -m bench` wrote")
    args = parser.parse_args(argv)
    paths = write_reports(args.folder)
    print("\n".join([*verdict_lines(load_folder(args.folder)), f"report: {paths[0]}, {paths[1]}"]))
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
