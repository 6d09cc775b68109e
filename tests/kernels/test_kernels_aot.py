"""The code of the kernels for GPUs that need not be there: `tests/helpers/aot.py`, one process per GPU, two at a time.

Run as a program, this file compiles the faulty kernels at its end, which show that each check can fail.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

SHARED_KB = {"sm_90": 227, "sm_70": 96, "sm_80": 163, "sm_89": 99, "sm_100": 227, "sm_120": 99}
"""Shared memory that a block may have: CUDA C++ Programming Guide, technical specifications by compute capability."""
WIDE = 0.7
"""Least share of bytes in wide accesses; the rest are a statistic for each row, a target's logit and small tables."""
LOADS_WIDE = {
    "norm._norm_forward_kernel",
    "rope._rope_forward_kernel",
    "activation._activation_forward_kernel",
    "linear_cross_entropy._cross_entropy_kernel",
}
STORES_WIDE = LOADS_WIDE - {"linear_cross_entropy._cross_entropy_kernel"}  # without a gradient it stores the loss alone

ROOT = Path(__file__).parents[2]
Reports = list[dict[str, Any]]
pytestmark = pytest.mark.slow


def compile_in_a_process(program: Path, *arguments: str) -> Reports:
    """What a program prints, with an empty cache that goes with it."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
        command = [sys.executable, str(program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[str, Future[Reports]]]:
    """The longest first."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            arch: pool.submit(compile_in_a_process, ROOT / "tests" / "helpers" / "aot.py", arch) for arch in SHARED_KB
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture(params=SHARED_KB)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(arch: str, compilations: dict[str, Future[Reports]]) -> Reports:
    return [report for report in compilations[arch].result() if report.get("kernel")]


def told(report: dict[str, Any], what: object) -> str:
    return f"{report['kernel']}, {report['num_warps']} warps, in {report['cases'][0]}: {what}"


def none(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join([f"{len(found)} found:", *found[:30]]), pytrace=False)


def test_every_launch_compiles(arch: str, compilations: dict[str, Future[Reports]]) -> None:
    reports = compilations[arch].result()
    failed = [f"{report['cases'][0]}: {report['error']}" for report in reports if "error" in report]
    none(failed)
    [functions] = [report["functions"] for report in reports if "functions" in report]
    launched = {report["kernel"] for report in reports if "kernel" in report}
    wanted = {name for name in functions if name.endswith("_kernel")}
    if arch == "sm_70":
        wanted.remove("symmetric_matmul._symmetric_matmul_kernel")  # eager PyTorch there
    if int(arch.removeprefix("sm_")) < 89:
        wanted = {name for name in wanted if not name.startswith("quantize")}  # no 8-bit floats
    assert launched == wanted


def test_no_double_precision(kernels: Reports) -> None:
    """One fp64 instruction costs as much as 32 to 64 others; a Python number in the wrong place is enough."""
    found = [told(report, report["f64"]) for report in kernels if report["f64"]]
    none(found)


def test_no_register_spills(kernels: Reports) -> None:
    spilt = [report for report in kernels if report["spill_bytes"]]
    for report in spilt:
        if report["widest"]:
            print(told(report, f"{report['spill_bytes']} bytes spilt, as rows that wide may"))
    found = [told(report, f"{report['spill_bytes']} bytes spilt") for report in spilt if not report["widest"]]
    none(found)


def test_shared_memory_fits(arch: str, kernels: Reports) -> None:
    limit = SHARED_KB[arch] * 1024
    found = [
        told(report, f"{report['shared_bytes']} bytes of {limit}")
        for report in kernels
        if report["shared_bytes"] > limit
    ]
    none(found)


def test_addresses(kernels: Reports) -> None:
    """In 64 bits wherever a size of the data comes in; no atomics; no load without a value for what is masked."""
    found = [told(report, fault) for report in kernels for fault in report["lint"]]
    none(found)


def test_forward_accesses_are_wide(kernels: Reports) -> None:
    """Rows that divide into wide accesses are read and written that way."""
    forward = [report for report in kernels if report["forward_2048"]]
    narrow = [told(x, x["wide_loads"]) for x in forward if x["kernel"] in LOADS_WIDE and x["wide_loads"] < WIDE]
    narrow += [told(x, x["wide_stores"]) for x in forward if x["kernel"] in STORES_WIDE and x["wide_stores"] < WIDE]
    none(narrow)
    assert {report["kernel"] for report in forward} >= LOADS_WIDE


def test_what_is_launched_early_waits_before_it_writes(arch: str, kernels: Reports) -> None:
    """Only two kernels read before, weights and a cache; a GPU before sm_90 launches no kernel early."""
    early = {report["kernel"] for report in kernels if report["early"]}
    assert bool(early) == (int(arch.removeprefix("sm_")) >= 90)
    found = [told(report, "waits or not") for report in kernels if report["early"] != report["waits"]]
    found += [told(report, "writes before it waits") for report in kernels if report["stores_before"]]
    reading = {report["kernel"] for report in kernels if report["loads_before"]}
    none(found)
    assert reading == early & {f"decode_{name}._decode_{name}_kernel" for name in ("linear", "attention")}


def test_an_odd_vocabulary_is_accessed_as_wide_as_an_even_one(kernels: Reports) -> None:
    name = "linear_cross_entropy._cross_entropy_kernel"
    odd, even = (
        sorted(
            (case.replace(V, "V"), report["wide_loads"], report["wide_stores"])
            for report in kernels
            for case in report["cases"]
            if report["kernel"] == name and f" {V} " in case
        )
        for V in ("50257", "50304")
    )
    assert odd
    assert odd == even


# Kernels that the checks have to find, and one that they have to leave alone


@triton.jit
def good_kernel(X, Y, n):
    row = tl.program_id(0).to(tl.int64) * n
    small = tl.program_id(1) % 8 * 128  # 32 bits that end below 1024
    at = row + small + tl.arange(0, 1024).to(tl.int64)
    for start in range(0, 4096, 1024):
        tl.store(Y + start + at, tl.load(X + start + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def product_kernel(X, Y, n):
    at = (tl.program_id(0) * n + tl.arange(0, 1024)).to(tl.int64)
    tl.store(Y + at, tl.load(X + at))


@triton.jit
def carried_product_kernel(X, Y, n):
    lanes = tl.arange(0, 1024).to(tl.int64)
    row = 0
    for step in range(0, n):
        tl.store(Y + row + lanes, tl.load(X + tl.cast(row, tl.int64) + lanes))
        row = step * n


@triton.jit
def short_offset_kernel(X, Y, n):
    at = tl.arange(0, 1024).to(tl.int64)
    tl.store(Y + at, tl.load(X + n + at))


@triton.jit
def no_other_kernel(X, Y, n):
    at = tl.arange(0, 1024).to(tl.int64)
    tl.store(Y + at, tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def atomic_kernel(X, Y, n):
    at = tl.arange(0, 1024).to(tl.int64)
    tl.atomic_add(Y + at, tl.load(X + at))


@triton.jit
def double_kernel(X, Y, n):
    at = tl.arange(0, 1024).to(tl.int64)
    tl.store(Y + at, (tl.load(X + at) * tl.full((1024,), 0.1, tl.float64)).to(tl.float32))


@triton.jit
def spilling_kernel(X, Y, n):
    at = tl.arange(0, 16384).to(tl.int64)
    x = tl.load(X + at)
    tl.store(Y + at, x / tl.sum(x))


@triton.jit
def reused_kernel(X, Y, n):
    at = tl.arange(0, 1024).to(tl.int64)
    tl.store(Y + at, tl.load(X + at) * n)


FAULTS = {
    "good_kernel": [],
    "product_kernel": ["32-bit product in an address: arith.muli"],
    "carried_product_kernel": ["32-bit product in an address: arith.muli"],
    "short_offset_kernel": ["32-bit offset"],
    "no_other_kernel": ["masked load without other"],
    "atomic_kernel": ["atomic"],
    "double_kernel": ["f64"],
    "spilling_kernel": ["spill"],
    "reused_kernel": ["launched as compiled for other arguments"],
}


@pytest.fixture(scope="module")
def controls() -> Reports:
    return compile_in_a_process(Path(__file__))


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_kernels_are_found(name: str, controls: Reports) -> None:
    reports = [report for report in controls if report["cases"] == [name]]
    said = [fault for report in reports for fault in report.get("lint", [])]
    said += [f"f64: {line}" for report in reports for line in report.get("f64", [])]
    said += [f"spill of {report['spill_bytes']} bytes" for report in reports if report.get("spill_bytes")]
    said += [report["error"] for report in reports if "error" in report]
    assert all(any(fault in line for line in said) for fault in FAULTS[name]), said
    assert all(any(fault in line for fault in FAULTS[name]) for line in said), said
    assert all(report["wide_loads"] == report["wide_stores"] == 1.0 for report in reports if name == "good_kernel")


def test_misaligned_accesses_are_narrow(controls: Reports) -> None:
    [report] = [report for report in controls if report["cases"] == ["misaligned"]]
    assert report["wide_loads"] == 0.0
    assert report["wide_stores"] == 1.0


def main() -> None:
    import aot

    x = torch.empty(1 << 16)

    def launch(kernel: Any, tensor: torch.Tensor) -> None:
        kernel[(4, 8)](tensor, x, 1024, num_warps=1 if kernel is spilling_kernel else 4)

    def reuse() -> None:
        reused_kernel[(1,)](x, x, 3)[(1, 1, 1)](x, x, 3)
        reused_kernel[(1,)](x, x, 3)[(1, 1, 1)](x, x, 16)

    cases = [aot.Case(name, lambda name=name: launch(globals()[name], x)) for name in FAULTS if name != "reused_kernel"]
    cases += [aot.Case("reused_kernel", reuse), aot.Case("misaligned", lambda: launch(good_kernel, x[1:]))]
    for report in aot.compile_cases(90, cases):
        print(json.dumps(report))


if __name__ == "__main__":
    main()
