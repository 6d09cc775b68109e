"""A rank fails, dies or hangs: the other ranks name it and end. Tested in whole runs, and by the rules of the judge."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from run_helpers import ROOT, run_argv, run_command

from gptperf.distributed.judge import LOST_S, Beat, Fault, Judge, View
from gptperf.distributed.progress import Progress
from gptperf.distributed.watchdog import Watchdog, process_state
from gptperf.errors import DataError, NonFiniteError, PeerError
from gptperf.monitor.journal import assemble

PLUGIN = """
import os, signal, time
from pathlib import Path
import torch
from gptperf.errors import NonFiniteError
from gptperf.model import RMSNorm
from gptperf.registry import register


def fail():
    Path(os.environ["FAULT_FILE"]).write_text(str(time.time()))
    kind = os.environ["FAULT"]
    if kind == "raise":
        raise NonFiniteError("the rank fell ill")
    while kind == "loop":
        pass
    if kind == "abort":
        os.abort()
    os.kill(os.getpid(), getattr(signal, kind))


class Faulty(RMSNorm):
    calls = 0

    def forward(self, x, residual=None):
        Faulty.calls += 1
        if Faulty.calls == 60 and os.environ["RANK"] == os.environ["FAULT_RANK"]:
            fail()
        return super().forward(x, residual)


register("normalization", "faulty", Faulty)
"""


class Job:
    """Ranks that share stderr; one of them meets a fault."""

    def __init__(self, corpus: Path, tmp_path: Path, fault: str, rank: int, *flags: str, ranks: int = 2):
        (tmp_path / "faulty.py").write_text(PLUGIN)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        path = os.pathsep.join(filter(None, (str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH"))))
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        env |= {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_FILE": str(tmp_path / "when")}
        flags = ("--plugins=faulty", "--normalization=faulty", "--log_interval=5", "--sample_tokens=0", *flags)
        command = run_command(corpus, tmp_path / "out", *flags)
        self.stderr, self.when = tmp_path / "stderr", tmp_path / "when"
        with open(self.stderr, "w") as file:
            self.ranks = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
                for r in range(ranks)
            ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def end_of(self, rank: int) -> tuple[int, float]:
        """Returns the exit code of a rank, and the seconds from the fault to its end."""
        code = self.ranks[rank].wait(timeout=60)
        return code, time.time() - float(self.when.read_text())

    def lines(self) -> list[str]:
        return self.stderr.read_text().splitlines()


@pytest.mark.slow
def test_nobody_is_accused_where_nothing_is_wrong(corpus: Path, tmp_path: Path) -> None:
    with Job(corpus, tmp_path, "none", 2, "--collective_timeout_s=20") as job:
        assert [process.wait(timeout=60) for process in job.ranks] == [0, 0]
        assert job.lines() == []


def stopped(out: Path) -> str:
    """Returns the reason why a run ended, from its log."""
    (journal,) = out.glob("run_*.jsonl")
    return str(assemble(journal)["summary"]["stopped"])


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rank", "ranks"), [("SIGKILL", 1, 4), ("abort", 1, 2), ("SIGKILL", 0, 4)])
def test_a_rank_that_dies_is_named(fault: str, rank: int, ranks: int, corpus: Path, tmp_path: Path) -> None:
    """By one line, whatever the number of ranks. If the store dies with rank 0, nobody can agree who prints it."""
    with Job(corpus, tmp_path, fault, rank, ranks=ranks) as job:
        others = [r for r in range(ranks) if r != rank]
        for ended, seconds in map(job.end_of, others):
            assert ended == PeerError.exit_code
            assert seconds < 10
        assert job.ranks[rank].wait(timeout=10) == {"SIGKILL": -9, "abort": -6}[fault]
        said = [line for line in job.lines() if line.startswith("gptperf: ")]
        assert len(said) == (1 if rank else len(others))
        for line in said:
            assert line.startswith(f"gptperf: E9: rank {rank} is gone: process {job.ranks[rank].pid} on ")
            assert line.count("is gone") == 1
            assert any(f"rank {r} was in all_reduce" in line for r in others)
        assert "frame #" not in job.stderr.read_text()
        assert rank == 0 or stopped(tmp_path / "out").startswith("E9: rank 1 is gone: process ")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGSTOP", "loop"])
def test_a_rank_that_hangs_is_named_after_the_timeout(fault: str, corpus: Path, tmp_path: Path) -> None:
    with Job(corpus, tmp_path, fault, 1, "--collective_timeout_s=2") as job:
        ended, seconds = job.end_of(0)
        assert ended == PeerError.exit_code
        assert 1 <= seconds < 2 + 4
        (line,) = job.lines()
        assert line.startswith("gptperf: E9: rank 1 did not arrive: ")
        if fault == "loop":
            assert "rank 0 has waited 2 s in all_reduce of the gradients (iteration 6), process " in line
            assert "is in iteration 6;" in line
            assert job.ranks[1].wait(timeout=5) == PeerError.exit_code
            assert "in fail" in (tmp_path / "out" / "stacks_rank1.txt").read_text()
        else:
            assert job.ranks[1].wait(timeout=5) == -signal.SIGKILL  # torchrun would wait 30 s for it
        assert "finish_gradients" in (tmp_path / "out" / "stacks_rank0.txt").read_text()


@pytest.mark.slow
def test_the_error_of_a_rank_comes_first(corpus: Path, tmp_path: Path) -> None:
    with Job(corpus, tmp_path, "raise", 1) as job:
        ended, seconds = job.end_of(0)
        assert (ended, job.ranks[1].wait(timeout=10)) == (PeerError.exit_code, NonFiniteError.exit_code)
        assert seconds < 10
        peer = "E9: rank 1 failed: E5: the rank fell ill; rank 0 was in all_reduce of the gradients (iteration 6)"
        assert job.lines() == ["gptperf: E5: the rank fell ill", f"gptperf: {peer}"]
        assert stopped(tmp_path / "out") == "E9: rank 1 failed: E5: the rank fell ill"


@pytest.mark.slow
def test_the_error_of_the_main_process_is_in_the_log(corpus: Path, tmp_path: Path) -> None:
    with Job(corpus, tmp_path, "raise", 0) as job:
        assert job.ranks[0].wait(timeout=60) == NonFiniteError.exit_code
        assert stopped(tmp_path / "out") == "E5: the rank fell ill"


@pytest.mark.slow
def test_torchrun_shows_the_error_first(corpus: Path, tmp_path: Path) -> None:
    """And an error that every rank meets is said once, with its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = run_command(corpus, tmp_path, "--dataset=nothing", launcher=launcher)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = [line for line in done.stderr.splitlines() if line.startswith("gptperf: ")]
    assert said[0].startswith("gptperf: E3: ")
    assert sum(line.startswith("gptperf: E3: ") for line in said) == 1
    assert "exitcode  : 3" in done.stderr
    assert "exitcode  : 9" not in done.stderr


def beat(beats: int, places: int, waiting: str = "", **other: Any) -> Beat:
    base = Beat(beats, places, waiting or "iteration 2", bool(waiting), True, False, 7, "", "host", "here")
    return base._replace(**other)


class Clock:
    """Feeds a judge with views, one for each half second."""

    def __init__(self, timeout_s: float = 20.0, world_size: int = 2):
        self.judge = Judge(0, world_size, timeout_s)
        self.number, self.seconds = 0, 0.0

    def until_fault(self, *beats: Beat, moving: tuple[int, ...] = (), limit_s: float = 60, **view: Any) -> Fault | None:
        """Returns the first fault when ranks beat but, except `moving`, pass no place; a rank with beat 0 is silent."""
        self.seconds = 0.0
        while self.seconds < limit_s:
            self.number += 1
            now = {r: b._replace(beats=b.beats and self.number) for r, b in enumerate(beats)}
            now |= {r: now[r]._replace(places=self.number) for r in moving}
            self.judge.tick(View(self.number, now, **view), 0.5)
            self.seconds += 0.5
            fault = self.judge.fault()
            if fault is not None:
                return fault
        return None


def test_the_rank_that_is_behind_is_accused() -> None:
    clock = Clock()
    fault = clock.until_fault(beat(1, 9, "all_reduce"), beat(1, 8))
    assert fault is not None
    assert fault.ranks == (1,)
    assert fault.hang
    assert fault.text.startswith(
        "rank 1 did not arrive: rank 0 has waited 20 s in all_reduce, process 7 on host is in "
    )
    assert 20 <= clock.seconds <= 21
    three = Clock(world_size=3).until_fault(beat(1, 9, "barrier"), beat(1, 8), beat(1, 9, "barrier"))
    assert three is not None
    assert three.ranks == (1,)


def test_work_is_no_hang() -> None:
    assert Clock().until_fault(beat(1, 9, "all_reduce"), beat(1, 0), moving=(1,)) is None
    assert Clock().until_fault(beat(1, 9, limited=False), beat(1, 9, limited=False)) is None  # both compile
    assert Clock().until_fault(beat(1, 9), beat(1, 12, done=True)) is None  # the last one writes its summary


def test_the_last_one_is_named_where_nobody_is_seen_waiting() -> None:
    fault = Clock().until_fault(beat(1, 9), beat(1, 8))
    assert fault is not None
    assert fault.hang
    assert fault.text.startswith("rank 1 did not arrive: no rank has moved for 20 s, process ")
    assert Clock().until_fault(beat(1, 9), beat(1, 8), moving=(0,)) is None
    assert Clock().until_fault(beat(1, 9), beat(1, 8, limited=False)) is None


def test_all_in_one_place_name_nobody() -> None:
    for waiting in ("barrier", ""):
        fault = Clock().until_fault(beat(1, 9, waiting), beat(1, 9, waiting))
        assert fault is not None
        assert fault.ranks == ()
        assert fault.text == f"no rank has moved for 20 s: all are in {waiting or 'iteration 2'}"


def test_a_rank_that_ended_is_named_by_who_waits_for_it() -> None:
    fault = Clock().until_fault(beat(1, 9, "barrier"), beat(1, 12, done=True))
    assert fault is not None
    assert fault.text == "rank 1 has ended: rank 0 has waited 20 s in barrier"


def test_silence_is_death_on_another_host_only() -> None:
    clock = Clock()
    fault = clock.until_fault(beat(1, 9), beat(0, 8))
    assert fault is not None
    assert "rank 1 is gone: process 7 on host has said nothing for 5 s" in fault.text
    assert LOST_S <= clock.seconds <= LOST_S + 1
    alive = Clock().until_fault(beat(1, 9), beat(0, 8), states={1: "alive"})
    assert alive is not None
    assert alive.text.startswith("rank 1 did not arrive: no rank has moved for 20 s")  # after the timeout
    assert Clock().until_fault(beat(1, 9), beat(0, 8, done=True)) is None
    dead = Clock().until_fault(beat(1, 9), beat(1, 8), states={1: "gone"})
    assert dead is not None
    assert dead.text.startswith("rank 1 is gone: process 7 on host died")


def test_an_error_of_a_rank_leaves_the_others_time_to_meet_it() -> None:
    clock = Clock()
    failed = Fault((1,), "rank 1 failed: E5: x")
    assert clock.until_fault(beat(1, 9), beat(1, 8), failed=failed) == failed
    assert clock.seconds == 2.5
    dead = Clock(world_size=3).until_fault(beat(1, 9), beat(1, 8), beat(1, 9), states={1: "gone"})
    assert dead is not None
    clock = Clock(world_size=3)
    assert clock.until_fault(beat(1, 9), beat(1, 8), beat(1, 9), failed=dead) == dead  # the dead meet nothing
    assert clock.seconds <= 0.5


def test_the_store_gone_or_silent() -> None:
    judge, here = Judge(0, 2, 20.0), {0: beat(1, 9), 1: beat(1, 9)}
    judge.tick(View(1, here), 0.5)
    for _ in range(round(2 * LOST_S)):
        assert judge.fault() is None
        judge.tick(View(1, here), 0.5)
    fault = judge.fault()
    assert fault is not None
    assert "host of the job's store is gone" in fault.text
    judge.tick(View(1, here, {1: "gone"}, lost=True), 0.0)
    named = judge.fault()
    assert named is not None
    assert named.ranks == (1,)
    three = Clock(world_size=3)
    three.judge.rank = 1
    dead = three.until_fault(beat(1, 9), beat(1, 9), beat(1, 9), states={0: "gone", 2: "gone"}, lost=True)
    assert dead is not None
    assert dead.ranks == (0,)  # rank 2 may have ended because of that


def test_states_of_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert process_state(child.pid, started) == "alive"
        assert process_state(child.pid, "1") == "gone"  # another process with its id
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        assert process_state(child.pid, started) == "stopped"
        child.kill()
        time.sleep(0.2)
        assert process_state(child.pid, started) == "gone"  # a zombie
    assert process_state(child.pid, started) == "gone"


def _rank(store: dist.Store, rank: int, error: Exception | None, results: dict[int, Any]) -> None:
    try:
        with Watchdog(rank, 2, Progress(), timeout_s=20.0, store=store, end=lambda code: results.update({rank: code})):
            time.sleep(0.3)
            if error is not None:
                raise error
            results[rank] = "done"
            time.sleep(4)
    except SystemExit as ended:
        results[rank] = ended.code


def _two(*errors: Exception | None) -> dict[int, Any]:
    store, results = dist.HashStore(), dict[int, Any]()
    threads = [threading.Thread(target=_rank, args=(store, rank, error, results)) for rank, error in enumerate(errors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
def test_one_error_of_every_rank_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert _two(NonFiniteError("lost"), NonFiniteError("lost")) == {0: 5, 1: 5}
    assert capsys.readouterr().err == "gptperf: E5: lost\n"
    assert _two(NonFiniteError("lost"), DataError("torn")) == {0: 5, 1: 3}
    assert sorted(capsys.readouterr().err.splitlines()) == ["gptperf: E3: torn", "gptperf: E5: lost"]


@pytest.mark.slow
def test_the_others_hear_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert _two(None, NonFiniteError("torn\nhere")) == {0: 9, 1: 5}
    assert capsys.readouterr().err == (
        "gptperf: E5: torn\nhere\ngptperf: E9: rank 1 failed: E5: torn; rank 0 was in start\n"
    )


@pytest.mark.slow
def test_a_mistake_that_one_rank_sees_is_said_by_that_rank_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It ends all ranks with its code, also those that raise it because that rank has it."""
    assert _two(None, DataError("torn")) == {0: 3, 1: 3}
    assert capsys.readouterr().err == "gptperf: E3: torn\n"
    assert _two(DataError("rank 1: torn"), DataError("torn")) == {0: 3, 1: 3}
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_a_bug_shows_its_stack_in_its_own_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert _two(None, ValueError("a bug")) == {0: 9, 1: 1}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2:] == ["ValueError: a bug", "gptperf: E9: rank 1 failed: ValueError: a bug; rank 0 was in start"]


def test_one_process_has_no_watchdog() -> None:
    before = threading.active_count()
    with Watchdog(0, 1, Progress(), timeout_s=1.0):
        assert threading.active_count() == before
    with pytest.raises(DataError), Watchdog(0, 1, Progress(), timeout_s=1.0):
        raise DataError("passes through")


def test_where_a_process_is() -> None:
    progress = Progress()
    progress.start_iteration(3)
    assert (progress.where, progress.limited) == ("iteration 3", False)  # the first one compiles
    progress.start_iteration(4)
    with progress.during("save"), progress.collective("barrier"):
        assert (progress.where, progress.limited) == ("barrier (save after iteration 4)", False)
    assert (progress.where, progress.limited) == ("iteration 4", True)
    with pytest.raises(RuntimeError), progress.collective("all_reduce"):
        raise RuntimeError("gloo")
    assert progress.where == "all_reduce (iteration 4)"


def test_the_timeout_is_a_key(corpus: Path, tmp_path: Path) -> None:
    from gptperf.config import command_line

    argv = run_argv(corpus, tmp_path)
    assert command_line.resolve(argv).config.system.collective_timeout_s == 600.0
    assert command_line.resolve([*argv, "--collective_timeout_s=5"]).config.system.collective_timeout_s == 5.0
