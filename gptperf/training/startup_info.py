"""Facts about a run that its start-up report shows and its log records."""

import dataclasses
import platform

import torch

from gptperf import __version__, flops
from gptperf.config import Config, ModelConfig
from gptperf.data.format import TokenizerInfo
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.process import Process
from gptperf.formats import counted
from gptperf.hardware import Peak, no_peak_hint
from gptperf.model import prefers_cudnn
from gptperf.monitor.events import (
    StartupInfo,
)
from gptperf.monitor.throughput import theoretical
from gptperf.ops import unmeasured_versions
from gptperf.plan import STRATEGY_NAMES, Plan, find_gpu, plan, plan_lines, plan_record
from gptperf.plan.memory import strategy_of
from gptperf.registry import KINDS
from gptperf.training.engine import Engine

__all__ = ["startup_info"]

_PAYS = 0.97
"""Predicted time with fp8, relative to bfloat16, from which a note says that it does not pay."""
_COMPONENTS = (*KINDS, "bias", "weight_tying", "dropout", "qk_norm", "rope_scaling")


def startup_info(
    engine: Engine,
    tokenizer: TokenizerInfo,
    data: StartupInfo,
    peak: Peak | None,
    compiled: str,
    planned: Plan | None,
) -> StartupInfo:
    """Returns the facts about everything that was built, and the figures that follow without a measurement."""
    config, process = engine.config, engine.process
    model, train, optimizer = config.model, config.train, config.optimizer
    total = engine.weights.numel
    position = sum(p.numel() for name, p in engine.model.position.named_parameters())
    info: StartupInfo = {
        "total_parameters": total,
        "trainable_parameters": total,
        "non_embedding_parameters": total - position,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "n_head": model.n_head,
        "kv_heads": model.kv_heads,
        "block_size": model.block_size,
        "vocab_size": model.padded_vocab_size,
        "components": {key: getattr(model, key) for key in _COMPONENTS} | _derived(model),
        "kernels": engine.ops.chosen,
        "kernel_reasons": engine.ops.reasons,
        "batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "effective_batch_size": train.batch_size * train.gradient_accumulation_steps,
        "tokens_per_iter": config.tokens_per_iter,
        "max_iters": train.max_iters,
        "optimizer": "normuon" if optimizer.normuon else optimizer.optimizer,
        "learning_rate": optimizer.learning_rate,
        "min_lr": optimizer.min_lr,
        "lr_schedule": optimizer.lr_schedule,
        "warmup_iters": optimizer.warmup_iters,
        "weight_decay": optimizer.weight_decay,
        "grad_clip": optimizer.grad_clip,
        "dataset": config.data.dataset,
        "tokenizer": tokenizer.name,
        **data,
        "dtype": config.system.dtype,
        "parallelism": _parallelism(config, engine.weights.collectives),
        "compile": compiled,
        "versions": {"gptperf": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "notes": [*config.notes(), *data.get("notes", []), *filter(None, [unmeasured_versions(process.device.type)])],
    }
    uncountable = flops.uncountable_flops(model)
    if uncountable is not None:
        info["notes"] = [*info["notes"], f"no MFU: {uncountable}"]
    if planned is not None:
        info["plan"] = plan_record(planned)
        lines = [*plan_lines(planned), *_float8_pays(config, planned)]
        info["notes"] = [*info["notes"], *(f"plan: {line}" for line in lines)]
    info |= _hardware(process, config, peak, engine.ops.not_packed)
    info |= theoretical(model, peak, process.world_size)  # type: ignore[typeddict-item]
    return info


def _float8_pays(config: Config, planned: Plan) -> list[str]:
    """Returns a line on the predicted gain of fp8, if the run uses it."""
    if config.system.matmul_dtype != "fp8":
        return []
    other = plan(
        dataclasses.replace(config, system=config.system.without_fp8()),
        find_gpu(planned.gpu),
        num_gpus=planned.num_gpus,
        strategy=planned.strategy,
        recompute=planned.recompute,
    )
    ratio = planned.step_ms / other.step_ms
    pays = "" if ratio < _PAYS else "; it does not pay here: --matmul_dtype=dtype"
    return [f"fp8 takes {ratio:.2f} of the time of bfloat16{pays}"]


def _derived(model: ModelConfig) -> dict[str, object]:
    """Returns the properties of a model that follow from several keys, or from one that has no default."""
    names = ("attention_biases", "head_width", "ffn_width")
    return {name: getattr(model, name) for name in names} | {"activation": model.applied_activation}


def _parallelism(config: Config, collectives: Collectives) -> str:
    """Returns the strategy, the number of processes, and how data moves between them."""
    world_size = collectives.world_size
    if world_size == 1:
        return "single process"
    dtype = "float32" if collectives.widens else config.system.reduce_dtype
    reduced = "" if dtype == "float32" else f", gradients reduced in {dtype}"
    return f"{STRATEGY_NAMES[strategy_of(config)]} over {world_size} processes{reduced}{_moved_by(collectives)}"


def _moved_by(collectives: Collectives) -> str:
    if collectives.name == "copy_engine":
        return ", moved by copy engines"
    return f", moved by NCCL: {collectives.reason}" if collectives.device.type == "cuda" and collectives.reason else ""


def _hardware(process: Process, config: Config, peak: Peak | None, not_packed: str) -> StartupInfo:
    """Returns the fields of the startup info that describe the device.

    `not_packed` says why the op `packed_attention` does not run; "": it does.
    """
    if process.device.type != "cuda":
        threads = torch.get_num_threads()
        name = f"CPU ({platform.machine()}), {counted(threads, 'thread')}"
        return {"device": name, "num_gpus": 0, "peak_hint": "no MFU without a GPU"}
    properties = torch.cuda.get_device_properties(process.device)
    backend = config.model.attention_backend
    if backend == "sdpa":
        capability = torch.cuda.get_device_capability(process.device)
        backend += ", cuDNN first" if prefers_cudnn(capability) else ", in PyTorch's order"
        if prefers_cudnn(capability):
            backend += f", not packed: {not_packed}" if not_packed else ", packed"
    info: StartupInfo = {
        "attention_backend": backend,
        "device": properties.name,
        "num_gpus": process.world_size,
        "memory_gb": properties.total_memory / 1e9,
    }
    if peak is None:
        info["peak_hint"] = no_peak_hint(properties.name, config.system.peak_dtype, config.system.peak_basis)
    return info
