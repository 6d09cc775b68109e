"""Evaluation over ranks that have different numbers of batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gptperf.distributed.process import Process
from gptperf.training.evaluation import _as_many_as_any_rank


@dataclass(frozen=True)
class BesideALonger(Process):
    """One of two ranks; the other one has `longer` batches."""

    longer: int = 0
    asked: list[bool] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag or len(self.asked) <= self.longer


def _batches(count: int) -> Iterator[torch.Tensor]:
    return (torch.full((2, 3, 8), i + 1) for i in range(count))


def test_a_process_that_has_fewer_goes_on_with_what_does_not_count() -> None:
    process = BesideALonger(1, 2, torch.device("cpu"), longer=4)
    found = list(_as_many_as_any_rank(_batches(2), process, 8))
    assert [rows for _, rows in found] == [3, 3, 0, 0]
    assert [batch[0, 0, 0].item() for batch, _ in found] == [1, 2, 0, 0]
    assert found[2][0].shape == (2, 1, 8)
    assert process.asked == [True, True, False, False, False]


def test_the_longer_one_gives_what_it_has() -> None:
    process = BesideALonger(0, 2, torch.device("cpu"), longer=1)
    assert [rows for _, rows in _as_many_as_any_rank(_batches(3), process, 8)] == [3, 3, 3]
