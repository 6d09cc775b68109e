"""GPUs: the peaks of their data sheets, their state, and the rates that a GPU sustains."""

from gptperf.hardware.gpu_table import GPUS, Gpu
from gptperf.hardware.peaks import BASES, Peak, has_bfloat16, match_gpu, no_peak_hint, peak_flop_s
from gptperf.hardware.state import GpuState, gpu_state, gpu_states

__all__ = [
    "BASES",
    "GPUS",
    "Gpu",
    "GpuState",
    "Peak",
    "gpu_state",
    "gpu_states",
    "has_bfloat16",
    "match_gpu",
    "no_peak_hint",
    "peak_flop_s",
]
