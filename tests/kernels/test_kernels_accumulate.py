"""The accumulation of a gradient: the bits of PyTorch's addition, and nothing beside the sum is written."""

import pytest
import torch

from gptperf.kernels import reference
from gptperf.kernels.accumulate import accumulate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (2047,), (64, 65), (3, 1000, 5), (0, 4)])
def test_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=make).mul(100).to(DEVICE, dtype)
    total = torch.randn(shape, generator=make).to(DEVICE)
    wanted, given = total.clone(), gradient.clone()
    reference.accumulate(wanted, gradient)
    accumulate(total, gradient)
    assert torch.equal(total, wanted)
    assert torch.equal(gradient, given)


def test_a_view_of_a_bucket_and_a_transposed_gradient() -> None:
    bucket = torch.zeros(64 + 6 * 32 + 64, device=DEVICE)
    total = bucket[64:-64].view(6, 32)
    accumulate(total, torch.arange(6.0 * 32, device=DEVICE).view(32, 6).T.half())
    assert torch.equal(total, torch.arange(6.0 * 32, device=DEVICE).view(32, 6).T)
    assert not bucket[:64].any()
    assert not bucket[-64:].any()


def test_what_does_not_fit_is_refused() -> None:
    total = torch.zeros(4, 6, device=DEVICE)
    for function in (accumulate, reference.accumulate):
        for args, message in (
            ((total.half(), total), r"total \(4, 6\) torch.float16.* wanted torch.float32"),
            ((total.T, total.T), "contiguous"),
            ((total, total[:2]), r"gradient \(2, 6\).* wanted \(4, 6\)"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*args)
