"""Builds and compiles the model of a run."""

import importlib.util
import os
import shutil

import torch

from gptperf.config import ModelConfig, SystemConfig
from gptperf.model import GPT
from gptperf.ops import Ops

__all__ = ["DTYPES", "build_model", "compile_model"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def build_model(model: ModelConfig, ops: Ops, device: torch.device, seed: int) -> GPT:
    """Returns the model on its device with float32 weights, which are the same on every rank."""
    torch.manual_seed(seed)
    with device:
        return GPT(model, ops)


def compile_model(model: GPT, system: SystemConfig, device: torch.device) -> str:
    """Compiles the model in place if the configuration asks for it and a compiler is available.

    Returns:
        "model", "block", or "off" with the reason, for the log.
    """
    if not system.compile:
        return "off"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "off: torch.compile needs the package triton on a GPU"
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"off: torch.compile needs a C++ compiler on a CPU, and {compiler} is not on the path"
    if system.compile_scope == "block":
        model.compile_blocks()
    else:
        model.compile()
    return system.compile_scope
