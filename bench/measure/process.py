"""Starts the worker process and sends it jobs. The worker may crash, hang or run out of memory."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from bench.results import ROOT

__all__ = ["Worker", "WorkerEnded"]

_GRACE_S = 10.0


class WorkerEnded(Exception):
    """The worker gave no answer. The text says how the worker ended."""


class Worker:
    """Runs `bench.measure.worker`: starts it with the first job, and again with the next job after it has ended."""

    def __init__(self, interpreter: bool, command: tuple[str, ...] = (sys.executable, "-m", "bench.measure.worker")):
        """
        Args:
            interpreter: Whether to run Triton's kernels in its interpreter, for a machine without a GPU.
            command: Command of the worker; the file descriptor for the answers is appended to it.
        """
        self._interpreter = interpreter
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._answers = -1
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.close(_GRACE_S if error is None else 0.0)

    def ask(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a job and waits for its answer.

        Raises:
            WorkerEnded: The process died, or gave no answer in time and was killed.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = self._line(time.monotonic() + timeout_s)
        except (BrokenPipeError, TimeoutError, EOFError) as error:
            timed_out = isinstance(error, TimeoutError)
            code = self.close(0.0 if timed_out else _GRACE_S)
            how = f"no answer within {timeout_s:.0f} s" if timed_out else _ending(code)
            raise WorkerEnded(how) from error
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        read, write = os.pipe()
        environment = dict(os.environ)
        if self._interpreter:
            environment["TRITON_INTERPRET"] = "1"
        self._process = subprocess.Popen(
            [*self._command, str(write)],
            stdin=subprocess.PIPE,
            pass_fds=[write],
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # so that `close` can kill what the worker has started
        )
        os.close(write)
        self._answers, self._rest = read, b""
        return self._process

    def _line(self, deadline: float) -> bytes:
        """Returns the next line of the answers.

        Raises:
            EOFError: The process closed its end of the pipe.
            TimeoutError: The deadline has passed.
        """
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self, grace_s: float = _GRACE_S) -> int | None:
        """Ends the process and all processes that it started, and returns its exit code.

        Args:
            grace_s: Time in which the process may end by itself, which it does if it is waiting for a job.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.close()
            code: int | None = process.wait(grace_s)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        os.close(self._answers)
        return process.wait() if code is None else code


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
