"""Builds and compiles the model of a run."""

import contextlib
import subprocess
import traceback
from collections.abc import Iterator

import torch

from gptperf.config import ModelConfig, SystemConfig
from gptperf.errors import DeviceError, GptperfError
from gptperf.model import GPT
from gptperf.ops import Ops

__all__ = ["DTYPES", "build_model", "compile_model", "compiler_errors"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def build_model(model: ModelConfig, ops: Ops, device: torch.device, seed: int) -> GPT:
    """Returns the model on its device with float32 weights, which are the same on every rank."""
    torch.manual_seed(seed)
    with device:
        return GPT(model, ops)


def compile_model(model: GPT, system: SystemConfig) -> str:
    """Compiles the model in place; the compiler itself runs in the first step.

    Returns:
        The scope, "model" or "block".
    """
    if system.compile_scope == "block":
        model.compile_blocks()
    else:
        model.compile()
    return system.compile_scope


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Raises an error of torch.compile or Triton in the body as a `DeviceError`.

    Such an error comes from the compiler's own classes, or is an error of a file or of a program that it uses. Errors
    of the code that was compiled pass unchanged.
    """
    try:
        yield
    except (GptperfError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, OSError, ImportError, ValueError, subprocess.SubprocessError) as error:
        if not _is_of_compiler(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise DeviceError(
            f"torch.compile failed ({type(error).__name__}: {lines[0][:300]}); --compile=False runs without it"
        ) from error


def _is_of_compiler(error: BaseException) -> bool:
    compilers = ("torch._dynamo", "torch._inductor", "triton")
    if type(error).__module__.startswith(compilers):
        return True
    if not isinstance(error, OSError | ImportError | subprocess.SubprocessError):
        return False
    modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    modules -= {"torch._dynamo.eval_frame", "torch._dynamo.external_utils"}  # they call the code that was compiled
    return any(name.startswith(compilers) for name in modules)
