"""Every kernel under NVIDIA's compute-sanitizer.

    PYTHONPATH=.:tests/helpers python tests/kernels/sanitize.py memcheck racecheck initcheck

Each kernel runs at odd and at even shapes, forward and backward; without the name of a tool, the kernels run without a
sanitizer. PyTorch's cache is off, so that each tensor is an allocation of its own and an access beyond its end is seen.
memcheck and racecheck look at our kernels alone; initcheck must follow the writes of other kernels too. Matrix products
are replaced with sums: initcheck does not see what cuBLAS writes through the tensor memory accelerator, and racecheck
aborts in the kernels of cuBLAS.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from unittest.mock import patch

import test_kernels_decode_attention as attention
import test_kernels_decode_linear as layers
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, VARIANTS, build, gradients_for, kernel, run
from torch import Tensor
from triton.runtime import KernelInterface

import gptperf.kernels
from gptperf.kernels.accumulate import accumulate
from gptperf.kernels.adamw import adamw
from gptperf.kernels.decode_attention import decode_attention
from gptperf.kernels.decode_linear import decode_linear
from gptperf.kernels.draw import draw
from gptperf.kernels.quantize import quantize
from gptperf.kernels.quantize_swiglu import quantize_swiglu, quantize_swiglu_backward
from gptperf.kernels.rope import rotate, rotate_back
from gptperf.kernels.sum_shares import sum_shares
from gptperf.kernels.symmetric_matmul import symmetric_matmul

SHAPES = ((7, 123), (16, 768))
DTYPES = (torch.bfloat16, torch.float32)


def kernel_names() -> list[str]:
    """Returns the name of every Triton kernel of the package."""
    modules = [
        importlib.import_module(x.name) for x in pkgutil.iter_modules(gptperf.kernels.__path__, "gptperf.kernels.")
    ]
    return sorted({k for m in modules for k, x in vars(m).items() if isinstance(x, KernelInterface) and "_kernel" in k})


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """torch.mm as elementwise products and short sums; a may have more dimensions."""
    parts = zip(a.float().split(16, -1), b.float().split(16), strict=True)  # longer ones meet in memory never written
    result = sum((x[..., None] * y).sum(-2) for x, y in parts).to(out_dtype or a.dtype)
    return result if out is None else out.copy_(result)


def leave_out_cublas() -> None:
    """Give PyTorch's matrix products that the ops call other bodies."""
    torch.mm = Tensor.__matmul__ = product
    torch.addmm = lambda c, a, b, out, **_: out.copy_(c + product(a, b, torch.float32))
    F.linear = lambda x, w, b=None: product(x, w.t()) if b is None else product(x, w.t()) + b


def run_variants(
    shapes: Sequence[tuple[int, int]] = SHAPES, dtypes: Sequence[torch.dtype] = DTYPES, classes: int = 5000
) -> None:
    """Runs the ops that have a gradient, forward and backward."""
    for variant, op in VARIANTS.items():
        for shape in shapes:
            for dtype in dtypes:
                case = build(variant, shape, dtype, DEVICE, classes=classes + shape[0])
                run(kernel(op), case, gradients_for(case))
        done(variant)
    for dtype in dtypes:
        for interleaved in (False, True):
            _rotate_in_place(dtype, interleaved)
    done("rope in place")


def _rotate_in_place(dtype: torch.dtype, interleaved: bool) -> None:
    """Rotates the queries and keys of a packed projection where they are, as packed attention does."""
    T, H, K, D = 9, 4, 2, 16
    qkv, tables = torch.rand(2, T, (H + 2 * K) * D, device=DEVICE).to(dtype), torch.rand(2, T, D // 2, device=DEVICE)
    parts = qkv.unflatten(-1, (H + 2 * K, D)).split([H, K, K], dim=2)[:2]
    options = tuple(tables), (None, None), 1e-5, interleaved
    rotate(qkv, *options, parts, None)
    rotate_back(parts, None, None, *options, qkv)


def run_optimizers(shapes: Sequence[tuple[int, int]] = SHAPES, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Runs the update of AdamW, the sums of gradients and of shards, and the products of Muon."""
    for rows, columns in shapes:
        numel = rows * columns
        tensors = [torch.rand(numel, device=DEVICE) for _ in range(4)]
        copy = torch.empty(numel, device=DEVICE, dtype=torch.bfloat16)
        scalars = torch.tensor([1e-3, 1.0, 0.1, 0.05, 1.0, 0.0], device=DEVICE)
        adamw(*tensors, copy, scalars, 0.9, 0.95, 1e-8, 0.1)
        sum_shares(tensors[0], tensors[1], torch.rand(3, numel, device=DEVICE), 1, True)
        for dtype in dtypes:
            accumulate(tensors[0], tensors[1].to(dtype))
            gram = symmetric_matmul(torch.rand(2, rows, columns, device=DEVICE, dtype=dtype))
            symmetric_matmul(gram, None, gram, 0.5, -1.5)
    done("adamw, accumulate, sum_shares, symmetric_matmul")


def run_quantizing(shapes: Sequence[tuple[int, int]] = SHAPES, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Runs the ops that write 8-bit floats, with a scale that is given and one that is found."""
    for shape in shapes:
        for dtype in dtypes:
            x, gate_up = (torch.randn(shape[0], n * shape[1], device=DEVICE).to(dtype) for n in (1, 2))
            for value in (0.0, 2.0):
                scale = torch.full((4,), value, device=DEVICE)
                for e5m2 in (False, True):
                    quantize(x, scale, e5m2=e5m2, columns=True)
                    quantize_swiglu_backward(x, gate_up, scale, scale, e5m2=e5m2)
                quantize_swiglu(gate_up, scale)
    done("quantize, quantize_swiglu")


def run_generation(dtypes: Sequence[torch.dtype] = DTYPES, vocabularies: Sequence[int] = (65, 257, 50257)) -> None:
    """Runs the ops of a decode step: with heads that programs share or not, every norm and activation, every draw."""
    for dtype in dtypes:
        for programs in (1, attention.module.PROGRAMS):
            with patch.object(attention.module, "PROGRAMS", programs):
                for options in attention.OPTIONS:
                    attention.called(decode_attention, attention.arguments(options, dtype))
        for options in layers.OPTIONS:
            decode_linear(**layers.arguments(options, dtype))
        for V in vocabularies:
            logits, uniform = torch.randn(3, V + 7, device=DEVICE).to(dtype), torch.rand(3, device=DEVICE)
            for temperature, top_k, top_p in ((0.0, 0, 1.0), (0.8, 20, 1.0), (1.0, 50, 0.9)):
                draw(logits, uniform, V, temperature, top_k, top_p)
    done("decode_attention, decode_linear, draw")


def done(names: str) -> None:
    """Waits for the kernels and prints what has run."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(names, flush=True)


def sanitize(tool: str) -> int:
    """Run this program under a tool, and show what it says.

    Returns:
        The exit status: 0 if nothing was found.
    """
    names = [] if tool == "initcheck" else [f"--kernel-name=kne={name}" for name in kernel_names()]
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", "--show-backtrace=no", *names]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(tool, flush=True)
    return subprocess.run([*command, sys.executable, __file__], env=environment).returncode


def main() -> int:
    """The tools on the command line, one after another."""
    if not sys.argv[1:]:
        leave_out_cublas()
        run_variants()
        run_optimizers()
        if torch.cuda.get_device_capability() >= (8, 9):  # has 8-bit floats
            run_quantizing()
        run_generation()
    return max([sanitize(tool) for tool in sys.argv[1:]], default=0)


if __name__ == "__main__":
    sys.exit(main())
