"""The bytes that bench.measure.float8 counts are those of the tensors; to time anything it needs a GPU."""

import pytest
import torch

from bench.measure import float8


@pytest.mark.parametrize("name", list(float8.kernel_calls(16, 16, 32, "cpu")))
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    """Each input once, or twice with a scale of its own, and each 8-bit output."""
    moved, call = float8.kernel_calls(16, 16, 32, "cpu")[name]
    outputs: tuple[torch.Tensor, ...] = call()  # type: ignore[assignment]
    inputs = sum(x.nbytes for x in call.args if x.dtype == torch.bfloat16)  # type: ignore[attr-defined]
    written = sum(x.nbytes for x in outputs if x.dtype.itemsize == 1)
    assert moved == inputs * (2 if "own scale" in name else 1) + written


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert float8.main([]) == 0
    assert "no GPU here" in capsys.readouterr().out
