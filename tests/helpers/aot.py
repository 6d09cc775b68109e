"""Compiles every launch of the kernels for GPUs that need not be there, and prints one JSON object per line on each.

    PYTHONPATH=.:tests/helpers python tests/helpers/aot.py sm_80 sm_90

The registered ops run on CPU tensors whose memory is never read. A replacement of Triton's driver names the GPU asked
for, and a launch only compiles. So launch configurations and specialisations of the arguments are those of real
launches. This needs neither a GPU nor a CUDA driver; TRITON_INTERPRET must not be set.

To save time, only sm_90 gets every dtype, variant and shape. The others get the variants that use the most registers
and shared memory, in bfloat16 (in float16 on sm_70, which has no bfloat16), and layer_norm in float32 too.
"""

import contextlib
import importlib
import io
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from aot_generation import generation_calls
from aot_lint import lint, wide_share
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction

from gptperf.kernels import launch
from gptperf.kernels.checks import ACTIVATIONS
from gptperf.kernels.rope import rotate, rotate_back

__all__ = ["Case", "cases", "compile_cases", "jit_functions"]

LEAST_BYTES = {"norm._norm_forward_kernel": 8}
"""The least bytes of a wide access of a thread; default: 16. The norm accesses 4 elements at a time."""


class Chip:
    """Replaces Triton's driver: it says that a GPU of this compute capability is there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton's cache of compiled kernels has the device in its key

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@dataclass(frozen=True)
class Case:
    """One call of an op in one shape and dtype."""

    label: str
    call: Callable[[], object]
    forward_2048: bool = False
    """A forward pass in 16 bits whose rows divide into whole wide accesses."""
    widest: bool = False
    """The widest rows that the kernel takes, wider than those of any model."""


@dataclass
class Compiled:
    """A kernel that Triton compiled, the log of ptxas, and the cases that launch it."""

    function: JITFunction
    kernel: Any
    log: str
    cases: list[Case] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Returns a launch of the compiled kernel, which raises if Triton has another kernel for the arguments."""

        def run(*args: Any) -> None:
            metadata = self.kernel.metadata
            options = {"num_warps": metadata.num_warps}
            if metadata.maxnreg is not None:  # Triton distinguishes an option that is None from a missing one
                options["maxnreg"] = metadata.maxnreg
            if metadata.launch_pdl:
                options["launch_pdl"] = True
            found = self.function.run(*args, grid=grid, warmup=True, **options)
            if found is not self:
                raise RuntimeError(f"{function_name(self.function)} is launched as compiled for other arguments")

        return run

    def report(self) -> dict[str, Any]:
        registers = re.findall(r"Used (\d+) registers", self.log)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        name = function_name(self.function)
        if not registers or not spills:
            raise RuntimeError(f"{name}: found no registers in the log of ptxas: {self.log!r}")
        asm, metadata = self.kernel.asm, self.kernel.metadata
        least = LEAST_BYTES.get(name, 16)
        before, wait, _ = asm["ptx"].partition("griddepcontrol.wait")
        return {
            "kernel": name,
            "cases": [case.label for case in self.cases],
            "forward_2048": any(case.forward_2048 for case in self.cases),
            "widest": all(case.widest for case in self.cases),
            "num_warps": metadata.num_warps,
            "registers": max(map(int, registers)),
            "spill_bytes": sum(int(stores) + int(loads) for stores, loads in spills),
            "shared_bytes": metadata.shared,
            "wide_loads": round(wide_share(asm["ptx"], "ld", least), 3),
            "wide_stores": round(wide_share(asm["ptx"], "st", least), 3),
            "f64": re.findall(r"^.*\.f64\b.*$", asm["ptx"], re.MULTILINE)[:3],
            "lint": lint(asm["ttir"]),
            "early": bool(metadata.launch_pdl),
            "waits": bool(wait),
            "loads_before": before.count("ld.global") if wait else 0,
            "stores_before": before.count("st.global") if wait else 0,
        }


def function_name(function: JITFunction) -> str:
    return f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"


def compile_cases(capability: int, cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """Runs the cases with launches that only compile; yields a report on each kernel and on each case that failed."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    run = JITFunction.run
    compiled: dict[int, Compiled] = {}
    launched: list[Compiled] = []

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(function, *args, grid=grid, warmup=True, **options)
        launched.append(compiled.setdefault(id(kernel), Compiled(function, kernel, log.getvalue())))
        return launched[-1]

    driver.set_active(Chip(capability))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # ptxas has to run
    triton.knobs.compilation.disable_line_info = True  # a fifth of the time, and not a line of the code
    JITFunction.run = compile_only
    try:
        for case in cases:
            launched.clear()
            try:
                case.call()
            except (TritonError, RuntimeError) as error:
                yield {"kernel": "", "cases": [case.label], "error": f"{type(error).__name__}: {error}"[:2000]}
            for kernel in launched:
                if case not in kernel.cases:
                    kernel.cases.append(case)
    finally:
        JITFunction.run = run
    yield from (kernel.report() for kernel in compiled.values())


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
SHORT = {HALF: "fp16", FULL: "fp32", BRAIN: "bf16"}
ROWS = 4096
EPS = 1e-5


def norm_case(
    op: str, N: int, x_dtype: torch.dtype, w_dtype: torch.dtype, add: bool = False, bias: bool = False, rows: int = ROWS
) -> Case:
    """Forward and backward of a norm; `add`: with the residual and its gradient."""

    def call() -> None:
        ops = torch.ops.gptperf
        x, weight = torch.empty(rows, N, dtype=x_dtype), torch.empty(N, dtype=w_dtype)
        other = torch.empty_like(x) if add else None
        if op == "rms_norm":
            y, _, rstd = ops.rms_norm(x, other, weight, EPS)
            ops.rms_norm_backward(y, other, x, weight, rstd)
        else:
            y, _, mean, rstd = ops.layer_norm(x, other, weight, torch.empty_like(weight) if bias else None, EPS)
            ops.layer_norm_backward(y, other, x, weight, mean, rstd, w_dtype if bias else None)

    words = [op, f"{rows} x {N}", SHORT[x_dtype], f"weight {SHORT[w_dtype]}", "add" * add, "bias" * bias]
    return Case(" ".join(filter(None, words)), call, N == 2048 and x_dtype != FULL, N == 16384)


def rope_case(
    heads: tuple[int, int, int], dtype: torch.dtype, w_dtype: torch.dtype | None, interleaved: bool, T: int = ROWS
) -> Case:
    """Forward and backward of rope, with QK-norm if w_dtype is given; the gradients have the strides of attention."""
    H, K, D = heads

    def call() -> None:
        qkv, cos = torch.empty(2, T, (H + 2 * K) * D, dtype=dtype), torch.empty(T, D // 2)
        weight = None if w_dtype is None else torch.empty(D, dtype=w_dtype)
        outs = torch.ops.gptperf.rope(qkv, cos, cos, H, K, weight, weight, EPS, interleaved)
        grads = [x.view(2, x.shape[2], T, D).transpose(1, 2) for x in outs]
        torch.ops.gptperf.rope_backward(*grads, qkv if w_dtype else None, cos, cos, weight, weight, EPS, interleaved)

    norm = f"norm {SHORT[w_dtype]}" if w_dtype else ""
    words = ["rope", "/".join(map(str, heads)), f"T {T}", SHORT[dtype], norm, "interleaved" * interleaved]
    return Case(" ".join(filter(None, words)), call, D == 128 and dtype != FULL)


def rope_in_place_case(heads: tuple[int, int, int], w_dtype: torch.dtype | None, interleaved: bool) -> Case:
    """Rotation in attention of a packed projection, which leaves the values where they are."""
    H, K, D = heads

    def call() -> None:
        qkv, cos = torch.empty(2, ROWS, (H + 2 * K) * D, dtype=BRAIN), torch.empty(ROWS, D // 2)
        parts = qkv.unflatten(-1, (H + 2 * K, D)).split([H, K, K], dim=2)[:2]
        weights = (None, None) if w_dtype is None else (torch.empty(D, dtype=w_dtype),) * 2
        given = (cos, cos), weights, EPS, interleaved
        out = parts if w_dtype is None else torch.empty(2, ROWS, H + K, D, dtype=BRAIN).split([H, K], dim=2)
        rotate(qkv, *given, out, None)
        rotate_back(parts, None, qkv if w_dtype else None, *given, qkv)

    words = ["rope in place", "/".join(map(str, heads)), f"norm {SHORT[w_dtype]}" if w_dtype else ""]
    return Case(" ".join(filter(None, [*words, "interleaved" * interleaved])), call)


def activation_case(name: str, F: int, dtype: torch.dtype) -> Case:
    def call() -> None:
        x = torch.empty(ROWS, 2 * F if name == "swiglu" else F, dtype=dtype)
        dy = torch.ops.gptperf.activation(x, name)
        for product in (False, True):
            torch.ops.gptperf.activation_backward(dy, x, name, product)

    return Case(f"{name} {F} {SHORT[dtype]}", call, F == 2048 and dtype != FULL)


def cross_entropy_case(V: int, dtype: torch.dtype, cap: float = 0.0) -> Case:
    """16 rows of 16 columns, because the matrix products really run; the kernels do not depend on these sizes."""

    def call() -> None:
        x, weight, targets = torch.zeros(16, 16, dtype=dtype), torch.zeros(V, 16, dtype=dtype), torch.zeros(16).long()
        ops = torch.ops.gptperf
        ops.linear_cross_entropy(x, weight, targets, -100, False, False, cap)
        loss, dx, dweight, scale = ops.linear_cross_entropy(x, weight, targets, -100, True, True, cap)
        ops.linear_cross_entropy_backward(loss, scale, dx, dweight, dtype)

    capped = " capped" if cap else ""
    return Case(f"linear_cross_entropy{capped} {V} {SHORT[dtype]}", call, V == 32000 and dtype != FULL, V == 128256)


def quantize_case(M: int, N: int, dtype: torch.dtype, e5m2: bool, columns: bool, fresh: bool) -> Case:
    def call() -> None:
        x, scale = torch.empty(M, N, dtype=dtype), torch.empty(4)
        torch.ops.gptperf.quantize(x, scale, e5m2, fresh or not columns, columns, None if fresh else scale)

    words = ["quantize", f"{M} x {N}", SHORT[dtype], "e5m2" * e5m2, "columns" * columns, "fresh" * fresh]
    return Case(" ".join(filter(None, words)), call)


def quantize_swiglu_case(F: int, dtype: torch.dtype, e5m2: bool) -> Case:
    def call() -> None:
        gate_up, dy, scale = torch.empty(ROWS, 2 * F, dtype=dtype), torch.empty(ROWS, F, dtype=dtype), torch.empty(4)
        torch.ops.gptperf.quantize_swiglu(gate_up, scale)
        torch.ops.gptperf.quantize_swiglu_backward(dy, gate_up, scale, scale, e5m2)

    return Case(f"quantize_swiglu {F} {SHORT[dtype]} {'e5m2' if e5m2 else 'e4m3'}", call)


def adamw_case(n: int, dtype: torch.dtype | None, moments: torch.dtype = FULL) -> Case:
    def call() -> None:
        master, moment = torch.empty(n), torch.empty(n, dtype=moments)
        compute = None if dtype is None else torch.empty(n, dtype=dtype)
        seeds = None if moments == FULL else torch.empty(-(-n // 64), dtype=torch.int32)
        numbers = (torch.empty(6), 0.9, 0.95, 1e-8, 0.1)
        grad = compute if dtype == BRAIN and seeds is None else master
        torch.ops.gptperf.adamw(master, grad, moment, moment, compute, *numbers, seeds)

    return Case(f"adamw {n} {SHORT[dtype] if dtype else 'no copy'} moments {SHORT[moments]}", call)


def sum_shares_case(n: int, dtype: torch.dtype, rank: int, add: bool) -> Case:
    def call() -> None:
        out, own = torch.empty(n), torch.empty(n, dtype=dtype)
        torch.ops.gptperf.sum_shares(out, own, torch.empty(3, n, dtype=dtype), rank, add)
        torch.ops.gptperf.accumulate(out, own)

    return Case(f"sum_shares {n} {SHORT[dtype]} {rank} {add}", call)


SQUARES = ((24, 2048, 5632), (12, 768, 768))


def symmetric_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    def call() -> None:
        x = torch.empty(shape, dtype=dtype)
        gram = torch.ops.gptperf.symmetric_matmul(x, None, None, 1.0, 0.0)
        torch.ops.gptperf.symmetric_matmul(gram, None, gram, -1.5, 0.5)

    return Case(f"symmetric_matmul {shape} {SHORT[dtype]}", call)


def cases(capability: int) -> Iterator[Case]:
    """Yields the cases for a GPU of this compute capability; see the module's docstring."""
    half = HALF if capability < 80 else BRAIN
    yield from every_case() if capability == 90 else representative_cases(half)
    yield from float8_cases(capability) if capability >= 89 else ()
    for dtype in (None, BRAIN, HALF, FULL) if capability == 90 else (None, half):
        for n in (1 << 20, 12345):
            yield adamw_case(n, dtype)
    yield adamw_case(1 << 20, half, BRAIN)
    if capability >= 80:
        for dtype, shapes in ((HALF, (*SQUARES, (2, 123, 70))), (FULL, SQUARES)):
            yield from (symmetric_case(shape, dtype) for shape in shapes)
    yield from (Case(label, call, widest=widest) for label, call, widest in generation_calls(capability, half))
    for dtype in (half, FULL):
        yield from (sum_shares_case(1 << 20, dtype, rank, add) for rank, add in ((0, False), (2, True)))


def every_case() -> Iterator[Case]:
    for N in (123, 512, 768, 1024, 2048, 4096, 8192, 16384):
        for add in (False, True):
            yield norm_case("rms_norm", N, BRAIN, BRAIN, add)
            yield norm_case("layer_norm", N, BRAIN, BRAIN, add, bias=True)
        yield norm_case("rms_norm", N, FULL, FULL, add=True)
        yield norm_case("layer_norm", N, FULL, FULL, add=True, bias=True)
    for N in (123, 768, 2048, 8192):
        yield norm_case("layer_norm", N, HALF, HALF, add=True, bias=True)
        yield norm_case("rms_norm", N, BRAIN, FULL, add=True)
        yield norm_case("layer_norm", N, BRAIN, FULL, add=True, bias=True)
    yield norm_case("layer_norm", 2048, BRAIN, BRAIN)
    yield norm_case("layer_norm", 2048, BRAIN, BRAIN, add=True, bias=True, rows=1)
    for interleaved in (False, True):
        for heads in ((16, 16, 128), (32, 8, 128), (12, 12, 64), (7, 1, 72)):
            yield rope_case(heads, BRAIN, BRAIN, interleaved)
            yield rope_case(heads, BRAIN, None, interleaved)
        for x, w in ((HALF, HALF), (FULL, FULL), (BRAIN, FULL)):
            yield rope_case((32, 8, 128), x, w, interleaved)
        yield rope_case((7, 1, 72), FULL, FULL, interleaved)
        yield rope_in_place_case((16, 16, 128), None, interleaved)
        yield rope_in_place_case((32, 8, 128), FULL, interleaved)
    yield rope_case((16, 16, 128), BRAIN, BRAIN, False, T=1)
    for dtype in (BRAIN, HALF, FULL):
        yield from (activation_case("swiglu", F, dtype) for F in (2048, 5632, 14336))
        yield from (activation_case(name, 2048, dtype) for name in (ACTIVATIONS if dtype == BRAIN else ("gelu",)))
        yield from (cross_entropy_case(V, dtype) for V in (257, 32000, 50257, 50304, 128256))
    yield from (cross_entropy_case(V, BRAIN, cap=15.0) for V in (32000, 50257, 50304))


def float8_cases(capability: int) -> Iterator[Case]:
    """The kernels that write 8-bit floats, which a GPU has from capability 8.9."""
    for e5m2 in (False, True):
        for columns, fresh in ((False, True), (True, True), (True, False)):
            yield quantize_case(ROWS, 2048, BRAIN, e5m2, columns, fresh)
        yield quantize_swiglu_case(5632, BRAIN, e5m2)
    if capability == 90:
        yield quantize_case(1008, 144, BRAIN, False, True, True)
        yield quantize_case(ROWS, 2048, FULL, True, True, True)
        yield quantize_swiglu_case(144, BRAIN, True)


def representative_cases(half: torch.dtype) -> Iterator[Case]:
    for N in (123, 512, 768, 1024, 2048, 4096, 8192, 16384):
        yield norm_case("layer_norm", N, half, half, add=True, bias=True)
    for N in (123, 2048, 8192):
        yield norm_case("rms_norm", N, half, half, add=True)
        yield norm_case("layer_norm", N, FULL, FULL, add=True, bias=True)
    for heads in ((16, 16, 128), (7, 1, 72)):
        for interleaved in (False, True):
            yield rope_case(heads, half, half, interleaved)
    yield rope_case((12, 12, 64), half, half, False)
    yield rope_case((16, 16, 128), half, None, False)
    yield from (activation_case("swiglu", F, half) for F in (2048, 14336))
    yield activation_case("gelu", 3072, half)
    yield from (cross_entropy_case(V, half) for V in (257, 32000, 50257, 50304, 128256))
    yield from (cross_entropy_case(V, half, cap=15.0) for V in (50257, 50304))


def jit_functions() -> list[str]:
    """Returns the name of every Triton function of gptperf.kernels; imports all of its modules."""
    package = importlib.import_module("gptperf.kernels")
    found = set()
    for module in pkgutil.iter_modules(package.__path__, "gptperf.kernels."):
        values = vars(importlib.import_module(module.name)).values()
        found |= {function_name(value) for value in values if isinstance(value, JITFunction)}
    return sorted(found)


def main(targets: list[str]) -> None:
    if len(targets) != 1:  # a process for each GPU, because `launch` remembers the kernels of the first one
        for target in targets:
            subprocess.run([sys.executable, __file__, target], check=True)
        return
    print(json.dumps({"arch": targets[0], "functions": jit_functions()}), flush=True)
    capability = int(targets[0].removeprefix("sm_"))
    launch._launches_early = lambda device: capability >= 90
    for line in compile_cases(capability, cases(capability)):
        print(json.dumps({"arch": targets[0], **line}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
