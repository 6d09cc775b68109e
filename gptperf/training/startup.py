"""What a run says of itself before its first step: the `StartupInfo` of console and log."""

import platform
from collections.abc import Callable

import torch

from gptperf import __version__, flops
from gptperf.config import Config
from gptperf.data.format import DatasetManifest
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.process import Process
from gptperf.errors import OutOfMemoryError
from gptperf.hardware import Peak, ceiling_cache, gpu_state, match_gpu, no_peak_hint, peak_flop_s
from gptperf.hardware.ceilings import ceiling_flop_s
from gptperf.model import prefers_cudnn
from gptperf.monitor.console import StartupInfo
from gptperf.monitor.throughput import Throughput, theoretical
from gptperf.ops import unmeasured_versions
from gptperf.plan import STRATEGY_NAMES, Plan, plan, plan_lines, plan_record, refusal, unplannable
from gptperf.plan.memory import strategy_of
from gptperf.registry import KINDS
from gptperf.training.engine import Engine

__all__ = ["against_plan", "check_plan", "find_ceiling", "find_peak", "startup_info", "throughput_of"]

_SHOWN = (*KINDS, "bias", "weight_tying", "dropout", "qk_norm")


def find_peak(config: Config, device: torch.device) -> Peak | None:
    """The peak that the MFU is taken against, or None where it is not known.

    Raises:
        DeviceError: the GPU's tensor cores do not have the compute dtype.
    """
    system = config.system
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = match_gpu(properties.name, properties.total_memory / 1e9)
    return peak_flop_s(gpu, system.peak_dtype, basis=system.peak_basis, peak_tflops=system.peak_tflops)


def find_ceiling(config: Config, device: torch.device, say: Callable[[str], object]) -> float | None:
    """FLOP/s of this card on the model's matmuls alone, where `python -m gptperf.hardware --measure` has found them.

    Args:
        config: of the run.
        device: of this process.
        say: takes a line about a power cap below the default, or a measurement that does not count here.
    """
    if device.type != "cuda" or flops.uncountable_flops(config.model) is not None:
        return None
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
    """The speed of this run, against the peak and, where it was measured, the ceiling of the card."""
    ceiling = find_ceiling(config, process.device, say)
    recompute = config.system.recompute
    return Throughput(config.model, config.tokens_per_iter, process.world_size, peak, ceiling, recompute)


def check_plan(config: Config, process: Process) -> Plan | None:
    """The plan of this run on this GPU, or None where there is nothing to plan with.

    Raises:
        OutOfMemoryError: the plan does not fit and `ignore_plan` is off; the remedies are named.
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


def against_plan(planned: Plan, tokens_per_sec: float | None, peak_gb: float) -> dict[str, float]:
    """Plan and actual side by side, of memory and, where it was measured, of speed."""
    found = {"planned_memory_gb": planned.memory.total_gb, "peak_gb": peak_gb}
    if tokens_per_sec is not None:
        found |= {"planned_tokens_per_sec": planned.tokens_per_sec, "tokens_per_sec": tokens_per_sec}
    return found


def startup_info(
    engine: Engine, manifest: DatasetManifest, peak: Peak | None, compiled: str, planned: Plan | None
) -> StartupInfo:
    """Everything that was built, and what follows from it before anything is measured."""
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
        "components": {key: getattr(model, key) for key in _SHOWN} | {"ffn_width": model.ffn_width},
        "kernels": engine.ops.chosen,
        "kernel_reasons": engine.ops.reasons,
        "batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "effective_batch_size": train.batch_size * train.gradient_accumulation_steps,
        "tokens_per_iter": config.tokens_per_iter,
        "max_iters": train.max_iters,
        "learning_rate": optimizer.learning_rate,
        "min_lr": optimizer.min_lr,
        "lr_schedule": optimizer.lr_schedule,
        "warmup_iters": optimizer.warmup_iters,
        "weight_decay": optimizer.weight_decay,
        "grad_clip": optimizer.grad_clip,
        "dataset": config.data.dataset,
        "tokenizer": manifest.tokenizer.name,
        "train_tokens": manifest.splits["train"].tokens,
        "val_tokens": manifest.splits["val"].tokens,
        "dtype": config.system.dtype,
        "parallelism": _parallelism(config, engine.weights.collectives),
        "compile": compiled,
        "versions": {
            "gptperf": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "notes": [*config.notes(), *filter(None, [unmeasured_versions(process.device.type)])],
    }
    info["components"]["activation"] = model.applied_activation
    uncountable = flops.uncountable_flops(model)
    if uncountable is not None:
        info["notes"] = [*info["notes"], f"no MFU: {uncountable}"]
    if planned is not None:
        info["plan"] = plan_record(planned)
        info["notes"] = [*info["notes"], *(f"plan: {line}" for line in plan_lines(planned))]
    info |= _hardware(process, config, peak)
    info |= theoretical(model, peak, process.world_size)  # type: ignore[typeddict-item]
    return info


def _parallelism(config: Config, collectives: Collectives) -> str:
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


def _hardware(process: Process, config: Config, peak: Peak | None) -> StartupInfo:
    if process.device.type != "cuda":
        name = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
        return {"device": name, "num_gpus": 0, "peak_hint": "no MFU without a GPU"}
    properties = torch.cuda.get_device_properties(process.device)
    backend = config.model.attention_backend
    if backend == "sdpa":
        cudnn = prefers_cudnn(torch.cuda.get_device_capability(process.device))
        backend += ", cuDNN first" if cudnn else ", in PyTorch's order"
    info: StartupInfo = {
        "attention_backend": backend,
        "device": properties.name,
        "num_gpus": process.world_size,
        "memory_gb": properties.total_memory / 1e9,
    }
    if peak is None:
        info["peak_hint"] = no_peak_hint(properties.name, config.system.peak_dtype, config.system.peak_basis)
    return info
