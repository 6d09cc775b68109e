"""Fixtures and hooks of all tests."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that a test starts
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it at its import, which has not happened yet

from run_helpers import SMALL

from gptperf.data.prepare import prepare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no GPU; the summary has the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clears the variables of a torchrun job that may surround the tests, and the failpoint."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GPTPERF_FAILPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small prepared data set and a small configuration."""
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).integers(97, 107, (4000, 5)).astype(np.uint8)
    text = b" ".join(bytes(row) for row in words)
    (folder / "text.txt").write_bytes(text)
    prepare(str(folder / "text.txt"), data_dir=folder / "data", name="text", quiet=True)
    (folder / "small.toml").write_text(SMALL)
    return folder
