"""Trains many runs, one after another or several at a time. It imports torch only to count GPUs."""

import contextlib
import importlib
import itertools
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

from gptperf.errors import PREEMPTED
from gptperf.experiment.job import Job
from gptperf.hardware.cpu import set_up_threads

__all__ = ["Runner", "gpus_for", "run_all"]


class Runner:
    """Runs commands as child processes, and passes requests to stop on to them.

    Args:
        at_a_time: commands that run at the same time, and share the CPUs.
    """

    def __init__(self, at_a_time: int = 1) -> None:
        self._asked, self._at_a_time = False, at_a_time
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # reentrant: a signal handler may run in the thread that holds the lock

    @contextlib.contextmanager
    def listening(self, minutes: float | None = None) -> Iterator["Runner"]:
        """Handles SIGTERM and Ctrl-C while the body runs, and asks to stop after some minutes."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        timer = threading.Timer(60 * (minutes or 0), self._ask, (signal.SIGTERM, None))
        timer.daemon = True
        if minutes is not None:
            timer.start()
        try:
            yield self
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Returns whether a signal or `stop` has asked to stop."""
        return self._asked

    def stop(self) -> None:
        """Asks to start no more commands."""
        self._asked = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self._asked = True
            for child in self._children:
                child.send_signal(number)

    def run(self, command: Sequence[str], gpu: str | None = None, log: Path | None = None) -> int:
        """Runs a command to its end, and returns its exit code.

        Args:
            command: Program and arguments.
            gpu: The only GPU that the command sees; default: all GPUs.
            log: File for what the command prints; default: the console.
        """
        environment = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        set_up_threads(environment, self._at_a_time)
        with contextlib.ExitStack() as stack:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
            output = None if log is None else stack.enter_context(log.open("ab"))
            with self._lock:
                # Each child has a process group of its own, so that it receives Ctrl-C only once, from `_ask`. A second
                # one from the terminal would end it before it has saved.
                child = subprocess.Popen(command, process_group=0, env=environment, stdout=output, stderr=output)
                if self._asked:  # the signal came before this child could receive it
                    child.send_signal(signal.SIGTERM)
                self._children.add(child)
            code = child.wait()
            with self._lock:
                self._children.remove(child)
            return code


def run_all(
    chains: Sequence[Sequence[tuple[str, Job]]],
    runner: Runner,
    after: Callable[[dict[Path, str]], object],
    gpus: Sequence[str],
    command: str,
) -> dict[Path, str]:
    """Trains every run that is not finished, in the order of the chains.

    Args:
        chains: Runs with their names. The runs of a chain are trained one after another, because each starts from one
            before it; after one that failed, the rest of its chain is left out.
        runner: Runs the commands.
        after: Called with the failures so far whenever a run has ended.
        gpus: A GPU for each run that is trained at the same time; empty to train one run after another, on all GPUs.
        command: Name of the command, for its messages.

    Returns:
        Folder -> how the run in it failed.
    """
    total = sum(map(len, chains))
    failed: dict[Path, str] = {}
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    ending = threading.Lock()

    def run(first: int, chain: Sequence[tuple[str, Job]]) -> None:
        for place, (name, job) in enumerate(chain, first):
            what = f"{command}: run {place} of {total}: {name}"
            if job.finished():
                print(f"{what}: finished already", flush=True)
                continue
            if runner.asked():
                return
            code = _run(runner, job, what, free if gpus else None)
            with ending:
                _ended(runner, job, what, code, failed)
                after(failed)
            if not job.finished():
                return

    firsts = list(itertools.accumulate(map(len, chains[:-1]), initial=1))
    if not gpus:  # runs in this thread, which receives the signals
        for first, chain in zip(firsts, chains, strict=True):
            run(first, chain)
        return failed
    with ThreadPoolExecutor(len(gpus)) as pool:
        for future in [pool.submit(run, first, chain) for first, chain in zip(firsts, chains, strict=True)]:
            future.result()
    return failed


def _run(runner: Runner, job: Job, what: str, free: "queue.SimpleQueue[str] | None") -> int:
    """Trains one run, on a GPU of the queue if there is one, and returns its exit code."""
    command = [sys.executable, "-m", "gptperf.train", *job.command()]
    if free is None:
        print(f"{what} -> {job.out_dir}", flush=True)
        return runner.run(command)
    gpu, log = free.get(), job.out_dir.with_name(f"{job.out_dir.name}.txt")
    print(f"{what} -> {log}, on {f'GPU {gpu}' if gpu else 'the CPU'}", flush=True)
    code = runner.run(command, gpu, log)
    free.put(gpu)
    return code


def _ended(runner: Runner, job: Job, what: str, code: int, failed: dict[Path, str]) -> None:
    """Judges a run by its exit code and its log, and adds it to `failed` if it failed."""
    if code == PREEMPTED:  # the run was asked to stop, and this process was not: the request counts for all runs
        runner.stop()
    elif runner.asked():
        if not job.finished():
            print(f"{what} ended with exit code {code} before it could save", file=sys.stderr)
    elif code or not job.finished():
        failed[job.out_dir] = f"exit code {code}" if code else "exit code 0, but its log has no end"
        print(f"{what} failed: {failed[job.out_dir]}; the others continue", file=sys.stderr, flush=True)


def gpus_for(parallel: int) -> list[str]:
    """Returns a value of `CUDA_VISIBLE_DEVICES` for each of `parallel` runs; an empty list if `parallel` is 1."""
    if parallel == 1:
        return []
    count = importlib.import_module("torch").cuda.device_count()
    if not count:
        return [""] * parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [visible[i % count] for i in range(parallel)]
