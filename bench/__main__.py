"""The whole bench, cell by cell: `python -m bench [--only CELL ...] [--quick] [--out DIR] [--fresh] [--list]`.

Every cell writes its own file when it is done, so that an interrupted run goes on where it was: a cell that is there,
with the same sources, versions, driver and device, is not measured again. A cell that fails is a result with its
reason. In the end a report is written beside the results.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.cells import Cell, select
from bench.measure.process import Worker, WorkerEnded
from bench.results import Record
from gptperf.errors import DeviceError, main_guard

__all__ = ["main"]

QUICK_S = 170.0
"""All of `--quick`; the report takes a few seconds more."""
_TIMES_BUDGET, _LEAST_TIMEOUT_S = 6, 240
_START_S = 120


def _stands(folder: Path, cell: Cell, mark: tuple[Any, ...]) -> Record | None:
    """The result of a cell that need not be measured again."""
    path = results.cell_path(folder, cell.name)
    if not path.exists():
        return None
    record = results.read(path)
    return record if record["status"] == "done" and results.identity(record) == mark else None


def _measure(worker: Worker, cell: Cell, folder: Path, shared: Record, timeout_s: float) -> Record:
    """Have one cell measured and write its file."""
    begun = time.monotonic()
    job = {"job": cell.name, "quick": shared["quick"], "folder": str(folder)}
    if cell.alone:
        worker.close()
    try:
        answer = worker.ask(job, timeout_s)
    except WorkerEnded as error:
        answer = {"status": "failed", "reason": str(error), "results": {}, "config": None, "ops": None}
    if cell.alone or answer["status"] == "failed":  # a failure may leave the device unusable for the process
        worker.close()
    record = {**shared, "cell": cell.name, "date": results.now(), "seconds": time.monotonic() - begun, **answer}
    results.write(folder, record)
    return record


def _budget(cells: Sequence[Cell], done: Sequence[str], folder: Path, quick: bool) -> list[str]:
    """What is going to be measured, with the seconds that it took before or may take."""
    lines, total = [], 0.0
    for cell in cells:
        if cell.name in done:
            lines.append(f"  {cell.name:<46}{'there':>8}")
        else:
            seconds = _expected(cell, folder, quick)
            total += seconds
            lines.append(f"  {cell.name:<46}{seconds:>6.0f} s")
    count = len(cells) - len(done)
    return [*lines, f"  {count} cells to measure, about {total / 60:.1f} minutes; {len(done)} are there"]


def _expected(cell: Cell, folder: Path, quick: bool) -> float:
    """Seconds of a cell, measured before or guessed."""
    path = results.cell_path(folder, cell.name)
    before = results.read(path) if path.exists() else {}
    if before.get("status") == "done" and before.get("quick") == quick:
        return float(before["seconds"])
    return cell.seconds(quick)


def _run(cells: Sequence[Cell], folder: Path, shared: Record, worker: Worker, begun: float) -> tuple[int, list[str]]:
    """Measure cells; returns how many failed and which were left out for want of time."""
    failed, left_out = 0, []
    for number, cell in enumerate(cells, 1):
        passed = time.monotonic() - begun
        timeout_s = max(_LEAST_TIMEOUT_S, _TIMES_BUDGET * cell.budget_s)
        if shared["quick"]:
            if passed + cell.seconds(True) > QUICK_S:
                left_out.append(cell.name)
                continue
            timeout_s = min(timeout_s, QUICK_S - passed)
        print(f"\n[{number}/{len(cells)}, {passed / 60:.1f} min] {cell.name}", flush=True)
        record = _measure(worker, cell, folder, shared, timeout_s)
        if record["status"] == "failed":
            failed += 1
            print(f"  failed: {record['reason']}")
        print(f"  {record['seconds']:.1f} s", flush=True)
    return failed, left_out


def _report(folder: Path) -> None:
    """The report, or how to get it."""
    from bench.report.sections import verdict_lines
    from bench.report.write import write_reports

    try:
        paths = write_reports(folder)
    except DeviceError as error:
        print(f"\nno report: {error}; then: python -m bench.report {folder}")
        return
    print("\n" + "\n".join(verdict_lines(results.load_folder(folder))))
    print(f"report: {paths[0]}, {paths[1]}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="cells, or the start of their names")
    parser.add_argument("--quick", action="store_true", help="a few cells, within 3 minutes")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/bench/DEVICE-COMMIT)")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that are there")
    parser.add_argument("--list", action="store_true", help="print the cells and their budget, and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for.

    Returns:
        1 if a cell failed, else 0.
    """
    args = parse(argv)
    begun = time.monotonic()
    cells = select(args.only, args.quick)
    with Worker(interpreter=False) as worker:
        environment = _environment(worker)
        on_gpu = environment["device"] != "cpu"
        shared: Record = {"schema": results.SCHEMA, "quick": args.quick, "environment": environment}
        folder = (args.out or results.default_folder(environment) / ("quick" if args.quick else "")).resolve()
        possible = [cell for cell in cells if on_gpu or not cell.gpu]
        mark = results.identity({**shared})
        done = [] if args.fresh else [cell.name for cell in possible if _stands(folder, cell, mark)]
        source = environment["source"]
        changed = {True: " and changes", False: "", None: ""}[source["dirty"]]
        print(f"{environment['device']}, commit {source['commit'] or 'unknown'}{changed}, results in {folder}")
        print("\n".join(_budget(possible, done, folder, args.quick)), flush=True)
        missing = [cell for cell in cells if cell not in possible]
        if missing:
            print(f"no GPU here: {len(missing)} cells that need one are not measured, and there is no MFU")
        if not on_gpu and any(cell.name.startswith("errors/") for cell in possible):
            print("the errors of the ops are those of Triton's interpreter, on small shapes")
        if args.list:
            return 0
        todo = [cell for cell in possible if cell.name not in done]
        with Worker(interpreter=not on_gpu) as measurer:
            worker.close()
            failed, left_out = _run(todo, folder, shared, measurer, begun)
    if left_out:
        print(f"\nleft out, there was no time: {', '.join(left_out)}")
    if possible and folder.is_dir():
        _report(folder)
    print(f"{time.monotonic() - begun:.0f} s, {failed} failed")
    return int(failed > 0)


def _environment(worker: Worker) -> dict[str, Any]:
    """What made the figures, from a process of its own: this one never touches the GPU.

    Raises:
        DeviceError: that process failed.
    """
    try:
        found = worker.ask({"job": "environment"}, _START_S)
    except WorkerEnded as error:
        raise DeviceError(f"the bench cannot be run: {error}") from error
    return {**found, "source": results.source_state()}


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
