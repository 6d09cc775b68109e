"""The CPUs that this process may use, and how its OpenMP threads share them. Loads no torch."""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

__all__ = ["cgroup_folders", "cpu_quota", "set_up_threads", "usable_cpus"]


def set_up_threads(environment: MutableMapping[str, str] | None = None, processes: int | None = None) -> None:
    """Sets the OpenMP variables that the user has not set. A command calls it before it loads torch.

    There are as many threads as usable CPUs, shared by the processes of a job on this host. A thread that has nothing
    to do sleeps, after a spin of a few microseconds. PyTorch's OpenMP library, GNU's libgomp, by default makes it spin
    for milliseconds instead, which takes the CPU from the thread that it waits for, if another process is running too:
    a step of 0.1 s then takes seconds. libgomp reads these variables when it is loaded.

    Args:
        environment: where the variables are set; default: the environment of this process.
        processes: processes of the job on this host; default: what torchrun says.
    """
    environment = os.environ if environment is None else environment
    if processes is None:
        text = environment.get("LOCAL_WORLD_SIZE", "1")
        processes = int(text) if text.isdecimal() and int(text) else 1
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        # Tokens/s of configs/tiny.toml on two CPUs, alone (mean of two runs) and beside one busy process: default
        # 15,800 and no step in 45 s; no spin 13,100 and 9,070; 1,000 turns 16,100 and 7,820; 10,000 turns 16,500 and
        # 3,820.
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))


def usable_cpus(root: Path = Path("/")) -> int:
    """Returns the number of CPUs that the affinity of this process and the quotas of its cgroups allow, at least 1.

    Args:
        root: folder that has `proc` and the file systems of the cgroups.
    """
    quota = cpu_quota(root)
    allowed = len(os.sched_getaffinity(0))
    # A part of a CPU counts as a whole one: two threads under a quota of 1.5 CPUs do more than one thread.
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the smallest quota, in CPUs, of this process's cgroup and of those around it; None without a quota."""
    quotas = [quota for folder in cgroup_folders(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def cgroup_folders(root: Path = Path("/")) -> Iterator[Path]:
    """Yields the folders of the cgroups, version 1 or 2, that limit the CPU time of this process, the innermost first.

    Source: cgroups(7), proc_pid_mountinfo(5).
    """
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        for _, controllers, path in (entry for entry in own if len(entry) == 3):
            version_2 = kind == "cgroup2" and controllers == ""
            version_1 = kind == "cgroup" and "cpu" in options and "cpu" in controllers.split(",")
            if not (version_1 or version_2):
                continue
            top = root / mount[4].lstrip("/")
            # The mount shows the cgroups below its own root, mount[3], which in a container is often this cgroup.
            inside = path.removeprefix(mount[3].rstrip("/")).strip("/")
            folder = top / inside
            while folder != top and top in folder.parents:
                yield folder
                folder = folder.parent
            yield top


def _quota(folder: Path) -> float | None:
    """Returns the quota of one cgroup in CPUs, or None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        found = float(quota) / float(period)  # "max" or -1: no quota
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return found if found > 0 else None
