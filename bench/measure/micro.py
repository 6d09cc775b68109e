"""Measures host-side code with pytest-benchmark: `python -m pytest bench/measure/micro.py`. Not part of the tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure.loader import write_random_dataset
from gptperf import checkpoint
from gptperf.config import command_line
from gptperf.data.loader import Loader
from gptperf.data.order import BatchOrder
from gptperf.data.shards import TokenSource
from gptperf.ops import resolve_ops


def test_loader_batch(benchmark: Any, tmp_path: Path) -> None:
    """Measures a batch of 16 x 1024 tokens from the loader."""
    data = write_random_dataset(tmp_path / "random", tokens=2_000_000, dtype="uint16")
    with (
        TokenSource.open(data, "train") as source,
        Loader(source, block_size=1024, batch_size=16, micro_batches=8, seed=1) as loader,
    ):
        batch = benchmark(next, loader)
    assert batch.shape == (2, 16, 1024)


def test_loader_order(benchmark: Any) -> None:
    """Measures the computation of the offsets of the 16 samples of a batch."""
    order = BatchOrder(10_000_000_000, 1024, seed=1)
    offsets = benchmark(order.offsets, np.arange(16))
    assert offsets.shape == (16,)


def test_config_resolve(benchmark: Any) -> None:
    """Measures how long a file and two flags take to be resolved and checked."""
    resolved = benchmark(command_line.resolve, ["configs/llama_1.36b.toml", "--batch_size=16", "--compile=False"])
    assert resolved.config.train.batch_size == 16


def test_dispatch_resolve_ops(benchmark: Any) -> None:
    """Measures the choice of every op's implementation, which a run makes once."""
    assert benchmark(resolve_ops, "eager", "cpu").chosen["rms_norm"] == "eager"


def test_dispatch_rms_norm(benchmark: Any) -> None:
    """Measures a call of an op through the registry: eager, 8 rows of 768, on the CPU."""
    ops = resolve_ops("eager", "cpu")
    x, weight = torch.randn(8, 768), torch.ones(768)
    assert benchmark(ops.rms_norm, x, weight).shape == (8, 768)


_TENSORS = 8
_ELEMENTS = 1_000_000


def _tensors() -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {f"weight_{i}": torch.randn(_ELEMENTS) for i in range(_TENSORS)}}


def test_checkpoint_save(benchmark: Any, tmp_path: Path) -> None:
    """Measures a save of 32 MB of float32, synced to the disk that holds the temporary files."""
    tensors = _tensors()
    path = benchmark(checkpoint.save, tmp_path, step=1, tensors=tensors, state={})
    assert path.is_dir()


def test_checkpoint_load(benchmark: Any, tmp_path: Path) -> None:
    """Measures how long the checkpoint of `test_checkpoint_save` takes to be read, with every hash checked."""
    path = checkpoint.save(tmp_path, step=1, tensors=_tensors(), state={})
    assert len(benchmark(checkpoint.load, path).tensors["model"]) == _TENSORS
