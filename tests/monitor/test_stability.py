"""Spikes and plateaus of the loss."""

import math

import pytest
import torch

from gptperf.monitor.stability import LossWindow


def test_spikes_and_plateaus() -> None:
    window = LossWindow(20)
    falling = [window.add(4 - 0.05 * i + 0.01 * (-1) ** i) for i in range(30)]
    assert not any(found["spike"] or found["plateau"] for found in falling)
    assert falling[-1]["window"] == 20
    last = [4 - 0.05 * i + 0.01 * (-1) ** i for i in range(10, 30)]
    assert falling[-1]["loss_mean"] == pytest.approx(sum(last) / 20)
    assert falling[-1]["loss_variance"] == pytest.approx(torch.tensor(last).double().var(correction=0).item())
    assert window.add(6.0)["spike"]
    assert window.add(math.nan)["spike"]
    assert math.isfinite(window.add(2.4)["loss_mean"])
    flat = LossWindow(20)
    found = [flat.add(2.5 + 0.01 * (-1) ** i, skipped=i) for i in range(20)]
    assert [f["plateau"] for f in found] == [False] * 19 + [True]
    assert not any(f["spike"] for f in found)
    assert found[7]["non_finite"] == 7
