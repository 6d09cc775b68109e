"""Helpers for the tests of checkpoints: small checkpoints, comparisons, and kills in a forked child.

A fork has torch imported already; a new process would take longer to start than a test takes.
"""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf import checkpoint
from gptperf.checkpoint import manifest
from gptperf.files import FileRecord

Tensors = dict[str, dict[str, Tensor]]


def make_tensors(step: int) -> Tensors:
    flat = torch.arange(64, dtype=torch.float32) + step
    return {
        "model": {"w": flat[:24].view(4, 6), "b": flat[24:30]},
        "optimizer": {"m": flat[32:] * 0.1, "step": torch.tensor(step)},
    }


def put(directory: Path, step: int, **options: Any) -> Path:
    state = {"step": step, "loss": step / 7}
    return checkpoint.save(directory, step=step, tensors=make_tensors(step), state=state, **options)


def assert_equal(loaded: checkpoint.Checkpoint, step: int) -> None:
    expected = make_tensors(step)
    assert loaded.step == step
    assert loaded.state == {"step": step, "loss": step / 7}
    assert loaded.tensors.keys() == expected.keys()
    for stem, named in expected.items():
        assert_same_bits(loaded.tensors[stem], named)


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


def steps(directory: Path) -> list[int]:
    return [info.step for info in checkpoint.checkpoints(directory)]


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def in_child(work: Callable[[], None], seconds: float = 20) -> int:
    """Runs `work` in a fork and returns its exit status, which is negative for a signal."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the threads of the parent's pool do not exist in the child
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the child ran longer than {seconds} s")


def no_warning(text: str) -> None:
    raise AssertionError(text)


def reseal(path: Path, **changes: Any) -> None:
    """Writes a manifest for the files as they are: a forged checkpoint instead of a corrupt one."""
    names = sorted(name for name in os.listdir(path) if name != "MANIFEST.json")
    files = []
    for name in names:
        data = (path / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        files.append(FileRecord(name=name, bytes=len(data), sha256=digest))
    options: dict[str, Any] = {"step": int(path.name[5:]), "metric": None, "files": files} | changes
    (path / "MANIFEST.json").write_bytes(manifest.seal(**options))
