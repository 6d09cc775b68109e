"""From a checked configuration to the objects of a run: device, data, model, compiled model."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from gptperf.config import DataConfig, ModelConfig, SystemConfig
from gptperf.data.format import DatasetManifest, read_manifest
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource, resolve_dataset
from gptperf.distributed.process import Process
from gptperf.errors import DataError, DeviceError
from gptperf.model import GPT
from gptperf.ops import Ops

__all__ = ["DTYPES", "build_model", "check_device", "compile_model", "open_dataset"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BUILT_IN_DATASET = "python_stdlib"


def check_device(system: SystemConfig, device: torch.device) -> None:
    """Set what has to be set before the first kernel, and see that the device can compute in the dtype.

    Raises:
        DeviceError: bfloat16 on a GPU without it.
    """
    if system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda" and system.compute_dtype == "bfloat16":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            raise DeviceError(
                f"dtype = 'bfloat16': {name} (sm_{major}{minor}) has no bfloat16 units; nearest: 'float16'"
            )


def open_dataset(
    data: DataConfig, model: ModelConfig, process: Process
) -> tuple[DatasetManifest, TokenSource, TokenSource]:
    """Manifest, training and validation tokens of a data set, all checked; the built-in one is prepared if missing.

    Raises:
        DataError: missing, damaged, or with a token id that the model's vocabulary does not hold.
    """
    built_in = Path(data.data_dir) / BUILT_IN_DATASET
    if data.dataset == BUILT_IN_DATASET and process.is_main and not os.path.exists(built_in):
        try:
            prepare(BUILT_IN_DATASET, data_dir=data.data_dir)
        except DataError:
            if not os.path.exists(built_in):  # another run was faster
                raise
    process.barrier()
    path = resolve_dataset(data.dataset, data.data_dir)
    manifest = read_manifest(path)
    if manifest.tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{path}: found tokenizer {manifest.tokenizer.name} with {manifest.tokenizer.vocab_size:,} ids, and "
            f"vocab_size = {model.vocab_size:,}; wanted --vocab_size={manifest.tokenizer.vocab_size} or more"
        )
    train, val = (TokenSource.open(path, split, vocab_size=model.vocab_size) for split in ("train", "val"))
    return manifest, train, val


def build_model(model: ModelConfig, ops: Ops, device: torch.device, seed: int) -> GPT:
    """The model on its device with float32 weights, the same in every process."""
    torch.manual_seed(seed)
    with device:
        return GPT(model, ops)


def compile_model(model: GPT, system: SystemConfig, device: torch.device) -> str:
    """Compile the model in place where it was asked for and can be.

    Returns:
        "model", "block", or why it is not compiled, for the log.
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
