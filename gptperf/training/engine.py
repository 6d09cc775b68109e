"""Builds the objects that a training step works on: model, weights, optimizer, and their helpers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gptperf.config import Config, SystemConfig
from gptperf.distributed.copy_engine import open_collectives
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.process import Process
from gptperf.distributed.replicated import Replicated
from gptperf.distributed.zero1 import Sharded
from gptperf.errors import DeviceError
from gptperf.hardware.compiler import compiler_problem
from gptperf.model import GPT
from gptperf.model.linear import Linear
from gptperf.monitor.gradients import GradientMonitor
from gptperf.ops import ALL_TRITON, GENERATION, Ops, keeping_ffn, resolve_ops, without_triton
from gptperf.plan.host_time import graphs_pay
from gptperf.plan.memory import direct_gradients, strategy_of
from gptperf.plan.packing import packing_problem
from gptperf.registry import KINDS
from gptperf.training import build, selftest
from gptperf.training.cuda_graph import CudaGraphs, check_graphs
from gptperf.training.float8 import Float8Layers, make_float8
from gptperf.training.optimizers import make_optimizer
from gptperf.training.optimizers.base import Optimizer

__all__ = ["Engine", "build_engine", "compile_engine", "make_weights", "open_graphs"]


@dataclass
class Engine:
    """Model, weights and optimizer of this rank."""

    config: Config
    process: Process
    ops: Ops
    model: GPT
    weights: Replicated
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss of float16; otherwise it is disabled and passes everything through."""
    monitor: GradientMonitor
    skipped: Tensor
    """Number of steps skipped because the gradients were not finite, a float32 scalar on the device."""
    float8: Float8Layers | None = None
    """The layers that run in 8 bits; None if none does."""
    graphs: CudaGraphs | None = None
    """CUDA graphs of the parts of a step; None where kernels are launched one by one."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on this rank. The configuration counts those of the whole job."""
        return self.config.train.gradient_accumulation_steps // self.process.world_size

    def autocast(self) -> torch.autocast:
        """Returns a context that computes in the compute dtype, which the matrices already have."""
        dtype = build.DTYPES[self.config.system.compute_dtype]
        return torch.autocast(self.process.device.type, dtype, enabled=dtype != torch.float32)


def build_engine(config: Config, process: Process) -> Engine:
    """Builds model, weights and optimizer with initial weights, not compiled. Collective: every rank must call it.

    The order matters. The self-test comes before the model, because it may replace ops. The weights move the parameters
    of the model into buckets, which the optimizer then reads.
    """
    dtype = build.DTYPES[config.system.compute_dtype]
    moments = build.DTYPES[config.optimizer.optimizer_state_dtype]
    muon = config.optimizer.optimizer == "muon"
    single = config.train.gradient_accumulation_steps == process.world_size
    needed = {"symmetric_matmul": muon, "accumulate": not single and dtype != torch.float32}
    unused = (*GENERATION, *(op for op, need in needed.items() if not need))
    ops = resolve_ops(config.system.kernels, process.device.type, unused)
    if ops.packed_attention is not None:
        capability = torch.cuda.get_device_capability(process.device)
        problem = packing_problem(config, capability, config.system.recompute)
        if problem is not None:
            ops = replace(ops, packed_attention=None, not_packed=problem)
    if config.system.keeps_ffn:
        ops = keeping_ffn(ops)
    direct = direct_gradients(config, process.world_size, strategy_of(config))
    gradients = dtype if direct else torch.float32
    found = selftest.broken_ops(ops, config.model, process.device, dtype, moments, gradients=gradients)
    broken = process.merged(found)
    ops = without_triton(ops, config.system.kernels, broken)
    model = build.build_model(config.model, ops, process.device, config.train.seed)
    model.recompute = config.system.recompute
    weights = make_weights(model, config.system, process, single, packed_rows(model) if muon else None)
    if ops.chosen.get("accumulate") == "triton":
        weights.accumulate = ops.accumulate
    float8 = make_float8(model, config, process.device, triton="triton" in ops.chosen.values())
    optimizer = make_optimizer(weights, config.optimizer, ops)
    scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
    monitor = GradientMonitor(weights.places, weights.numel, process.device, weights.summed, weights.largest)
    skipped = torch.zeros((), device=process.device)
    return Engine(config, process, ops, model, weights, optimizer, scaler, monitor, skipped, float8)


def packed_rows(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the name of each weight that packs several matrices, and the rows of each of them."""
    layers = model.named_modules()
    return {f"{name}.weight": layer.packed for name, layer in layers if isinstance(layer, Linear) and layer.packed}


def make_weights(
    model: GPT,
    system: SystemConfig,
    process: Process,
    single: bool,
    packed: Mapping[str, tuple[int, ...]] | None = None,
) -> Replicated:
    """Moves a model's parameters into buckets, by the strategy of the configuration.

    Args:
        model: the model, whose parameters become views of the buckets.
        system: strategy, dtypes and communication.
        process: this rank.
        single: whether every step has one micro-batch.
        packed: `packed_rows` for an optimizer of whole matrices, else None.
    """
    collectives = open_collectives(process, system.communication, build.DTYPES[system.reduce_dtype])
    where = model, build.DTYPES[system.weight_copy_dtype], collectives
    if system.use_fsdp:
        return FullySharded(
            *where,
            packed=packed,
            min_num_params=system.fsdp_min_num_params,
            reduce_once=system.fsdp_reduce_once,
            gather_once=system.fsdp_gather_once,
        )
    if system.use_zero1:
        # A model that is compiled as one graph runs as a whole, so it cannot announce its units.
        return Sharded(*where, single=single, packed=packed, announces=not system.one_graph)
    return Replicated(*where, single=single, packed=packed)


def open_graphs(engine: Engine, micro_batch_ms: float | None, warn: Callable[[str], object]) -> str:
    """Makes the CUDA graphs of the engine, if the configuration asks for them or if they make this run faster.

    Args:
        engine: the engine, compiled.
        micro_batch_ms: planned milliseconds of a micro-batch on the GPU, or None if they are not known.
        warn: called if a graph cannot be recorded later.

    Returns:
        "on", or "off" with the reason, for the log.

    Raises:
        DeviceError: they were asked for, and this run cannot use them.
    """
    asked = engine.config.system.cuda_graph
    if asked is False:
        return "off"
    problem = check_graphs(engine.config, engine.process.device.type)
    if problem is None and asked == "auto":
        if micro_batch_ms is None:
            problem = "the time of a micro-batch is not known for this GPU"
        elif not graphs_pay(engine.config, micro_batch_ms):
            problem = f"a micro-batch of {micro_batch_ms:.0f} ms hides the launches"
    if problem is not None:
        return f"off: {problem}"
    engine.graphs = CudaGraphs(engine.weights, must=asked is True, warn=warn)
    return "on"


def compile_engine(engine: Engine, *, must: bool = False) -> str:
    """Compiles model and optimizer, if the configuration asks for it or gains from it, and a compiler is available.

    Collective: every rank must call it, because either all ranks compile or none does.

    Args:
        engine: model and optimizer.
        must: whether the user has asked for it on the command line, so that training without it is no answer.

    Returns:
        "model", "block", or "off" with the reason, for the log. The update of Muon is compiled in any case.

    Raises:
        DeviceError: this machine cannot compile, and `must` is set.
    """
    system = engine.config.system
    if system.compile is False:
        return "off"
    problem = compiler_problem(engine.process.device.type)
    found = engine.process.merged({} if problem is None else {"problem": problem})
    if found and must:
        raise DeviceError(f"compile = True: {found['problem']}; --compile=False runs without it")
    if found:
        return f"off: {found['problem']}"
    with build.compiler_errors():
        engine.optimizer.compile()
        if not system.compiles and _all_triton(engine):
            return ALL_TRITON
        return build.compile_model(engine.model, system)


def _all_triton(engine: Engine) -> bool:
    """Whether nothing in the model gains from torch.compile, as an op in eager PyTorch does, or one of a plugin."""
    model = engine.config.model
    ours = all(getattr(model, kind) in names for kind, names in KINDS.items()) and model.attention_backend != "manual"
    return ours and "eager" not in engine.ops.chosen.values()
