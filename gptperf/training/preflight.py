"""Checks before a run spends GPU time: device, plan, data set, tokenizer, folder, checkpoint, disk and peak."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptperf import flops
from gptperf.checkpoint import Checkpoint
from gptperf.config import Config, SystemConfig
from gptperf.data.format import TokenizerInfo
from gptperf.data.loader import validation_batches
from gptperf.data.mixture import MixedTokens, order_of, parts_of
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import NoVocabularyError, Tokenizer, read_vocabulary, restore_tokenizer
from gptperf.distributed.process import Process
from gptperf.errors import DeviceError, OutOfMemoryError
from gptperf.files import check_space
from gptperf.flops.float8 import float8_flops
from gptperf.formats import counted
from gptperf.hardware import Peak, ceiling_cache, gpu_state, match_gpu, peak_flop_s
from gptperf.hardware.ceilings import ceiling_flop_s
from gptperf.monitor.console import Console
from gptperf.monitor.run_lock import RunLock
from gptperf.monitor.throughput import Throughput
from gptperf.plan import Plan, plan, refusal, unplannable
from gptperf.plan.memory import strategy_of
from gptperf.tasks import Task, TaskRequests, encode_task, load_tasks
from gptperf.training.cuda_graph import check_graphs
from gptperf.training.dataset import open_dataset, verify_all
from gptperf.training.evaluation import validation_keys
from gptperf.training.float8 import check_float8
from gptperf.training.resume import find_checkpoint

__all__ = ["Inputs", "check_device", "check_disk", "check_inputs", "check_plan", "find_peak", "throughput_of"]


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run."""

    plan: Plan | None
    """Plan of the run; None without a GPU that `gptperf.plan` can plan for."""
    tokenizer_info: TokenizerInfo
    """The tokenizer of the data."""
    train_tokens: TokenSource | MixedTokens
    val_tokens: TokenSource | MixedTokens
    vocabulary: dict[str, bytes]
    """The files of the data set's tokenizer, which every checkpoint gets."""
    tokenizer: Tokenizer | None
    """The tokenizer for the sample; None if the run prints no sample, and on every rank but the main one."""
    checkpoint: Checkpoint | None
    """The checkpoint that the run starts from."""
    tasks: list[TaskRequests]
    """The tasks of `eval_tasks`, encoded; the same on every rank."""


def check_inputs(config: Config, process: Process, console: Console, stack: contextlib.ExitStack) -> Inputs:
    """Checks plan, data and folder, and finds the checkpoint to start from. Collective: every rank must call it.

    Args:
        config: configuration of the run.
        process: this rank.
        console: gets the messages about checkpoints that are skipped or moved.
        stack: holds the lock of the run's folder, which the main rank takes.

    Raises:
        ConfigError, DeviceError, OutOfMemoryError, DataError, CheckpointError, DiskError: a check failed.
    """
    check_float8(config, process.device)
    check_graphs(config, process.device.type)
    planned = check_plan(config, process)
    loaded = load_tasks([name.strip() for name in config.train.eval_tasks.split(",") if name.strip()])
    train_tokens, val_tokens = open_dataset(config.data, config.model, process)
    order_of(train_tokens, config.model.block_size, config.train.seed)  # raises if the data is too short
    info = parts_of(train_tokens)[0].source.manifest.tokenizer
    vocabulary = read_vocabulary(train_tokens.path, info)
    tokenizer = None
    if process.is_main and config.log.sample_tokens:
        tokenizer = _sample_tokenizer(info, vocabulary, train_tokens.path, console)
        vocabulary = vocabulary or dict(tokenizer.files if tokenizer is not None else {})
    out_dir = Path(config.train.out_dir)
    if process.is_main:
        stack.enter_context(RunLock(out_dir))
    for part in parts_of(val_tokens):
        validation_batches(part.source, **validation_keys(config, process))  # raises if the split is too short
    if config.data.verify_data == "full":
        verify_all([train_tokens, val_tokens], process, console)
    tasks = _encoded(loaded, config.model.block_size, info, vocabulary, train_tokens.path)
    found = find_checkpoint(config, out_dir / "checkpoints", process, console)
    return Inputs(planned, info, train_tokens, val_tokens, vocabulary, tokenizer, found, tasks)


def _encoded(
    tasks: Sequence[Task], block_size: int, info: TokenizerInfo, vocabulary: dict[str, bytes], path: Path
) -> list[TaskRequests]:
    """Encodes the tasks of `eval_tasks` with the tokenizer of the data.

    Raises:
        DataError: an item does not fit `block_size`, or the tokenizer has no text.
        DeviceError: a package of the tokenizer is not installed.
    """
    if not tasks:
        return []
    tokenizer = restore_tokenizer(info, vocabulary, path)
    return [encode_task(task, tokenizer, block_size) for task in tasks]


def _sample_tokenizer(
    info: TokenizerInfo, vocabulary: dict[str, bytes], path: Path, console: Console
) -> Tokenizer | None:
    """Returns the tokenizer of a data set, or None with a warning where it cannot be loaded: only the sample needs it.

    Raises:
        DataError: the vocabulary is not the one that encoded the data.
    """
    try:
        return restore_tokenizer(info, vocabulary, path)
    except (DeviceError, NoVocabularyError) as error:
        console.warning(f"the run will print no sample of text: {error}")
        return None


def check_device(system: SystemConfig, device: torch.device) -> None:
    """Applies the settings that must precede the first kernel, and checks that the device supports the dtype.

    Raises:
        DeviceError: the dtype is bfloat16 and the GPU does not support it.
    """
    if system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda" and system.compute_dtype == "bfloat16":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            raise DeviceError(
                f"dtype = 'bfloat16': {name} (sm_{major}{minor}) does not support bfloat16; nearest: --dtype=float16"
            )


def check_plan(config: Config, process: Process) -> Plan | None:
    """Returns the plan of this run on this GPU, or None without a GPU that `gptperf.plan` can plan for.

    Raises:
        OutOfMemoryError: the run does not fit according to its plan, and `ignore_plan` is off. The message names
            remedies.
    """
    if process.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(process.device)
    reported_gb = properties.total_memory / 1e9
    gpu = match_gpu(properties.name, reported_gb)
    if gpu is None or unplannable(config, gpu) is not None:
        return None
    planned = plan(
        config,
        gpu,
        num_gpus=process.world_size,
        strategy=strategy_of(config),
        recompute=config.system.recompute,
        reported_gb=reported_gb,
    )
    if not planned.fits and not config.system.ignore_plan:
        raise OutOfMemoryError(refusal(config, gpu, planned, reported_gb))
    return planned


def check_disk(out_dir: Path, parameters: int, keep_checkpoints: int, warn: Callable[[str], object]) -> None:
    """Checks that the disk has room for two checkpoints, and warns if it has less room than the run will use.

    Raises:
        DiskError: there is no room for two checkpoints.
    """
    fit = check_space(out_dir, 12 * parameters)  # a float32 master weight and two moments for each parameter
    if fit < keep_checkpoints + 2:  # `keep_checkpoints`, the best one, and the one that is being written
        warn(f"{out_dir}: room for {counted(fit, 'checkpoint')}, keep_checkpoints = {keep_checkpoints}")


def find_peak(config: Config, device: torch.device) -> Peak | None:
    """Returns the peak that the MFU refers to, or None if it is not known.

    Raises:
        DeviceError: the GPU's tensor cores do not support the compute dtype.
    """
    system = config.system
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = match_gpu(properties.name, properties.total_memory / 1e9)
    return peak_flop_s(gpu, system.peak_dtype, basis=system.peak_basis, peak_tflops=system.peak_tflops)


def _find_ceiling(config: Config, device: torch.device, say: Callable[[str], object]) -> float | None:
    """Returns the FLOP/s of this card on the model's matmuls alone, if `gptperf.hardware --measure` has measured them.

    Args:
        config: configuration of the run.
        device: device of this rank.
        say: called with a line about a power cap below the default, or about a measurement that is not valid here.
    """
    if device.type != "cuda" or flops.uncountable_flops(config.model) is not None:
        return None
    if config.data.document_mask or min(config.model.windows) < config.model.block_size:
        return None  # the attention of the ceilings has neither windows nor documents
    if config.system.matmul_dtype == "fp8":
        return None  # the ceilings are of the compute dtype
    properties = torch.cuda.get_device_properties(device)
    state = gpu_state(f"GPU-{properties.uuid}")
    note = state.note()
    if note is not None:
        say(note)
    model, dtype, batch_size = config.model, config.system.compute_dtype, config.train.batch_size
    ceilings = ceiling_cache.load(
        model,
        batch_size,
        dtype,
        properties.name,
        state.driver,
        torch.__version__,
        power_cap_w=state.power_cap_w,
        say=say,
    )
    return None if ceilings is None else ceiling_flop_s(ceilings, flops.flops_per_token(model))


def throughput_of(config: Config, process: Process, peak: Peak | None, say: Callable[[str], object]) -> Throughput:
    """Returns the object that computes the speed of this run, relative to the peak and to the card's measured ceiling.

    Args:
        config: configuration of the run.
        process: this rank.
        peak: peak of one GPU.
        say: called with lines about the card (see `_find_ceiling`).
    """
    ceiling = _find_ceiling(config, process.device, say)
    return Throughput(
        config.model,
        config.tokens_per_iter,
        process.world_size,
        peak,
        ceiling,
        config.system.recompute,
        float8_flops(config) if flops.uncountable_flops(config.model) is None else 0,
    )
