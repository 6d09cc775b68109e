"""Runs commands with broken output, each in a process of its own that starts with its modules loaded.

`python command_cases.py CASES RESULTS`: CASES is a JSON list of [module, arguments, stdout, stderr], where a stream is
"file", "full" (a device without space), "pipe" (whose reader is gone) or "closed". RESULTS gets the list of
[exit code, stdout, stderr].
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from gptperf.errors import run_main


class Case(NamedTuple):
    """A command line and what its output goes to."""

    module: str
    argv: tuple[str, ...]
    stdout: str = "file"
    stderr: str = "file"


class Ended(NamedTuple):
    """How a command ended. A stream that is no file is empty."""

    code: int
    stdout: str
    stderr: str


def run_cases(cases: list[Case], cwd: Path) -> list[Ended]:
    """Runs every case, and returns how it ended."""
    (cwd / "cases.json").write_text(json.dumps(cases))
    subprocess.run([sys.executable, __file__, "cases.json", "results.json"], cwd=cwd, check=True)
    return [Ended(*found) for found in json.loads((cwd / "results.json").read_text())]


def _connect(fd: int, kind: str, path: Path) -> None:
    """Connects a stream of this process, as the interpreter does when it starts."""
    name = {1: "stdout", 2: "stderr"}[fd]
    if kind == "closed":
        os.close(fd)
        setattr(sys, name, None)
        return
    if kind == "pipe":
        reads, writes = os.pipe()
        os.close(reads)
    else:
        writes = os.open("/dev/full" if kind == "full" else path, os.O_WRONLY | os.O_CREAT)
    os.dup2(writes, fd)
    os.close(writes)
    setattr(sys, name, open(fd, "w", closefd=False, buffering=-1 if fd == 1 else 1))  # noqa: SIM115


def _main() -> None:
    cases = [Case(*found) for found in json.loads(Path(sys.argv[1]).read_text())]
    importlib.import_module("tyro")
    modules = {case.module: importlib.import_module(case.module) for case in cases}
    assert "torch" not in sys.modules, "every process that has loaded torch takes half a second more to end"
    ended = []
    gc.freeze()  # else each child copies and collects what this process has loaded
    for case in cases:
        out, err = Path("stdout.txt"), Path("stderr.txt")
        child = os.fork()
        if child == 0:
            _connect(1, case.stdout, out)
            _connect(2, case.stderr, err)
            run_main(modules[case.module].main, case.argv)  # ends as every process does
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended.append(Ended(code, *(file.read_text() if file.exists() else "" for file in (out, err))))
        for file in (out, err):
            file.unlink(missing_ok=True)
    Path(sys.argv[2]).write_text(json.dumps(ended))


if __name__ == "__main__":
    _main()
