"""Measures cells in a separate process: `python -m bench.measure.worker FD` reads jobs as JSON lines from stdin, and
writes answers to the file descriptor FD.

Output of a cell goes to stdout. The answer for a cell that fails has the reason; a process that dies gives no answer.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.measure import generation, loader, monitoring, op_errors, ops, rivals, start, step, timing
from bench.measure.cases import HOST_ROWS, LOSS_OP, OPS, OURS
from bench.measure.models import DEFAULT_VARIANT, planned, resolve, rival_config
from bench.measure.op_tables import error_table, host_table, table
from gptperf.hardware.measure import measure as measure_ceilings
from gptperf.hardware.measure_command import report
from gptperf.monitor import step_timing

__all__ = ["execute", "main"]

Found = dict[str, Any]
_STEPS, _QUICK_STEPS = 31, 15
_ROUNDS, _QUICK_ROUNDS = 11, 3
_QUICK_CEILINGS = 2
_MICRO_MAX_TIME_S = 1.0


def _ops(name: str, quick: bool, _: Path) -> Found:
    op, sizes = name.split("/")[1:]
    shape = tuple(int(size) for size in sizes.split("x"))
    measure = ops.measure_loss if op == LOSS_OP else ops.measure
    with ops.setting():
        rows = measure(op, shape, OPS[op].impls, _QUICK_ROUNDS if quick else _ROUNDS)
    print(table(rows))
    failed = [row["error"] for row in rows if "error" in row and row["impl"] == OURS]
    return {"results": {"rows": rows}, "protocol": ops.PROTOCOL, "ops": {op: "each"}, "failed": failed}


def _errors(name: str, quick: bool, _: Path) -> Found:
    op, on_gpu = name.split("/")[1], torch.cuda.is_available()
    rows = []
    with ops.setting():
        for shape in (OPS[op].small, OPS[op].real) if on_gpu and not quick else (OPS[op].small,):
            for dtype in op_errors.dtypes_of(op):
                rows += op_errors.error_rows(op, shape, dtype, "cuda" if on_gpu else "cpu")
    print(error_table(rows))
    failed = [row["error"] for row in rows if "error" in row]
    where = "on the GPU" if on_gpu else "on a CPU in Triton's interpreter, which truncates to bfloat16"
    return {"results": {"rows": rows, "where": where}, "protocol": ops.PROTOCOL, "failed": failed}


def _host(name: str, quick: bool, _: Path) -> Found:
    op = name.split("/")[1]
    impls = [impl for impl in ops.HOST_IMPLS if impl in OPS[op].impls]
    rows: list[Found] = []
    with ops.setting():
        for count in HOST_ROWS[:1] if quick else HOST_ROWS:
            rows += ops.measure_host(op, count, impls)
    print(host_table(rows))
    failed = [row["error"] for row in rows if "error" in row and row["impl"] == OURS]
    return {"results": {"rows": rows}, "protocol": ops.PROTOCOL, "failed": failed}


def _ceilings(name: str, quick: bool, _: Path) -> Found:
    config = resolve(name.split("/")[1], DEFAULT_VARIANT)
    where = config.model, config.train.batch_size, config.system.compute_dtype
    found = measure_ceilings(*where, rounds=_QUICK_CEILINGS) if quick else measure_ceilings(*where)
    print("\n".join(report(found, config.model)))
    return {"results": asdict(found), "protocol": found.protocol, "config": config.sections()}


def _ceilings_of(model: str, folder: Path) -> Mapping[str, Any] | None:
    """Returns the ceilings that this run has measured for a model, or None."""
    path = results.cell_path(folder, f"ceilings/{model}")
    record = results.read(path) if path.exists() else None
    return None if record is None or record["status"] != "done" else dict(record["results"])


def _step(name: str, quick: bool, folder: Path) -> Found:
    _, model, variant = name.split("/")
    found = step.measure(model, variant, _QUICK_STEPS if quick else _STEPS, ceilings=_ceilings_of(model, folder))
    return {**found, "protocol": step_timing.STEP_PROTOCOL}


def _waterfall(name: str, quick: bool, folder: Path) -> Found:
    model = name.split("/")[1]
    steps, rates = _QUICK_STEPS if quick else _STEPS, _ceilings_of(model, folder)
    found = step.measure(model, DEFAULT_VARIANT, steps, profile=True, ceilings=rates)
    return {**found, "protocol": f"{step_timing.STEP_PROTOCOL} Then {step.PROFILED} steps under the profiler."}


def _generation(name: str, _: bool, __: Path) -> Found:
    model, batch_size = name.split("/")[1:]
    found = generation.measure(model, int(batch_size))
    print(generation.line(found))
    return {"results": found, "protocol": generation.PROTOCOL}


def _start(name: str, _: bool, __: Path) -> Found:
    found = start.measure(name.split("/")[1])
    print(start.line(found))
    return {"results": found, "protocol": start.PROTOCOL}


def _rivals(name: str, quick: bool, _: Path) -> Found:
    model, shape = name.split("/")[1:]
    folder = os.environ.get("NANOGPT")
    turn = rivals.Turn(rival_config(model, shape), nanogpt=Path(folder) if folder else None)
    found = rivals.measure(turn, (rivals.OURS, *rivals.RIVALS), rounds=3, steps=_QUICK_STEPS)
    print("\n".join(rivals.lines(found)))
    failed = [found[rivals.OURS]["reason"]] if "reason" in found[rivals.OURS] else []
    results: Found = {"model": model, "shape": shape, "contenders": found}
    return {"config": turn.config.sections(), "results": results, "protocol": rivals.__doc__, "failed": failed}


def _monitor(name: str, _: bool, __: Path) -> Found:
    return {**monitoring.measure(name.split("/")[1]), "protocol": monitoring.PROTOCOL}


def _plan(name: str, quick: bool, _: Path) -> Found:
    found = step.measure_config(planned(name.partition("/")[2]), _QUICK_STEPS)
    return {**found, "protocol": step_timing.STEP_PROTOCOL}


def _loader(_: str, quick: bool, __: Path) -> Found:
    tokens, windows, window_s = (8_000_000, 3, 0.5) if quick else (loader.RANDOM_TOKENS, 5, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        rows = loader.measure_all(Path(folder), tokens=tokens, windows=windows, window_s=window_s, few=quick)
    return {"results": {"rows": rows}, "protocol": loader.__doc__}


def _micro(name: str, _: bool, __: Path) -> Found:
    if importlib.util.find_spec("pytest_benchmark") is None:
        return {"results": {}, "failed": ["pytest-benchmark is not installed; pip install 'gptperf[test]'"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmark.json")
        command = [sys.executable, "-m", "pytest", "bench/measure/micro.py", "-k", name.split("/")[1], "-q"]
        command += [f"--benchmark-json={path}", f"--benchmark-max-time={_MICRO_MAX_TIME_S}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            return {"results": {}, "failed": [f"pytest ended with {done.returncode}: {lines[-1]}"]}
        found = json.loads(path.read_text())["benchmarks"]
    rows = []
    for row in found:
        times = [1e3 * seconds for seconds in row["stats"]["data"]]
        spread = step_timing.Spread.of(times)
        rows.append({"name": row["name"].removeprefix("test_"), "rounds": len(times), **asdict(spread)})
        print(f"  {rows[-1]['name']:<28}{spread.ms * 1e3:>12.2f} us  {len(times)} rounds")
    protocol = f"pytest-benchmark, {_MICRO_MAX_TIME_S:g} s of rounds each after its calibration; host time."
    return {"results": {"rows": rows}, "protocol": protocol}


_KINDS: dict[str, Callable[[str, bool, Path], Found]] = {
    "ops": _ops,
    "errors": _errors,
    "host": _host,
    "ceilings": _ceilings,
    "step": _step,
    "waterfall": _waterfall,
    "generation": _generation,
    "start": _start,
    "rivals": _rivals,
    "monitor": _monitor,
    "plan": _plan,
    "loader": _loader,
    "micro": _micro,
}


def execute(name: str, quick: bool, folder: Path) -> Found:
    """Measures a cell.

    Args:
        name: Name of a cell of `bench.cells`.
        quick: Whether to measure the short form, with fewer rounds.
        folder: Folder with the results of this run so far.

    Returns:
        status ("done" or "failed"), reason, results, protocol, and config and ops if the cell has them.
    """
    row: Found = {}
    found = results.guarded(row, partial(_traced, partial(_KINDS[name.partition("/")[0]], name, quick, folder))) or {}
    failed = [row["error"]] if row else found.pop("failed", [])
    if not row:  # after an error the device may not respond, and this process ends anyway
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    shared: Found = {"config": None, "ops": None, "protocol": None, "results": {}}
    return {**shared, **found, "status": "failed" if failed else "done", "reason": failed[0] if failed else None}


def _traced(measure: Callable[[], Found]) -> Found:
    """Calls `measure`, and prints the traceback of an error before it passes on."""
    try:
        return measure()
    except BaseException:  # raised again: only the traceback is printed here
        traceback.print_exc()
        raise


def main() -> None:
    """Answers jobs until stdin ends."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # a process that a cell starts must not keep the pipe open
    with os.fdopen(fd, "w") as answers:
        for line in sys.stdin:
            job = json.loads(line)
            if job["job"] == "environment":
                answer = timing.environment(ops.RIVALS)
            else:
                answer = execute(job["job"], job["quick"], Path(job["folder"]))
                sys.stdout.flush()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
