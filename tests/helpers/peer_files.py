"""Memory that ranks on CPUs share, in files that all of them map, to test the protocol of copy engines without GPUs."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptperf.distributed.collectives import Collectives
from gptperf.distributed.copy_engine import CopyEngine
from gptperf.distributed.process import Process
from gptperf.kernels import reference


class FileMemory:
    """`PeerMemory` in which a region is one file per rank. A run has a folder of its own."""

    uncounted_bytes = 0

    def __init__(self, folder: Path):
        self.folder = folder
        self.regions: list[list[Tensor]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        paths = [self.folder / f"{len(self.regions)}-{rank}" for rank in range(dist.get_world_size())]
        nbytes = numel * dtype.itemsize
        paths[dist.get_rank()].write_bytes(bytes(nbytes))
        dist.barrier()
        maps = [torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        self.regions.append([flat.view(dtype) for flat in maps])
        return self.regions[-1][dist.get_rank()]

    def _find(self, flat: Tensor) -> tuple[list[Tensor], int] | None:
        for region in self.regions:
            offset = flat.data_ptr() - region[dist.get_rank()].data_ptr()
            if 0 <= offset < region[0].nbytes:
                return region, offset // flat.element_size()
        return None

    def holds(self, flat: Tensor) -> bool:
        return self._find(flat) is not None

    def peer(self, flat: Tensor, rank: int) -> Tensor:
        found = self._find(flat)
        assert found is not None
        region, offset = found
        return region[rank].view(flat.dtype)[offset : offset + flat.numel()]

    def barrier(self, channel: int) -> None:
        dist.barrier()


def collectives_of(process: Process, folder: str | Path, reduce_dtype: torch.dtype = torch.float32) -> Collectives:
    """Returns collectives of the process group or, if a folder is given, those that pull from the files in it."""
    where = process.world_size, process.rank, process.device, reduce_dtype
    if not folder or process.world_size == 1:
        return Collectives(*where)
    return CopyEngine(*where, FileMemory(Path(folder)), reference.sum_shares)
