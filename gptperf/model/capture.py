"""Captures CUDA graphs whose replays read no memory of others, and undoes a capture that fails."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["capturing"]


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Captures the kernels that the body launches, without running them.

    Args:
        graph: the graph.
        stream: a stream that the body has run on before, so that nothing is compiled or set up during the capture.
        pool: a handle of `torch.cuda.graph_pool_handle`. Graphs that share it may overwrite each other's memory.

    Raises:
        RuntimeError: the first error of the body, or that of the end of the capture.
    """
    failed = None
    try:
        # The error mode lets the threads that load and save go on.
        with _apart(stream.device), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            try:
                yield
            except RuntimeError as error:
                failed = error
                raise
    except RuntimeError as error:
        if error is not failed:  # CUDA ended the capture when the body called what is not permitted in one
            _end(stream.device.index, pool)
            # Its frames refer to the first error, and that one to the frames of the body: a cycle that would keep all
            # tensors of the body until a garbage collection.
            error.__traceback__ = None
        raise failed or error from None


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Keeps a capture in the body apart from everything else.

    PyTorch has a workspace of cuBLAS for each stream, and frees all of them when torch.compile records CUDA graphs of
    its own. A captured kernel has the address of a workspace, but keeps it from nobody: a replay would write to memory
    that has another use by then. So no workspace is there when the capture begins, and cuBLAS gets one in the graph's
    pool; and none of the pool is left when the capture has ended.
    """
    current, collects = torch.cuda.current_stream(device), gc.isenabled()
    gc.disable()  # it might free another graph or a module, which is not permitted during a capture
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own stream if the end of the capture fails
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()


def _end(device: int, pool: Any) -> None:
    """Undoes what PyTorch leaves after a capture that CUDA has ended with an error."""
    # The allocator would keep freed memory until the capture ends. From PyTorch 2.12 on it has ended for the allocator.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
    # The generator would refuse to draw outside of a capture. Its copy counts no capture.
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
