"""One run of the bench: decides which cells to measure, has the worker measure them, and prints the progress."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.cells import Cell
from bench.measure.process import Worker, WorkerEnded
from bench.report.sections import verdict_lines
from bench.report.write import write_reports
from bench.results import Record
from gptperf.errors import DeviceError
from gptperf.formats import counted

__all__ = ["QUICK_S", "run"]

QUICK_S = 170.0
"""Time for all cells of `--quick`; the report takes a few seconds more."""
_TIMES_BUDGET, _LEAST_TIMEOUT_S = 6, 240
_START_S = 120


def run(cells: Sequence[Cell], out: Path | None, *, quick: bool, fresh: bool, only_list: bool) -> int:
    """Measures cells and writes the report.

    Args:
        cells: Cells to measure, in this order. Without a GPU, cells that need one are left out.
        out: Folder of the results; default: the folder of this device and commit.
        quick: Whether to measure the short form of the cells, within `QUICK_S`.
        fresh: Whether to measure the cells that have a valid result too.
        only_list: Whether to print the cells with their budget and measure nothing.

    Returns:
        Number of cells that failed.

    Raises:
        DeviceError: The worker process cannot be started.
    """
    begun = time.monotonic()
    with Worker(interpreter=False) as worker:
        environment = _environment(worker)
    on_gpu = environment["device"] != "cpu"
    shared: Record = {"schema": results.SCHEMA, "quick": quick, "environment": environment}
    folder = (out or results.default_folder(environment) / ("quick" if quick else "")).resolve()
    possible = [cell for cell in cells if on_gpu or not cell.gpu]
    mark = results.identity({**shared})
    done = [] if fresh else [cell.name for cell in possible if _stands(folder, cell, mark)]
    source = environment["source"]
    changed = {True: " and changes", False: "", None: ""}[source["dirty"]]
    print(f"{environment['device']}, commit {source['commit'] or 'unknown'}{changed}, results in {folder}")
    print("\n".join(_budget(possible, done, folder, quick)), flush=True)
    missing = [cell for cell in cells if cell not in possible]
    if missing:
        print(f"no GPU here: no MFU, and without the {counted(len(missing), 'cell')} that need one")
    if not on_gpu and any(cell.name.startswith("errors/") for cell in possible):
        print("the errors of the ops are those of Triton's interpreter, on small shapes")
    if only_list:
        return 0
    with Worker(interpreter=not on_gpu) as worker:
        failed, left_out = _run([c for c in possible if c.name not in done], folder, shared, worker, begun)
    if left_out:
        print(f"\nleft out for lack of time: {', '.join(left_out)}")
    if possible and folder.is_dir():
        _report(folder)
    print(f"{time.monotonic() - begun:.0f} s, {failed} failed")
    return failed


def _environment(worker: Worker) -> dict[str, Any]:
    """Asks the worker for device, driver and versions, because this process must not use the GPU.

    Raises:
        DeviceError: The worker ended without an answer.
    """
    try:
        found = worker.ask({"job": "environment"}, _START_S)
    except WorkerEnded as error:
        raise DeviceError(f"the bench cannot run: {error}") from error
    return {**found, "source": results.source_state()}


def _stands(folder: Path, cell: Cell, mark: tuple[Any, ...]) -> Record | None:
    """Returns the result of a cell if it is valid and need not be measured again, else None."""
    path = results.cell_path(folder, cell.name)
    if not path.exists():
        return None
    record = results.read(path)
    return record if record["status"] == "done" and results.identity(record) == mark else None


def _budget(cells: Sequence[Cell], done: Sequence[str], folder: Path, quick: bool) -> list[str]:
    """Returns a line for each cell, with the seconds that it took before or is estimated to take."""
    lines, total = [], 0.0
    for cell in cells:
        if cell.name in done:
            lines.append(f"  {cell.name:<46}{'there':>8}")
        else:
            seconds = _expected(cell, folder, quick)
            total += seconds
            lines.append(f"  {cell.name:<46}{seconds:>6.0f} s")
    left = counted(len(cells) - len(done), "cell")
    return [*lines, f"  {left} to measure, about {total / 60:.1f} minutes; measured before: {len(done)}"]


def _expected(cell: Cell, folder: Path, quick: bool) -> float:
    """Returns the seconds that a cell took before, or else its estimate."""
    path = results.cell_path(folder, cell.name)
    before = results.read(path) if path.exists() else {}
    if before.get("status") == "done" and before.get("quick") == quick:
        return float(before["seconds"])
    return cell.seconds(quick)


def _run(cells: Sequence[Cell], folder: Path, shared: Record, worker: Worker, begun: float) -> tuple[int, list[str]]:
    """Measures cells. Returns how many failed, and the names of those that were left out for lack of time."""
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


def _measure(worker: Worker, cell: Cell, folder: Path, shared: Record, timeout_s: float) -> Record:
    """Has the worker measure one cell, and writes the file of the cell."""
    begun = time.monotonic()
    job = {"job": cell.name, "quick": shared["quick"], "folder": str(folder)}
    if cell.alone:
        worker.close()
    try:
        answer = worker.ask(job, timeout_s)
    except WorkerEnded as error:
        answer = {"status": "failed", "reason": str(error), "results": {}, "config": None, "ops": None}
    if cell.alone or answer["status"] == "failed":  # after a failure the process may be unable to use the device
        worker.close()
    record = {**shared, "cell": cell.name, "date": results.now(), "seconds": time.monotonic() - begun, **answer}
    results.write(folder, record)
    return record


def _report(folder: Path) -> None:
    """Writes the report, or prints how to get one if a package is missing."""
    try:
        paths = write_reports(folder)
    except DeviceError as error:
        print(f"\nno report: {error}; then: python -m bench.report {folder}")
        return
    print("\n" + "\n".join(verdict_lines(results.load_folder(folder))))
    print(f"report: {paths[0]}, {paths[1]}")
