"""Traces of PyTorch's profiler, and what is read from them."""

from typing import Any

import pytest
import torch

from gptperf.monitor.trace import LOADER_MARK, Kernel, kernels_of, trace_steps, waits_of

GEMM = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"


def test_kernels_and_waits_are_read_from_a_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    trace = {
        "traceEvents": [
            event("kernel", GEMM, 10.0, 5.0, stream=7),
            event("gpu_memset", "Memset (Device)", 20.0, 1.0, stream=8),
            event("cpu_op", "aten::mm", 0.0, 3.0),
            event("cuda_runtime", "cudaLaunchKernel", 1.0, 1.0),
            event("gpu_user_annotation", LOADER_MARK, 1.0, 1.0),
            event("user_annotation", LOADER_MARK, 2.0, 4.0),
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert kernels_of(trace) == [Kernel(GEMM, 10.0, 5.0, 7), Kernel("Memset (Device)", 20.0, 1.0, 8)]
    assert waits_of(trace) == [(2.0, 6.0)]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_waits_are_in_a_trace_of_pytorch() -> None:
    def run(step: int) -> None:
        with torch.profiler.record_function(LOADER_MARK):
            torch.randn(8)

    waits = waits_of(trace_steps(run, 0, 3, host=True))
    assert len(waits) == 3
    assert all(end > begin for begin, end in waits)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_warm_up_is_not_in_a_trace() -> None:
    ran = []

    def run(step: int) -> None:
        ran.append(step)
        with torch.profiler.record_function(LOADER_MARK):
            torch.randn(8)

    trace = trace_steps(run, 4, 3, warm_up=2, host=True)
    assert ran == [4, 5, 6, 7, 8]
    assert len(waits_of(trace)) == 3
    if not torch.cuda.is_available():
        assert kernels_of(trace) == []
