"""The protocol of timed steps, and the energy counter."""

import pytest

from gptperf.monitor import step_timing


class Clock:
    """Simulates steps that get faster until they settle at 10 ms."""

    def __init__(self, settles_at: int) -> None:
        self.settles_at, self.done, self.windows = settles_at, 0, 0

    def window(self, first: int, steps: int) -> list[float]:
        assert first == self.done
        times = [10.0 * 1.05 ** max(0, self.settles_at - step) for step in range(first, first + steps)]
        self.done, self.windows = first + steps, self.windows + 1
        return times


@pytest.mark.parametrize(("settles_at", "stable"), [(0, True), (20, True), (1000, False)])
def test_steps_are_timed_when_they_have_settled(settles_at: int, stable: bool) -> None:
    clock, joules = Clock(settles_at), iter((100.0, 350.0))
    found = step_timing.time_steps(clock.window, 11, lambda: next(joules), None)
    assert found.stable is stable
    assert found.warm_up_steps + 11 == clock.done
    assert len(found.ms) == 11
    assert found.joules == 250.0
    if stable:
        assert found.warm_up_steps >= settles_at
        assert found.spread == step_timing.Spread(10.0, 10.0, 10.0)
    else:
        assert found.warm_up_steps <= step_timing.MOST_WARM_UP


def test_without_a_counter_there_is_no_energy_but_a_reason() -> None:
    found = step_timing.time_steps(Clock(0).window, 3, lambda: None, "no such package")
    assert (found.joules, found.no_joules) == (None, "no such package")


def test_the_meter_says_why_it_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    meter = step_timing.EnergyMeter("GPU-0")
    assert meter.joules() is None
    assert meter.reason == "the package nvidia-ml-py is not installed"


def test_the_meter_reads_the_counter_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        NVMLError = RuntimeError
        counts = True

        def nvmlInit(self) -> None: ...

        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            return uuid

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
            if not self.counts:
                raise RuntimeError("Not Supported")
            return 12_500

    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml())
    assert step_timing.EnergyMeter("GPU-0").joules() == 12.5
    monkeypatch.setattr(Nvml, "counts", False)
    meter = step_timing.EnergyMeter("GPU-0")
    assert (meter.joules(), meter.reason) == (None, "NVML: Not Supported")
