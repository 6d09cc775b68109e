"""The sum of shares: the bits of a sum in the order of the ranks, in float32."""

import pytest
import torch

from gptperf.kernels import reference
from gptperf.kernels.sum_shares import sum_shares

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("processes", "rank"), [(2, 0), (2, 1), (4, 2), (8, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_of_the_reference(dtype: torch.dtype, processes: int, rank: int, add: bool) -> None:
    for numel in (0, 1, 64, 2047, 4096 + 64):
        generator = torch.Generator().manual_seed(numel)
        shares = torch.randn(processes, numel, generator=generator).mul(100).to(DEVICE, dtype)
        out = torch.randn(numel, generator=generator).to(DEVICE)
        wanted, got = out.clone(), out.clone()
        others = torch.cat([shares[:rank], shares[rank + 1 :]])
        reference.sum_shares(wanted, shares[rank], others, rank, add)
        sum_shares(got, shares[rank], others, rank, add)
        assert torch.equal(got, wanted)
        truth = shares.double().sum(0) + (out.double() if add else 0)
        bound = processes * torch.finfo(torch.float32).eps * (shares.double().abs().sum(0) + out.double().abs())
        assert ((got.double() - truth).abs() <= bound).all()


def test_in_place() -> None:
    own, pulled = torch.randn(500, device=DEVICE), torch.randn(2, 500, device=DEVICE)
    wanted = torch.empty_like(own)
    reference.sum_shares(wanted, own, pulled, 1, False)
    sum_shares(own, own, pulled, 1, False)
    assert torch.equal(own, wanted)
