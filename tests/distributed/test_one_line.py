"""Under torchrun a mistake that every rank sees is reported by one of them; a mistake of one rank is reported by it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

RANKS = 3


def _job(folder: Path, *flags: list[str]) -> list[tuple[int, str]]:
    """Runs ranks with the environment that torchrun gives them; returns the exit code and stderr of each."""
    processes = []
    for rank in range(RANKS):
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        env |= {"TORCHELASTIC_ERROR_FILE": str(folder / str(rank) / "error.json")}
        command = [sys.executable, "-m", "gptperf.train", *flags[rank % len(flags)]]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    return [(p.wait(), p.stderr.read()) for p in processes if p.stderr is not None and p.stderr.readable()]


def _ends(found: list[tuple[int, str]]) -> tuple[set[int], list[str]]:
    return {code for code, _ in found}, sorted(line for _, text in found for line in text.splitlines())


def test_one_rank_reports_what_all_ranks_see(tmp_path: Path) -> None:
    codes, lines = _ends(_job(tmp_path / "attempt_0", ["gpt2_124m", "--n_layer=0", "--gradient_accumulation_steps=3"]))
    assert codes == {2}
    assert len(lines) == 1
    assert lines[0].startswith("gptperf: E2: command line: n_layer: found 0")
    _, again = _ends(_job(tmp_path / "attempt_1", ["gpt2_124m", "--n_layer=0", "--gradient_accumulation_steps=3"]))
    assert again == lines  # torchrun started the job again


def test_a_rank_reports_what_it_alone_sees(tmp_path: Path) -> None:
    flags = [["--gradient_accumulation_steps=3", f"--n_layer=-{rank}"] for rank in range(RANKS)]
    codes, lines = _ends(_job(tmp_path, *flags))
    assert codes == {2}
    assert [line[: line.index(", wanted")] for line in lines] == [
        f"gptperf: E2: command line: n_layer: found {text}" for text in ("-1", "-2", "0")
    ]


@pytest.mark.slow
def test_torchrun_adds_nothing_of_ours(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launcher, "gptperf.train", "tiny", "--gradient_accumulation_steps=2", "--n_layr=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert sum("n_layr" in line for line in done.stderr.splitlines()) == 1
    assert "ChildFailedError" in done.stderr  # what GUIDE says of torchrun's own lines
