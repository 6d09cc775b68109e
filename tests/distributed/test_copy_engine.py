"""When copy engines move data between ranks, and the message where they cannot."""

import pytest
import torch

from gptperf.distributed.collectives import Collectives
from gptperf.distributed.copy_engine import CopyEngine, open_collectives
from gptperf.distributed.process import Process
from gptperf.errors import DeviceError

CPU = torch.device("cpu")


class Agreeing(Process):
    """One of two ranks; the other rank finds the same."""

    def merged(self, found: dict[str, str]) -> dict[str, str]:
        return found


def test_one_process_needs_none() -> None:
    for asked in ("auto", "process_group", "copy_engine"):
        assert type(open_collectives(Process(0, 1, CPU), asked, torch.float32)) is Collectives


def test_without_gpus() -> None:
    found = open_collectives(Agreeing(0, 2, CPU), "auto", torch.float32)
    assert (type(found), found.reason) == (Collectives, "there is no GPU")
    assert open_collectives(Agreeing(0, 2, CPU), "process_group", torch.float32).reason == ""
    with pytest.raises(DeviceError, match=r"copy_engine': there is no GPU; nearest: --communication=auto"):
        open_collectives(Agreeing(0, 2, CPU), "copy_engine", torch.float32)


def test_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = open_collectives(Agreeing(0, 16, torch.device("cuda", 0)), "auto", torch.float32)
    assert found.reason == "8 of 16 processes are on this host"


class Unshared:
    """Peer memory that holds no buffer."""

    uncounted_bytes = 0

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype)

    def holds(self, flat: torch.Tensor) -> bool:
        return False

    def peer(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        raise AssertionError

    def barrier(self, channel: int) -> None:
        pass


def test_what_travels_is_not_wider_than_the_gradients() -> None:
    """A sum in float32 of what was rounded to 16 bits is the same whether it is widened before or after the way."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert CopyEngine(2, 0, CPU, torch.float32, Unshared(), lambda *_: None).wire_dtype(dtype) == dtype
    assert Collectives(2, 0, CPU, torch.float32).wire_dtype(torch.bfloat16) == torch.float32


def test_a_borrowed_buffer_is_summed_before_it_is_borrowed_again() -> None:
    moved = CopyEngine(2, 0, CPU, torch.float32, Unshared(), lambda *_: None)
    moved.reserve({}, 8, torch.float32)
    assert moved.buffer_bytes == 3 * 8 * 4
    slots = [moved.borrow(8, torch.float32).data_ptr() for _ in range(3)]
    assert len(set(slots)) == 3
    assert moved.borrow(4, torch.float32).data_ptr() == slots[0]
    with pytest.raises(AssertionError):
        moved.borrow(8, torch.bfloat16)
