"""A job of two ranks as forked processes, which start sooner than with torchrun."""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def _rank(rank: int, port: int, work: Callable[[], int], out: Path) -> None:
    code = 1
    try:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in where.items()})
        with (out / f"rank{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
            code = work()
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def on_two_ranks(work: Callable[[], int], out: Path) -> list[str]:
    """Runs the same work on two ranks, and returns what each one printed.

    Args:
        work: starts a process of the job, and returns an exit code, which has to be 0.
        out: folder for the output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, work, out)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return [(out / f"rank{rank}.txt").read_text() for rank in (0, 1)]
