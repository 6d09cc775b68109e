"""Writes checkpoints while training continues.

A save has two phases. In the copy phase, the main thread copies the state of this step to host memory, and training
waits for it. In the write phase, a thread writes the copies to disk, together with the threads of the other ranks,
while training continues and overwrites the weights that were copied.

Invariants:

- One save at a time. `save` first waits for the previous save. So there is one set of host buffers and at most one
  writing thread, and a disk that is slower than the save interval slows training instead of filling the host memory.
- Ownership. Between the start and the end of the thread, the buffers belong to it, and the main thread neither reads
  nor writes them. The thread touches no tensor of the model and makes no CUDA call. `_ended` is written by the thread
  and read by the main thread after `join`, so neither needs a lock.
- Same order on every rank. Every rank calls `save` at the same step, so the threads meet in the same order in every
  collective of `checkpoint.save`. They use a process group of their own (`peers`), because at the same time the main
  threads run the collectives of training, in an order that the threads do not know.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptperf.checkpoint import write
from gptperf.checkpoint.strict_json import JSON
from gptperf.distributed.agreement import Ranks
from gptperf.errors import DiskError, GptperfError

__all__ = ["Saved", "Saver"]


@dataclass(frozen=True)
class Saved:
    """The result of a save; step, metric and success are the same on every rank."""

    step: int
    metric: float | None
    path: Path | None
    """Directory of the checkpoint; None after an error."""
    error: GptperfError | None
    stall_ms: float
    """Time that training waited: for the copy, or, without a thread, for the whole save."""
    time_ms: float
    """Time from the start of the copy to the end of the write."""


class Saver:
    """Writes the checkpoints of a run.

    Args:
        directory: Directory of the checkpoints.
        keep: Number of the newest checkpoints to keep.
        peers: The ranks that save together, each with its own `Saver`.
        in_background: Whether a thread writes; otherwise `save` returns when the checkpoint is on the disk.
    """

    def __init__(self, directory: Path, keep: int, peers: Ranks, in_background: bool = True):
        self.directory, self.keep, self.peers, self.in_background = directory, keep, peers, in_background
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON], metric: float | None
    ) -> Saved | None:
        """Waits for the previous save, then starts to save a step. Collective: every rank must call it.

        Args:
            step: As in `checkpoint.save`.
            tensors: As in `checkpoint.save`; they may change when this call returns.
            state: As in `checkpoint.save`; it must not change until the save has ended.
            metric: As in `checkpoint.save`.

        Returns:
            The result of the previous save, if `poll` or `wait` has not returned it yet.
        """
        before = self.wait()  # from here on the buffers belong to this thread again
        begun = time.perf_counter()
        copies = self._copy_to_host(tensors) if self.in_background else tensors
        stall_ms = 1e3 * (time.perf_counter() - begun)

        def write_copies() -> None:
            path, error = None, None
            try:
                path = self._write(step, copies, state, metric)
            except GptperfError as caught:
                error = caught
            except Exception as caught:  # noqa: BLE001 - an exception would end the thread and be lost: `wait` returns it
                error = DiskError(f"saving step {step} failed: {caught!r}")
                error.__cause__ = caught
            time_ms = 1e3 * (time.perf_counter() - begun)
            stalled = stall_ms if self.in_background else time_ms
            self._ended = Saved(step, metric, path, error, stalled, time_ms)

        if self.in_background:
            # Not a daemon: a process that ends normally waits for its last checkpoint.
            self._thread = threading.Thread(target=write_copies, name=f"save-{step}")
            self._thread.start()
        else:
            write_copies()
        return before

    def poll(self) -> Saved | None:
        """Returns the result of the last save once, if it has ended; other ranks may still be writing."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Waits for the last save and returns its result, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ended, self._ended = self._ended, None
        return ended

    def _copy_to_host(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies tensors to host buffers, which later saves use again and which are page-locked for tensors on a GPU.

        The buffers are kept because pinning pages is slower than copying into them, and because a later save cannot run
        out of memory that the first one has allocated. A copy from a GPU to pageable memory would be staged through a
        small pinned buffer and could not be asynchronous.
        """
        copies: dict[str, dict[str, Tensor]] = {}
        on_gpu = False
        for stem, named in tensors.items():
            copies[stem] = {}
            for name, tensor in named.items():
                on_gpu |= tensor.is_cuda
                buffer = self._buffers.get((stem, name))
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self._buffers[stem, name] = buffer
                # The copies are queued on the current stream, behind the kernels that compute these tensors and before
                # the kernels of the next step that overwrite them.
                copies[stem][name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            # The buffers hold the data only when the device has run the asynchronous copies, and the thread reads them
            # without waiting for the device. One synchronization covers all copies.
            torch.cuda.synchronize()
        return copies

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        metric: float | None,
    ) -> Path:
        """Writes a checkpoint. If the disk is full, deletes older checkpoints and tries once more."""
        for may_retry in (True, False):
            try:
                return write.save(
                    self.directory,
                    step=step,
                    tensors=tensors,
                    state=state,
                    keep=self.keep,
                    metric=metric,
                    peers=self.peers,
                )
            except DiskError as error:
                # An error of one rank is raised on every rank, so every rank reaches this exchange. Only rank 0
                # deletes, and all ranks follow its answer: they try again together or raise together.
                if not any(self.peers.exchange(error.full and may_retry and self._make_room())):
                    raise
        raise AssertionError

    def _make_room(self) -> bool:
        """Deletes all but the newest and the best checkpoint on rank 0. Returns whether this rank has deleted any."""
        try:
            return self.peers.rank == 0 and bool(write.prune(self.directory, keep=1))
        except DiskError:
            return False  # the caller reports the full disk
