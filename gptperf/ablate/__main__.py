"""`python -m gptperf.ablate CONFIG.toml --vary key=value[,key2=value2] ... --seeds 3`: what each change is worth.

The baseline and every change are trained with every seed, each at the tokens or FLOPs of the baseline: one run after
another, or with --parallel N so many at a time, each on one GPU, which more runs than GPUs share. Runs that are
finished are not run again, interrupted ones go on: the same command continues.
"""

import argparse
import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from gptperf.ablate import page
from gptperf.ablate.runs import Job, Variant, changed_runs, results, variants
from gptperf.errors import PREEMPTED, ConfigError, main_guard
from gptperf.files import replace_text
from gptperf.report import tables

__all__ = ["Runner", "main"]

_EPILOG = """All other flags are those of gptperf.train. A result is DIR/<variant>/seed<k>; DIR/ablation.md and
DIR/ablation.json have the table. Exit codes: 0 all runs finished, 1 some failed, 75 asked to stop."""


class Runner:
    """Runs commands, and passes on the signals that ask them to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # a signal may come to the thread that has it

    @contextlib.contextmanager
    def listening(self) -> Iterator["Runner"]:
        """Take SIGTERM and Ctrl-C here."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop."""
        return self._asked

    def stop(self) -> None:
        """Run nothing more."""
        self._asked = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self._asked = True
            for child in self._children:
                child.send_signal(number)

    def run(self, command: Sequence[str], gpu: str | None = None, log: Path | None = None) -> int:
        """Run it to its end, and return its exit code.

        Args:
            command: program and arguments.
            gpu: the only one that it sees; default: all that there are.
            log: file for what it prints; default: the console.
        """
        environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        with contextlib.ExitStack() as stack:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
            output = None if log is None else stack.enter_context(log.open("ab"))
            with self._lock:
                # In a group of its own a child hears of Ctrl-C once, from here: a second one would end it unsaved.
                child = subprocess.Popen(command, process_group=0, env=environment, stdout=output, stderr=output)
                if self._asked:  # before the child was there to hear of it
                    child.send_signal(signal.SIGTERM)
                self._children.add(child)
            code = child.wait()
            with self._lock:
                self._children.remove(child)
            return code


def _listed(found: Sequence[Variant]) -> str:
    """The runs with what each trains on."""
    rows = []
    for variant in found:
        for job in variant.jobs:
            log = job.log()
            state = "finished" if job.finished() else "-" if log is None else f"at iteration {log.iterations:,}"
            per_token = variant.flops_per_token
            total = "-" if per_token is None else f"{per_token * variant.tokens:.3e}"
            iters = f"{job.config.train.max_iters:,}"
            rows.append((variant.name, str(job.seed), iters, f"{variant.tokens:,}", total, state))
    columns = ("variant", "seed", "iterations", "tokens", "FLOPs", "state")
    return tables.aligned(tables.Table(columns, rows, frozenset({0, 5})))


def _run_all(
    found: Sequence[Variant], runner: Runner, after: Callable[[dict[Path, str]], object], gpus: Sequence[str]
) -> dict[Path, str]:
    """Run what is not finished; `after` is called with the failures so far when a run has ended.

    Args:
        found: variants with their runs.
        runner: of the runs.
        after: takes folder -> how its run failed.
        gpus: of the runs that are trained at a time; empty: one run after another on what there is.

    Returns:
        Folder -> how its run failed.
    """
    jobs: list[tuple[Variant, Job]] = [(v, v.jobs[i]) for i in range(len(found[0].jobs)) for v in found]
    failed: dict[Path, str] = {}
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    ending = threading.Lock()

    def run(number: int, variant: Variant, job: Job) -> None:
        what = f"run {number} of {len(jobs)}: {variant.name}, seed {job.seed}"
        if job.finished():
            print(f"ablate: {what}: finished already", flush=True)
            return
        if runner.asked():
            return
        command = [sys.executable, "-m", "gptperf.train", *job.argv]
        if gpus:
            gpu, log = free.get(), job.out_dir.with_name(f"{job.out_dir.name}.txt")
            print(f"ablate: {what} -> {log}, on {f'GPU {gpu}' if gpu else 'the CPU'}", flush=True)
            code = runner.run(command, gpu, log)
            free.put(gpu)
        else:
            print(f"ablate: {what} -> {job.out_dir}", flush=True)
            code = runner.run(command)
        with ending:
            if code == PREEMPTED:  # whoever asked the run, not us, to stop meant all of it
                runner.stop()
            elif runner.asked():
                if not job.finished():
                    print(f"ablate: {what} ended with exit code {code} before it could save", file=sys.stderr)
            elif code or not job.finished():
                failed[job.out_dir] = f"exit code {code}" if code else "exit code 0, but its log has no end"
                print(f"ablate: {what} failed: {failed[job.out_dir]}; the others go on", file=sys.stderr, flush=True)
            after(failed)

    if not gpus:  # in this thread, to which the signals come
        for number, (variant, job) in enumerate(jobs, 1):
            run(number, variant, job)
        return failed
    with ThreadPoolExecutor(len(gpus)) as pool:
        for future in [pool.submit(run, number, *pair) for number, pair in enumerate(jobs, 1)]:
            future.result()
    return failed


def _gpus(parallel: int) -> list[str]:
    """Values of `CUDA_VISIBLE_DEVICES` for as many runs at a time; none where they come one after another."""
    if parallel == 1:
        return []
    count = importlib.import_module("torch").cuda.device_count()
    if not count:
        return [""] * parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [visible[i % count] for i in range(parallel)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablation and report it.

    Returns:
        0, 1 where a run failed, or `PREEMPTED` after a request to stop.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gptperf.ablate",
        usage="%(prog)s [CONFIG.toml ...] --vary key=value[,key2=value2 ...] [--vary ...] [options] [--key=value ...]",
        description=__doc__.split("\n\n")[1],
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--vary", action="append", default=[], metavar="key=value", help="a change; joint with commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs a variant (default 3)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--equal", choices=("tokens", "flops"), default="tokens", help="what each run gets as much of")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="default: out/ablation")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a page with the curves")
    parser.add_argument("--list", action="store_true", help="print the runs with their tokens, and end")
    args, rest = parser.parse_known_args(argv)
    if not args.vary:
        raise ConfigError("command line: found no --vary, wanted one or more, such as --vary position_encoding=rope")
    if args.seeds < 1:
        raise ConfigError(f"command line: seeds: found {args.seeds}, wanted 1 or more")
    if args.parallel < 1:
        raise ConfigError(f"command line: parallel: found {args.parallel}, wanted 1 or more")
    found = variants(rest, args.vary, args.seeds, args.equal, args.out)
    gpus = _gpus(min(args.parallel, sum(len(variant.jobs) for variant in found)))
    changed = changed_runs(found)
    if changed:
        raise ConfigError("; ".join([*changed, "wanted another --out, or those folders away"]))
    if args.list:
        print(_listed(found))
        return 0
    if len(set(gpus)) < len(gpus) and "" not in gpus:
        print(
            f"ablate: {len(gpus)} runs at a time share {len(set(gpus))} GPU(s): the tokens/s and MFU of each are less "
            "than alone, and its plan counts on the whole memory"
        )
    if args.html is not None:
        tables.check_packages()

    def write(failed: dict[Path, str]) -> str:
        reached = results(found)
        text = page.markdown(reached, args.equal, failed)
        replace_text(args.out / "ablation.md", text)
        record = page.record(reached, args.equal, failed)
        replace_text(args.out / "ablation.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
        return page.text(reached, args.equal, failed)

    with Runner().listening() as runner:
        failed = _run_all(found, runner, write, gpus)
    print("\n" + write(failed))
    print(f"report: {args.out / 'ablation.md'}, {args.out / 'ablation.json'}")
    if args.html is not None:
        replace_text(args.html, page.html(results(found), args.equal, failed))
        print(f"page: {args.html}")
    if runner.asked() and not all(job.finished() for variant in found for job in variant.jobs):
        print("ablate: asked to stop; the same command goes on", flush=True)
        return PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
