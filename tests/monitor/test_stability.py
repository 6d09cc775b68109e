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


@pytest.mark.parametrize(
    ("before", "limit"),
    [
        ([2.9, 3.1] * 6, 3.0 + 6 * 1.4826 * 0.1),
        ([2.9, 3.1] * 6 + [50.0], 3.1 + 6 * 1.4826 * 0.2),  # an earlier spike moves neither median nor deviation much
        ([3.0] * 12, 3.0 + 6 * 0.001 * 3.0),  # losses that do not vary at all
        ([3.0] * 9, math.inf),  # too few to tell
    ],
)
def test_a_spike_is_six_deviations_above_the_median(before: list[float], limit: float) -> None:
    for loss, spike in ((limit - 1e-3, False), (limit + 1e-3, True)) if limit < math.inf else ((100.0, False),):
        window = LossWindow(50)
        for earlier in before:
            window.add(earlier)
        assert window.add(loss)["spike"] is spike


@pytest.mark.parametrize(("errors", "plateau"), [(-1.0, True), (1.9, True), (2.1, False)])
def test_a_plateau_falls_by_less_than_two_standard_errors(errors: float, plateau: bool) -> None:
    half = torch.tensor([3.1, 2.9] * 5, dtype=torch.float64)
    error = (2 * half.var() / 10).sqrt()
    window = LossWindow(20)
    found = [window.add(loss) for loss in torch.cat([half, half - errors * error]).tolist()]
    assert found[-1]["plateau"] is plateau
