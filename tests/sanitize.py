"""Every kernel under NVIDIA's compute-sanitizer: `python tests/sanitize.py memcheck racecheck initcheck`.

Each runs forward and backward at an odd and at an even shape; without a tool's name, by itself. Without PyTorch's cache
each tensor is an allocation of its own, so that a step beyond its end is seen. memcheck and racecheck look at our
kernels alone; initcheck has to follow what other kernels write too.
"""

import importlib
import os
import pkgutil
import subprocess
import sys

import torch
import triton
from kernel_cases import VARIANTS, build, gradients_for, kernel, run

import gptperf.kernels
from gptperf.kernels.adamw import adamw

SHAPES = [(7, 123), (16, 768)]


def kernel_names() -> list[str]:
    """Of every Triton kernel of the package."""
    modules = [
        importlib.import_module(x.name) for x in pkgutil.iter_modules(gptperf.kernels.__path__, "gptperf.kernels.")
    ]
    return sorted(
        {k for m in modules for k, x in vars(m).items() if isinstance(x, triton.JITFunction) and "_kernel" in k}
    )


def run_all() -> None:
    """Run them."""
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
    torch.cuda.synchronize()
    print("adamw")


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
        run_all()
    return max([sanitize(tool) for tool in sys.argv[1:]], default=0)


if __name__ == "__main__":
    sys.exit(main())
