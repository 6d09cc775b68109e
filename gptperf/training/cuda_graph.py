"""CUDA graphs of a training step: the launches of a micro-batch or of an update, recorded once and replayed.

A small model works a few milliseconds per step on the GPU, and Python needs longer than that to launch its kernels. A
replay launches all of them at once. These parts of a step are recorded, each as a graph of its own:

- a micro-batch: forward, backward, and the addition of its gradients to the buckets. The first micro-batch of a step
  overwrites the gradients of the last step and the last one finishes the buckets, so each has its own graph;
- the update: gradient norm, clipping, optimizer; a watched step has its own graph;
- the forward pass of an evaluation.

A replay repeats launches and nothing else. So whatever varies is in static memory on the device, written before the
replay: tokens, learning rate, loss scale, and the seed and offset of the random numbers, which PyTorch writes. Python
does not run either, so `run` gives the buckets the state that Python left after the recording. Communication is not
recorded: ranks count its barriers on the host, and replays would not.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from gptperf.config import Config
from gptperf.distributed.replicated import Replicated
from gptperf.errors import DeviceError
from gptperf.model.capture import capturing
from gptperf.plan.host_time import graph_problem

__all__ = ["CudaGraphs", "check_graphs"]

_WARM_UPS = 2  # the first call compiles, the second one has its final kernels and workspaces


def check_graphs(config: Config, device_type: str) -> str | None:
    """Returns why this run cannot use CUDA graphs, or None; see `graph_problem`.

    Raises:
        DeviceError: it cannot use them, and they were asked for.
    """
    problem = graph_problem(config, device_type)
    if problem is not None and config.system.cuda_graph is True:
        raise DeviceError(f"cuda_graph = True: {problem}; nearest: --cuda_graph=auto, which runs without")
    return problem


class CudaGraphs:
    """Runs functions, and after a few calls replays what they launched.

    Args:
        weights: the buckets, whose bookkeeping on the host follows the replays.
        must: whether a function that cannot be recorded is an error; otherwise it runs as it is from then on.
        warn: called with the reason why nothing is recorded any more.
    """

    def __init__(self, weights: Replicated, *, must: bool, warn: Callable[[str], object]):
        self.weights, self.must, self.warn = weights, must, warn
        self.enabled, self._paused = True, False
        self.replays = 0
        self._stream = torch.cuda.Stream()
        self._batch: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any, Any]] = {}
        # Graphs replay one after the other, so that they can share the memory of their intermediate results.
        self._pool: Any = None

    def drop(self) -> None:
        """Frees all graphs and their memory. Functions are recorded again after some calls."""
        self._forget()
        torch.cuda.empty_cache()

    @property
    def recorded(self) -> list[Hashable]:
        """Keys of the functions that are replayed now."""
        return list(self._recorded)

    def pause(self, paused: bool) -> None:
        """Stops or resumes the use of graphs. A pause frees them."""
        if paused and not self._paused:
            self.drop()
        self._paused = paused

    def static(self, batch: Tensor) -> Tensor:
        """Copies a batch to the memory from which the graphs read it, and returns that memory.

        Args:
            batch: `(2, B, T)` int64 on the host; every call has the same shape.
        """
        if self._batch is None or self._batch.shape != batch.shape:
            self._batch = torch.empty_like(batch, device=self._stream.device)
            self.drop()
        return self._batch.copy_(batch, non_blocking=True)

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """Runs a function, or replays it.

        Args:
            key: identifies what the function launches. It must launch the same kernels on the same memory in each call.
            function: launches kernels; does not wait for the device.

        Returns:
            The tensors that the function returned. The next replay overwrites them.

        Raises:
            DeviceError: the function cannot be recorded, and `must` is set.
        """
        if not self.enabled or self._paused:
            return function()
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= _WARM_UPS:
                return self._on_side_stream(function)
            before = self.weights.bookkeeping()
            problem = self._record(key, function)
            if problem is not None:
                self.weights.set_bookkeeping(before)
                self._give_up(problem)
                return function()
        graph, results, after = self._recorded[key]
        graph.replay()
        self.replays += 1
        self.weights.set_bookkeeping(after)
        return results

    def _on_side_stream(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the stream that records: cuBLAS has a workspace per stream, autograd a stream per node."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = function()
        current.wait_stream(self._stream)
        return results

    def _record(self, key: Hashable, function: Callable[[], Any]) -> str | None:
        """Records a function without running its kernels. Returns why it cannot be recorded, or None."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with capturing(graph, self._stream, self._pool):
                results = function()
        except torch.OutOfMemoryError:
            return "the GPU has no memory for CUDA graphs"
        except RuntimeError as error:
            return f"a CUDA graph cannot record this model: {str(error).splitlines()[0]}"
        if any(bucket.arrived for bucket in self.weights.buckets):
            return "the model has parameters without a gradient, which CUDA graphs do not support"
        self._recorded[key] = graph, results, self.weights.bookkeeping()
        return None

    def _give_up(self, problem: str) -> None:
        self.enabled = False
        self.drop()
        if self.must:
            raise DeviceError(f"cuda_graph = True: {problem}; nearest: --cuda_graph=auto, which runs without")
        self.warn(f"cuda_graph: {problem}; the run goes on without graphs")
