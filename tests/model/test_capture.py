"""Capturing a CUDA graph, with a stand-in for the GPU: what is undone when a capture fails."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptperf.model.capture import capturing


class FakeGpu:
    """The parts of torch.cuda that a capture calls. It refuses to end a capture after an error, as CUDA does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, first_ends: bool = False):
        self.first_ends = first_ends
        """Whether the allocator has left the capture when its end fails, as from PyTorch 2.12 on."""
        self.current: Any = "default"
        self.to_pool: set[Any] = set()
        self.workspaces: set[Any] = {"default", "side"}
        self.generator = SimpleNamespace(
            counts=False,
            clone_state=lambda: SimpleNamespace(counts=False),
            graphsafe_set_state=lambda other: vars(self.generator).update(counts=other.counts),
        )
        self.stream: Any = SimpleNamespace(device=torch.device("cuda", 0))
        self.collected: list[bool] = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        monkeypatch.setattr(torch.cuda, "default_generators", (self.generator,))
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.workspaces.clear, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end)

    @contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.current, self.generator.counts = stream, True
        self.to_pool.add(pool)
        try:
            yield
        except torch.OutOfMemoryError:
            self._ended(pool)
            raise
        except RuntimeError:  # the end of the capture fails too, so that nothing is undone
            if self.first_ends:
                self.to_pool.discard(pool)
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self._ended(pool)

    def _ended(self, pool: Any) -> None:
        self.current, self.generator.counts = "default", False
        self.to_pool.discard(pool)

    def _end(self, device: int, pool: Any) -> None:
        if pool not in self.to_pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.to_pool.discard(pool)

    def capture(self, error: Exception | None = None) -> None:
        graph: Any = None
        with capturing(graph, self.stream, "pool"):
            assert not self.workspaces  # so that cuBLAS gets one of the graph's pool
            self.workspaces.add("pool")
            self.collected.append(gc.isenabled())
            if error is not None:
                raise error


@pytest.mark.parametrize("first_ends", [False, True])
@pytest.mark.parametrize(
    "error", [None, torch.OutOfMemoryError("no memory"), RuntimeError("not permitted when stream is capturing")]
)
def test_after_a_capture_everything_is_as_before(
    error: Exception | None, first_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, first_ends=first_ends)
    if error is None:
        gpu.capture()
    else:
        with pytest.raises(type(error), match=str(error)):  # not what followed from it
            gpu.capture(error)
    assert gpu.current == "default"
    assert not gpu.to_pool
    assert not gpu.generator.counts
    assert not gpu.workspaces
    assert gpu.collected == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_capture_that_fails_keeps_no_memory(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the body has computed is freed with the error, not by a later garbage collection: memory may be short."""
    gpu, left = FakeGpu(monkeypatch), list[Any]()
    graph: Any = None

    def body() -> None:
        activations = torch.zeros(1)
        left.append(weakref.ref(activations))
        raise kind("no memory")

    gc.disable()
    try:
        with contextlib.suppress(kind), capturing(graph, gpu.stream, "pool"):
            body()
        assert left[0]() is None
    finally:
        gc.enable()


def test_the_generator_of_other_graphs_stays_after_an_error_that_the_capture_survives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(gpu.generator, "graphsafe_set_state", lambda other: pytest.fail("replaced"))
    with pytest.raises(torch.OutOfMemoryError):
        gpu.capture(torch.OutOfMemoryError("no memory"))


def test_a_disabled_collector_stays_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gc.disable()
    try:
        gpu.capture()
        assert not gc.isenabled()
    finally:
        gc.enable()
