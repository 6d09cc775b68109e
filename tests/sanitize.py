"""Every kernel once, forward and backward, at an odd and at an even shape: a program for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --kernel-regex kns=_kernel python tests/sanitize.py

and the same with `--tool racecheck` and `--tool initcheck`. Without PyTorch's cache each tensor is an allocation of its
own, so that a step beyond its end is seen; the filter leaves out the kernels of PyTorch and cuBLAS.
"""

import sys

import torch
from kernel_cases import VARIANTS, build, gradients_for, kernel, run

from gptperf.kernels.adamw import adamw

SHAPES = [(7, 123), (16, 768)]


def main() -> int:
    """Run them all."""
    for variant, op in VARIANTS.items():
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                case = build(variant, shape, dtype, "cuda", classes=5000 + shape[0])
                run(kernel(op), case, gradients_for(case))
    for numel in (1000, 4096):
        tensors = [torch.rand(numel, device="cuda") for _ in range(4)]
        copy = torch.empty(numel, device="cuda", dtype=torch.bfloat16)
        scalars = torch.tensor([1e-3, 1.0, 0.1, 0.05, 1.0, 0.0], device="cuda")
        adamw(*tensors, copy, scalars, 0.9, 0.95, 1e-8, 0.1)
    torch.cuda.synchronize()
    print(f"{len(VARIANTS)} variants of {len(set(VARIANTS.values()))} ops and adamw ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
