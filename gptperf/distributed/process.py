"""The ranks of a job: how they find each other, and what they decide together."""

import gc
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptperf.distributed.progress import Progress
from gptperf.distributed.watchdog import Watchdog
from gptperf.errors import DeviceError, PeerError

__all__ = ["Process", "start_process"]

# The backend's own limit of a collective is this much longer than the watchdog's limit; the watchdog can name the rank.
_MARGIN_S = 30.0


@dataclass(eq=False)
class Process:
    """One rank of a job, and the decisions that it makes with the other ranks.

    All methods except `close` and `watchdog` are collectives: every rank must call them, in the same order. For a
    single process they return at once.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """Process group for decisions. It works on the CPU, so that they do not wait for the GPU; None for a single
    process."""
    save_group: dist.ProcessGroup | None = None
    """Process group for the thread that saves: its collectives must not mix with those of the main thread."""
    progress: Progress = field(default_factory=Progress, compare=False)
    """Position of the main thread, for the watchdog."""
    timeout_s: float = 600.0
    """Limit of one collective."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the console output."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            with self.progress.collective("barrier"):
                dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a tensor over the ranks; with several ranks, the result is on the CPU."""
        if self.world_size == 1:
            return value
        with self.progress.collective("all_reduce"):
            dist.all_reduce(value)
            # The copy to the CPU waits for the other ranks, so it must be inside `progress`.
            return (value / self.world_size).cpu()

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank."""
        return bool(self.highest(int(flag)))

    def highest(self, value: int) -> int:
        """Returns the largest value over all ranks."""
        return self.highest_of(value)[0]

    def highest_of(self, *values: int) -> list[int]:
        """Returns the largest of each value over all ranks, with one collective."""
        if self.world_size == 1:
            return list(values)
        found = torch.tensor(values)
        with self.progress.collective("all_reduce"):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return [int(value) for value in found]

    def merged(self, found: dict[str, str]) -> dict[str, str]:
        """Returns the union of what all ranks found; for a key that several have, the value of the lowest rank."""
        if self.world_size == 1:
            return found
        every: list[dict[str, str]] = [{} for _ in range(self.world_size)]
        with self.progress.collective("all_gather"):
            dist.all_gather_object(every, found, group=self.host_group)
        return {key: text for one in reversed(every) for key, text in one.items()}

    def gather(self, value: Any) -> list[Any]:
        """Returns the value of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        every: list[Any] = [None] * self.world_size
        with self.progress.collective("all_gather"):
            dist.all_gather_object(every, value, group=self.host_group)
        return every

    def exchange(self, value: Any) -> list[Any]:
        """Returns the value of every rank, in rank order. Only the threads that save call it."""
        if self.world_size == 1:
            return [value]
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, value, group=self.save_group)
        return every

    def from_main(self, text: str) -> str:
        """Returns the text of the main process."""
        if self.world_size == 1:
            return text
        box = [text]
        with self.progress.collective("broadcast"):
            dist.broadcast_object_list(box, 0, group=self.host_group)
        return box[0]

    def watchdog(self, out_dir: str, *, debug: bool = False) -> Watchdog:
        """Returns a context that ends this process when another rank of the job fails, dies or hangs."""
        return Watchdog(
            self.rank, self.world_size, self.progress, timeout_s=self.timeout_s, out_dir=out_dir, debug=debug
        )

    def close(self) -> None:
        """Leaves the job. The threads of its process groups have ended when this returns.

        Such a thread frees the tensors of the last collective. If it did so while Python shuts down, it could not take
        the lock of the interpreter, and a run that went well would abort. The threads of a group end with its last
        reference, so objects in reference cycles are collected too.
        """
        if self.world_size > 1:
            dist.destroy_process_group()
            self.host_group = self.save_group = None
            gc.collect()


def start_process(device: str, timeout_s: float = 600.0) -> Process:
    """Joins the job that torchrun started, or creates a job of this process alone.

    Args:
        device: "auto", "cuda" or "cpu".
        timeout_s: limit of one collective.

    Raises:
        PeerError: the other ranks did not join in time.
        DeviceError: "cuda" was asked for on a machine without a usable GPU, this host has fewer GPUs than processes, or
            WORLD_SIZE is set without the other variables that torchrun sets.
    """
    # Streams share hardware connections, of which there are 8 by default. A stream that waits for other GPUs blocks all
    # streams on its connection.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device = 'cuda': PyTorch finds no usable GPU here. Use device = 'auto' or 'cpu'.")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if world_size > 1 and name not in os.environ
    ]
    if missing:
        raise DeviceError(
            f"WORLD_SIZE is {world_size}, but the environment has no {', '.join(missing)}. Start the job with torchrun."
        )
    given = {
        name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", *(["MASTER_PORT"] if world_size > 1 else []))
    }
    wrong = [f"{name} = {text!r}" for name, text in given.items() if not text.isdecimal()]
    if wrong:
        raise DeviceError(f"found {', '.join(wrong)}, wanted whole numbers >= 0. Start the job with torchrun.")
    rank, local_rank = int(given["RANK"]), int(given["LOCAL_RANK"])
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local_rank} of this host has no GPU of its own: found {torch.cuda.device_count()}; wanted "
            f"--nproc_per_node={torch.cuda.device_count()} or less"
        )
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    host_group = save_group = None
    if world_size > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s + _MARGIN_S)
        try:
            dist.init_process_group(backend, timeout=limit, device_id=here if kind == "cuda" else None)
            host_group, save_group = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        except dist.DistError as error:
            line = str(error).partition("\n")[0]
            raise PeerError(f"rank {rank} could not join the {world_size} processes of the job: {line}") from error
    return Process(rank, world_size, here, host_group, save_group, timeout_s=timeout_s)
