"""The program that runs every kernel under compute-sanitizer does run every kernel; here in the interpreter."""

from typing import Any

import pytest
import sanitize
import torch
from triton.runtime.interpreter import InterpretedFunction

from gptperf.kernels import draw


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_every_kernel_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, interpret = set[str](), InterpretedFunction.run

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.add(kernel.fn.__name__)
        interpret(kernel, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(draw, "CHUNK", 64)  # sorting takes the interpreter seconds
    monkeypatch.setattr(draw, "KEYS", 64)
    shapes, dtypes = [(3, 20)], [torch.float32]
    sanitize.run_variants(shapes, dtypes, classes=40)
    sanitize.run_optimizers(shapes, dtypes)
    sanitize.run_quantizing(shapes, dtypes)
    sanitize.run_generation(dtypes, [150])
    assert launched == set(sanitize.kernel_names())
