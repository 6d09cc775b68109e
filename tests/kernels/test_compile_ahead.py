"""Kernels are compiled in threads before the self-test runs them. Run as a program, this file compiles for sm_90."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from test_kernels_aot import compile_in_a_process
from triton import compiler
from triton.errors import TritonError
from triton.runtime.driver import driver

from gptperf.kernels import launch, norm
from gptperf.kernels.rms_norm import rms_norm  # noqa: F401  # registers the op


@triton.jit
def _faulty_kernel(X):
    tl.store(X, tl.load(X) + missing)  # noqa: F821  # type: ignore[name-defined]


@triton.jit
def _unused_kernel(X):
    tl.store(X, 1.0)


@pytest.mark.slow
def test_kernels_are_compiled_in_threads_and_not_run() -> None:
    (report,) = compile_in_a_process(Path(__file__))
    assert report["forward"] == ["CompiledKernel"]
    assert report["backward"] == ["CompiledKernel"]  # launched by another thread, as autograd does
    assert report["threads"] == ["ThreadPoolExecutor"]
    assert report["values"] == [0.0]
    assert report["error"] == "CompilationError"
    assert report["after"] is None


def main() -> None:
    from aot import Chip

    driver.set_active(Chip(90))  # it has no stream, so a kernel that is not only compiled would raise
    threads: set[str] = set()
    compiles = compiler.compile

    def compile_here(*arguments: object, **options: object) -> object:
        threads.add(threading.current_thread().name.partition("-")[0])
        return compiles(*arguments, **options)

    x, weight, values = torch.zeros(32, 64), torch.ones(64), torch.zeros(1)
    compiler.compile = compile_here
    ops = torch.ops.gptperf
    with launch.compile_ahead(2):
        ops.rms_norm(x, None, weight, 1e-5)
        backward = threading.Thread(target=lambda: ops.rms_norm_backward(x, None, x, weight, torch.ones(32)))
        backward.start()
        backward.join()
        launch.launch(_unused_kernel, (1,), (values,), (), {})
        launch.launch(_faulty_kernel, (1,), (values,), (), {})
    found = {
        "forward": [type(kernel).__name__ for kernel in norm._norm_forward_kernel.device_caches[90][0].values()],
        "backward": [type(kernel).__name__ for kernel in norm._norm_backward_kernel.device_caches[90][0].values()],
        "threads": sorted(threads),
        "values": values.tolist(),
        "error": None,
        "after": launch._ahead,
    }
    try:
        launch.launch(_faulty_kernel, (1,), (values,), (), {})
    except TritonError as error:
        found["error"] = type(error).__name__
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
