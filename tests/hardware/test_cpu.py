"""The CPUs that a process may use, on simulated file systems, and the variables of the OpenMP threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptperf.hardware.cpu import cpu_quota, set_up_threads, usable_cpus

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "31 23 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "32 23 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHER = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,cpu\n"


def machine(root: Path, cgroup: str, mounts: str, quotas: dict[str, str]) -> Path:
    """Makes the file systems that a process in a cgroup sees; `quotas` are "QUOTA PERIOD" by folder."""
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER + mounts}
    for folder, quota in quotas.items():
        if "cpu,cpuacct" in folder:
            limit, period = quota.split()
            files |= {f"{folder}/cpu.cfs_quota_us": f"{limit}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}
        else:
            files[f"{folder}/cpu.max"] = f"{quota}\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2_TOP, V1_TOP = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "quotas", "wanted"),
    [
        ("0::/\n", V2.format(root="/"), {V2_TOP: "150000 100000"}, 1.5),
        ("0::/\n", V2.format(root="/"), {V2_TOP: "max 100000"}, None),
        ("0::/a/b\n", V2.format(root="/"), {f"{V2_TOP}/a/b": "max 100000", f"{V2_TOP}/a": "200000 100000"}, 2.0),
        ("0::/a/b\n", V2.format(root="/"), {f"{V2_TOP}/a/b": "50000 100000", f"{V2_TOP}/a": "200000 100000"}, 0.5),
        ("0::/a\n", V2.format(root="/"), {f"{V2_TOP}/another": "50000 100000"}, None),
        # A container that sees the names of its host: the mount shows its own cgroup as the top.
        ("0::/docker/12ab\n", V2.format(root="/docker/12ab"), {V2_TOP: "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/a\n3:memory:/m\n", V1.format(root="/"), {f"{V1_TOP}/a": "100000 50000"}, 2.0),
        ("4:cpu,cpuacct:/a\n", V1.format(root="/"), {f"{V1_TOP}/a": "-1 100000", V1_TOP: "100000 100000"}, 1.0),
        ("4:cpu,cpuacct:/d/1\n", V1.format(root="/d/1"), {V1_TOP: "400000 100000"}, 4.0),
        ("4:cpu,cpuacct:/a\n0::/\n", V1.format(root="/") + V2.format(root="/"), {V1_TOP: "100000 100000"}, 1.0),
        ("0::/../../c\n", V2.format(root="/"), {V2_TOP: "broken"}, None),
        ("", "", {}, None),
    ],
)
def test_the_quota_of_a_cgroup_and_of_those_around_it(
    tmp_path: Path, cgroup: str, mounts: str, quotas: dict[str, str], wanted: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, cgroup, mounts, quotas)) == wanted


def test_affinity_and_quota_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, cpus in (("250000", 3), ("max", 8), ("9900000", 8), ("1000", 1)):
        machine(tmp_path, "0::/\n", V2.format(root="/"), {V2_TOP: f"{quota} 100000"})
        assert usable_cpus(tmp_path) == cpus
    assert usable_cpus(tmp_path / "no proc") == 8


def test_threads_share_the_cpus_and_the_users_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptperf.hardware.cpu.usable_cpus", lambda: 8)
    for given, threads in (({}, "8"), ({"LOCAL_WORLD_SIZE": "3"}, "2"), ({"LOCAL_WORLD_SIZE": "99"}, "1")):
        environment = dict(given)
        set_up_threads(environment)
        passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
        assert environment == given | passive | {"OMP_NUM_THREADS": threads}
    environment = {}
    set_up_threads(environment, processes=4)
    assert environment["OMP_NUM_THREADS"] == "2"
    users = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    environment = dict(users)
    set_up_threads(environment)
    assert environment == users


@pytest.mark.parametrize("command", ["train", "sample", "doctor"])
def test_commands_set_their_threads_before_torch(command: str) -> None:
    """The OpenMP library reads the variables when it is loaded, and an import changes nothing of the machine."""
    code = f"""
import os, sys
from gptperf import {command} as module
assert "OMP_WAIT_POLICY" not in os.environ
class Torch:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch)
sys.argv[1:] = {{"sample": ["/nowhere"], "train": ["tiny"], "doctor": []}}["{command}"]
module.main()
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PASSIVE", str(usable_cpus())], done.stderr
