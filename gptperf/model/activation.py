"""Activations of the standard FFN: functions from a tensor of any shape and floating-point dtype to one like it."""

from gptperf.kernels.reference import ACTIVATIONS
from gptperf.registry import built_in

__all__: list[str] = []

for name, function in ACTIVATIONS.items():
    built_in("activation", name)(function)
