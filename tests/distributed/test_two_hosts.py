"""Training over two hosts: a host that is lost, and the SLURM script.

A host here is a network namespace with a name and an address of its own; a folder of this machine is the file system
that they share.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import ROOT, run, run_argv, run_log

from gptperf.config import command_line
from gptperf.errors import PREEMPTED

NAMES = (f"gptperf{os.getpid()}a", f"gptperf{os.getpid()}b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# What enters a host; its arguments are the name, the file in place of /etc/hosts, and the command. torchrun waits for a
# rendezvous that is gone as long as TCP repeats itself: 3 times here, by default 15, in as many minutes.
ENTER = """
    echo 3 > /proc/sys/net/ipv4/tcp_retries2 && hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"
"""

SLOW = """
import os, time
from gptperf import checkpoint
from gptperf.model import RMSNorm
from gptperf.registry import register
seconds = float(os.environ.get("SLOW_S", 0))
class Slow(RMSNorm):
    def forward(self, x, residual=None):
        time.sleep(seconds)
        return super().forward(x, residual)
register("normalization", "slow", Slow)
save = checkpoint.save
def slow_save(*args, **keys):
    time.sleep(50 * seconds)
    return save(*args, **keys)
checkpoint.save = slow_save
"""


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Two hosts and the cable between them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.etc_hosts = folder / "etc_hosts"
        self.processes: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        """Makes the two hosts.

        Raises:
            OSError: this machine does not allow it.
        """
        lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
        self.etc_hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            self.plug(name, "up")
            if self.start(name, ["true"]).wait(10):
                raise OSError(f"unshare --uts --mount: {self.output()}")

    def close(self) -> None:
        for name in NAMES:
            self.kill(name)
            ip("netns", "delete", name, check=False)
        for process in self.processes:
            process.wait(10)

    def plug(self, name: str, state: str) -> None:
        """Sets a host's end of the cable up or down."""
        ip("-n", name, "link", "set", "eth0", state)

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", name, check=False).split()]

    def kill(self, name: str) -> None:
        """Kills all processes of a host."""
        for pid in self.pids(name):
            os.kill(pid, signal.SIGKILL)

    def start(self, name: str, command: list[str], **env: str) -> subprocess.Popen[str]:
        """Starts a command on a host; its output goes to a file."""
        enter = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", name]
        env |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.folder}:{ROOT}"}
        with (self.folder / f"{name}.{len(self.processes)}.txt").open("w") as file:
            process = subprocess.Popen(
                [*enter, str(self.etc_hosts), *command],
                env=os.environ | env,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.processes.append(process)
        return process

    def torchrun(self, command: list[str], **env: str) -> list[subprocess.Popen[str]]:
        """Starts one process on each host; the rendezvous is on the first host."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={NAMES[0]}:29400", f"--rdzv_id={len(self.processes)}"]
        return [self.start(name, [*launcher, "--max_restarts=0", "-m", *command], **env) for name in NAMES]

    def output(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("gptperf*.txt")))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts; skips where they cannot be made."""
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        pytest.skip(f"two hosts need network namespaces; not installed: {', '.join(missing)}")
    made = Hosts(tmp_path)
    try:
        try:
            made.open()
        except OSError as error:
            pytest.skip(f"two hosts need network namespaces: {error}")
        yield made
    finally:
        made.close()


def wait_until(condition: Callable[[], object], seconds: float, output: Callable[[], str]) -> None:
    """Waits until the condition holds; fails with the processes' output after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, output()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_lost_host_ends_the_run_and_resume_goes_on(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    flags = ["--gradient_accumulation_steps=2"]
    assert run(corpus, tmp_path / "one", *flags) == 0
    out = tmp_path / "two"
    flags += ["--plugins=slow", "--normalization=slow", "--collective_timeout_s=8"]
    command = ["gptperf.train", *run_argv(corpus, out, *flags)]

    # The second host is off the network without a word: the first one waits for collective_timeout_s.
    first, _ = hosts.torchrun(command, SLOW_S="0.02")
    wait_until((out / "checkpoints" / "step-00000005").is_dir, 40, hosts.output)
    hosts.plug(NAMES[1], "down")
    hosts.kill(NAMES[1])
    wait_until(lambda: first.poll() is not None, 20, hosts.output)
    assert first.returncode != 0
    assert hosts.pids(NAMES[0]) == []
    hosts.plug(NAMES[1], "up")

    # The first one, which has the rendezvous and the journal, likewise.
    _, second = hosts.torchrun([*command, "--init_from=resume"], SLOW_S="0.02")
    wait_until((out / "checkpoints" / "step-00000010").is_dir, 40, hosts.output)
    hosts.plug(NAMES[0], "down")
    hosts.kill(NAMES[0])
    wait_until(lambda: second.poll() is not None, 20, hosts.output)
    assert second.returncode != 0
    assert hosts.pids(NAMES[1]) == []
    hosts.plug(NAMES[0], "up")
    assert not (out / "checkpoints" / "step-00000020").exists()

    for process in hosts.torchrun([*command, "--init_from=resume"]):
        assert process.wait(40) == 0, hosts.output()
    assert re.findall(r"resumed from .*-(\d+) at iteration", hosts.output()) == ["00000005", "00000010"]
    one, two = run_log(tmp_path / "one"), run_log(out)
    assert [entry["iter"] for entry in two["training_iterations"]] == list(range(1, 21))
    for a, b in zip(one["training_iterations"], two["training_iterations"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert two["startup_info"]["parallelism"] == "DDP over 2 processes"


SLURM = ROOT / "configs" / "slurm" / "train.sh"

COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nlocalhost\\n"; else echo "$@" >> scontrol.txt; fi',
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        "$@" & tasks=($!)
        "$@" & tasks+=($!)
        trap 'kill -USR1 "${tasks[@]}"' USR1
        worst=0
        for task in "${tasks[@]}"; do
            while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
            worst=$((code > worst ? code : worst))
        done
        exit "$worst" """,
    "python": f'exec {sys.executable} "$@"',
}


@pytest.mark.slow
def test_slurm_script_is_one_that_bash_and_gptperf_read() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    flags = re.findall(r"--init_from=\w+", text)
    assert command_line.resolve(flags).config.train.init_from == "auto"
    example = re.search(r"sbatch .*configs/slurm/train\.sh (.*)$", text, re.MULTILINE)
    assert example is not None
    shown = example[1].replace("CONFIG.toml", "configs/llama_1.36b.toml").replace("[--key=value ...]", "")
    assert command_line.resolve(shown.split(), world_size=16).config.train.out_dir == "SHARED"
    launched = set(re.findall(r" --(\w+)=", text[text.index("exec python") : text.index("-m gptperf.train")]))
    options = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert [name for name in launched if f"--{name}" not in options] == []
    assert launched >= {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}


@pytest.mark.slow
def test_slurm_job_saves_at_its_limit_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Two nodes of two processes, with commands in place of SLURM's that do what those do."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "2"}
    env |= {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    flags = ["--plugins=slow", "--normalization=slow", "--save_interval=1000"]
    command = ["bash", str(SLURM), *run_argv(corpus, tmp_path / "out", *flags)]
    log = tmp_path / "slurm.txt"

    def start(slow_s: str) -> subprocess.Popen[bytes]:
        with log.open("w") as file:
            keys = {"cwd": tmp_path, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            return subprocess.Popen(command, env=env | {"SLOW_S": slow_s}, **keys)

    job = start("0.04")
    try:
        wait_until(lambda: " Iter      3" in log.read_text() or job.poll() is not None, 40, log.read_text)
        job.send_signal(signal.SIGTERM)
        assert job.wait(40) == PREEMPTED, log.read_text()
        assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
        (saved,) = (tmp_path / "out" / "checkpoints").glob("step-*")
        assert f"asked to stop: iteration {int(saved.name[5:])} is saved" in log.read_text()

        job = start("0")
        assert job.wait(40) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert f"resumed from {saved} at iteration {int(saved.name[5:])}" in log.read_text()
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1
    assert [entry["iter"] for entry in run_log(tmp_path / "out")["training_iterations"]] == list(range(1, 21))
