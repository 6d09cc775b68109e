"""Checkpoints that are written while training goes on.

The state of an iteration is copied to the host, for which training waits; a thread writes it, together with the threads
of the other processes. One save at a time: the next one waits for it.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptperf.checkpoint import write as checkpoint
from gptperf.checkpoint.write import JSON
from gptperf.distributed.agreement import Ranks
from gptperf.errors import DiskError, GptperfError

__all__ = ["Saved", "Saver"]


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same in every process."""

    step: int
    metric: float | None
    path: Path | None
    error: GptperfError | None
    stall_ms: float
    """How long training waited."""
    time_ms: float
    """From the begin to the last byte."""


class Saver:
    """Writes the checkpoints of a run.

    Args:
        directory: of the checkpoints.
        keep: how many of the newest stay.
        peers: the processes that save together, each in a `Saver` of its own.
        in_background: let a thread write; if not, `save` returns when all is on the disk.
    """

    def __init__(self, directory: Path, keep: int, peers: Ranks, in_background: bool = True):
        self.directory, self.keep, self.peers, self.in_background = directory, keep, peers, in_background
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON], metric: float | None
    ) -> Saved | None:
        """Begin to save a step.

        Args:
            step, tensors, state, metric: as for `checkpoint.save`; they are copied, and may change afterwards.

        Returns:
            How the save before ended, if there was one.
        """
        before = self.wait()
        begun = time.perf_counter()
        copies = self._copied(tensors) if self.in_background else tensors
        stall_ms = 1e3 * (time.perf_counter() - begun)

        def write() -> None:
            path, error = None, None
            try:
                path = self._write(step, copies, state, metric)
            except GptperfError as caught:
                error = caught
            except Exception as caught:  # noqa: BLE001 - a thread has nobody else to tell
                error = DiskError(f"saving step {step} failed: {caught!r}")
                error.__cause__ = caught
            time_ms = 1e3 * (time.perf_counter() - begun)
            stalled = stall_ms if self.in_background else time_ms
            self._ended = Saved(step, metric, path, error, stalled, time_ms)

        if self.in_background:
            self._thread = threading.Thread(target=write, name=f"save-{step}")
            self._thread.start()
        else:
            write()
        return before

    def poll(self) -> Saved | None:
        """How the last save ended, once, if it has; this process may know it before others do."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """The same, after waiting for it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ended, self._ended = self._ended, None
        return ended

    def _copied(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies on the host, in page-locked memory that stays for the next save."""
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
                copies[stem][name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        metric: float | None,
    ) -> Path:
        """Save; on a full disk once more, after older checkpoints have made room."""
        for again in (True, False):
            try:
                return checkpoint.save(
                    self.directory,
                    step=step,
                    tensors=tensors,
                    state=state,
                    keep=self.keep,
                    metric=metric,
                    peers=self.peers,
                )
            except DiskError as error:
                if not any(self.peers.exchange(error.full and again and self._made_room())):
                    raise
        raise AssertionError

    def _made_room(self) -> bool:
        """Whether the first process could delete older checkpoints."""
        try:
            return self.peers.rank == 0 and bool(checkpoint.prune(self.directory, keep=1))
        except DiskError:
            return False  # the full disk is what is told
