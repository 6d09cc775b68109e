"""Every kernel under NVIDIA's compute-sanitizer: `python tests/kernels/sanitize.py memcheck racecheck initcheck`.

Each kernel runs forward and backward at an odd and at an even shape; without the name of a tool, the kernels run
without a sanitizer. PyTorch's cache is off, so that each tensor is an allocation of its own and an access beyond its
end is seen. memcheck and racecheck look at our kernels alone; initcheck must follow the writes of other kernels too.
Matrix products are replaced with sums: initcheck does not see what cuBLAS writes through the tensor memory accelerator,
and racecheck aborts in the kernels of cuBLAS.
"""

import importlib
import os
import pkgutil
import subprocess
import sys

import torch
import torch.nn.functional as F
import triton
from kernel_cases import VARIANTS, build, gradients_for, kernel, run
from torch import Tensor

import gptperf.kernels
from gptperf.kernels.adamw import adamw
from gptperf.kernels.sum_shares import sum_shares

SHAPES = [(7, 123), (16, 768)]


def kernel_names() -> list[str]:
    """Returns the name of every Triton kernel of the package."""
    modules = [
        importlib.import_module(x.name) for x in pkgutil.iter_modules(gptperf.kernels.__path__, "gptperf.kernels.")
    ]
    return sorted(
        {k for m in modules for k, x in vars(m).items() if isinstance(x, triton.JITFunction) and "_kernel" in k}
    )


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


def run_all() -> None:
    """Runs all kernels, forward and backward."""
    for variant, op in VARIANTS.items():
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                case = build(variant, shape, dtype, "cuda", classes=5000 + shape[0])
                run(kernel(op), case, gradients_for(case))
        torch.cuda.synchronize()
        print(variant, flush=True)
    for numel in (1000, 4096):
        tensors = [torch.rand(numel, device="cuda") for _ in range(4)]
        copy = torch.empty(numel, device="cuda", dtype=torch.bfloat16)
        scalars = torch.tensor([1e-3, 1.0, 0.1, 0.05, 1.0, 0.0], device="cuda")
        adamw(*tensors, copy, scalars, 0.9, 0.95, 1e-8, 0.1)
        sum_shares(tensors[0], tensors[1], torch.rand(3, numel, device="cuda"), 1, True)
    torch.cuda.synchronize()
    print("adamw, sum_shares")


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
        run_all()
    return max([sanitize(tool) for tool in sys.argv[1:]], default=0)


if __name__ == "__main__":
    sys.exit(main())
