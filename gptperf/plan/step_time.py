"""Predicts the time of a training step from the data sheet of a GPU, as a serial roofline. Loads no torch.

Matmuls run at a sustained share of the dense peak, attention at its own share, and the memory-bound ops and the
optimizer at a share of the memory bandwidth. Communication counts where no compute covers it. The shares were measured
on an H200; those of other GPUs are assumptions and have a wider band.
"""

import dataclasses
from dataclasses import dataclass

from gptperf import flops
from gptperf.cards import FP32_BYTES, Implementation, causal_pairs, element_bytes
from gptperf.config import Config
from gptperf.flops import BytesMoved
from gptperf.flops.float8 import float8_activation_bytes, float8_bytes, float8_flops
from gptperf.flops.matmuls import hidden_matrices
from gptperf.flops.model_cards import optimizer_of, position_of
from gptperf.hardware import Gpu
from gptperf.plan.host_time import gaps_ms, graph_problem, graphs_pay, host_ms
from gptperf.plan.memory import Recompute, Strategy, copy_engines_move, direct_gradients
from gptperf.plan.packing import packing_problem

__all__ = ["band_of", "optimizer_flops", "parts_ms", "rates_of"]

_LONG_SEQUENCE = 865
"""Attention over T tokens runs at T / (T + this number) of the rate of a long sequence. Fitted to the steps of
gpt2_124m on an H200, in which attention reaches 205 TFLOP/s at T = 1024 and 342 at 8192."""


@dataclass(frozen=True)
class Rates:
    """The shares of a data sheet's figures that training reaches."""

    gemm: float
    """Matmuls, as a share of the dense peak."""
    attention: float
    """Causal attention of a very long sequence without windows, forward and backward at head_dim 128, as a share of the
    dense peak."""
    copy: float
    """A copy, as a share of the memory bandwidth."""
    bus_byte_s: float
    """Bus bandwidth of an all-reduce for each GPU, as nccl-tests defines it."""
    band: float
    """Relative error that the predicted step time may have."""


_MASKED, _DOCUMENTS = 0.44, 0.66
"""Shares of `Rates.attention` that FlexAttention reaches on the pairs that count: in a layer with a window, and with
documents in a layer without one. An H200 with PyTorch 2.11 reaches 0.44 with windows of 512 at (16, 16, 2048, 128), and
0.66 if one document fills the sequence; shorter documents take less time, which the plan leaves out, because it does
not see the data: documents of 512 tokens on average take as long as no mask. Not measured: narrower windows, which are
slower, the masks of T x T elements that replace FlexAttention with dropout, and other GPUs."""
_FLOAT8, _QUANTISE = 0.68, 0.60
"""Share of the fp8 peak that fp8 matmuls reach, and share of the rate of a copy that kernels reach which quantise.
Both are fitted to the profile of one step of llama_1.36b on an H200, so neither is known for other models and GPUs."""
_NARROW = 0.83
"""Share of `Rates.attention` that attention reaches at head_dim 64 and less."""
_DROPOUT_FLOPS = 690
"""FLOPs in the time of which attention draws the random numbers of dropout for a pair of query and key, forward and
backward. Fitted to shakespeare_char at 2 x 8192 on an H200."""
_MEASURED = 0.10
_ASSUMED = 0.25
# H200, PyTorch 2.11: products of llama_1.36b 692 TFLOP/s and of gpt2_124m 706 of 989.4; attention 319 at (16, 16, 2048,
# 128) and 205 at (64, 12, 1024, 64), helper kernels included; copy 4.25 of 4.8 TB/s; all-reduce over four GPUs 355
# GB/s. The others are assumed by analogy: the same share of the peak, FlashAttention-2 where cuDNN is not first, and
# the NVLink of that generation.
_BY_CAPABILITY = {
    (7, 0): Rates(0.70, 0.16, 0.88, 130e9, _ASSUMED),
    (7, 5): Rates(0.50, 0.16, 0.85, 10e9, _ASSUMED),  # a T4 at its 70 W does not hold its clocks
    (8, 0): Rates(0.80, 0.60, 0.88, 230e9, _ASSUMED),
    (8, 6): Rates(0.75, 0.56, 0.88, 20e9, _ASSUMED),
    (8, 9): Rates(0.75, 0.56, 0.88, 20e9, _ASSUMED),
    (9, 0): Rates(0.705, 0.459, 0.885, 355e9, _ASSUMED),
    (10, 0): Rates(0.70, 0.44, 0.88, 650e9, _ASSUMED),
    (10, 3): Rates(0.70, 0.44, 0.88, 650e9, _ASSUMED),
    (12, 0): Rates(0.80, 0.56, 0.88, 20e9, _ASSUMED),
}
_GIVEN = Rates(0.70, 0.455, 0.88, 20e9, 0.35)
"""The shares of a GPU that the user describes: the middle of the table, and no NVLink."""
_PCIE_BUS_BYTE_S = 20e9
_WITHOUT_NVLINK = ("A30",)
_NVLINK_SHARE = {"A800 SXM 80 GB": 400 / 600, "H800": 400 / 900}
"""GPU with slower NVLink -> its NVLink rate as a fraction of the rate of its generation."""
_BESIDE_COMPUTE = 0.75
"""Share of a collective's time that the step loses even if compute covers it, because the collective takes bandwidth,
power and, with NCCL, multiprocessors, and because GPUs wait for each other. Four H200s lose 0.5 under DDP, 0.7 under
ZeRO-1, 0.6 and 0.9 under FSDP; with NCCL 0.5 to 0.9 and 0.7 to 1.1 (bench/NOTES.md)."""
_MEASURED_ON = ("H200",)
# Rates of the memory-bound ops and of the optimizer, as shares of a copy's. Single kernels reach .92 to 1.03
# (bench.measure.ops); a step also has ops that PyTorch adds.
_OPS_OF_COPY = {"triton": 0.95, "compiled": 0.70, "eager": 0.18}
_OPTIMIZER_OF_COPY = 0.98


def rates_of(gpu: Gpu) -> Rates:
    """Returns the shares that training reaches on this GPU."""
    if gpu.capability is None:
        return _GIVEN
    rates = _BY_CAPABILITY[gpu.capability]
    changes: dict[str, float] = {"bus_byte_s": rates.bus_byte_s * _NVLINK_SHARE.get(gpu.name, 1)}
    if "PCIe" in gpu.name or gpu.name in _WITHOUT_NVLINK:
        changes["bus_byte_s"] = min(rates.bus_byte_s, _PCIE_BUS_BYTE_S)
    if gpu.name in _MEASURED_ON:
        changes["band"] = _MEASURED
    return dataclasses.replace(rates, **changes)


def band_of(config: Config, gpu: Gpu) -> float:
    """Returns the relative error that the predicted time may have. The rate of fp8 is assumed on every GPU."""
    return _ASSUMED if config.system.matmul_dtype == "fp8" else rates_of(gpu).band


def parts_ms(config: Config, gpu: Gpu, num_gpus: int, strategy: Strategy, recompute: Recompute) -> dict[str, float]:
    """Predicts the milliseconds of an iteration on one GPU, by part.

    Args:
        config: the run.
        gpu: a GPU that has a peak for the compute dtype.
        num_gpus: GPUs that share the iteration.
        strategy: what the GPUs shard.
        recompute: what backward recomputes.

    Returns:
        gemm, attention, memory_bound, optimizer, communication, other (starts and ends of kernels) and host (time in
        which the GPU waits for launches); they add up to the iteration.
    """
    model, rates = config.model, rates_of(gpu)
    peak = gpu.dense_tflops[config.system.peak_dtype] * 1e12
    micro_batches = config.train.gradient_accumulation_steps / num_gpus
    tokens = micro_batches * config.train.batch_size * model.block_size
    count = flops.flops_per_token(model, "strict")
    scores, forward = count.scores / count.tokens, count.forward / count.tokens
    blocks = forward - scores - count.lm_head / count.tokens
    again = 1 if recompute == "full" else 0
    gemm = (3 * (forward - scores) + again * blocks) * tokens / (rates.gemm * peak)
    if config.system.matmul_dtype == "fp8":
        float8_peak = gpu.dense_tflops["fp8"] * 1e12
        gemm -= float8_flops(config, again) * tokens * (1 / (rates.gemm * peak) - 1 / (_FLOAT8 * float8_peak))
    attention = (3 + again) * scores * tokens / (_attention_share(config, rates) * peak)
    attention += (3 + again) / 3 * _dropout_s(config, rates, peak) * scores * tokens
    copy = rates.copy * gpu.hbm_byte_s
    per_token, weights = float8_bytes(config)
    written = float8_activation_bytes(config, sum(_bytes_moved(config, recompute).activation))
    moved = (_memory_bound_bytes(config, recompute) - written - _saved_by_packing(config, gpu, recompute)) * tokens
    memory_bound = moved / (copy * _OPS_OF_COPY[_implementation(config)])
    memory_bound += ((per_token + written) * tokens + weights * micro_batches) / (copy * _QUANTISE)
    optimizer = _optimizer_bytes(config, micro_batches, num_gpus, strategy, recompute) / (copy * _OPTIMIZER_OF_COPY)
    # Under every strategy each GPU orthogonalizes its share of the matrices.
    products = optimizer_flops(config, halved=_implementation(config) == "triton")
    optimizer += products / num_gpus / (rates.gemm * peak)
    compute = gemm + attention + memory_bound
    exposed = _communication_s(config, rates, num_gpus, strategy, micro_batches, compute)
    parts = {
        "gemm": gemm,
        "attention": attention,
        "memory_bound": memory_bound,
        "optimizer": optimizer,
        "communication": exposed,
        "other": micro_batches * gaps_ms(config) / 1e3,
    }
    parts["host"] = _waiting_s(config, micro_batches, sum(parts.values()))
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def _waiting_s(config: Config, micro_batches: float, gpu_s: float) -> float:
    """Returns the seconds by which the host takes longer to launch an iteration than the GPU to run it."""
    asked, problem = config.system.cuda_graph, graph_problem(config, "cuda")
    if problem is None and (asked is True or (asked == "auto" and graphs_pay(config, 1e3 * gpu_s / micro_batches))):
        return 0.0
    return max(micro_batches * host_ms(config) / 1e3 - gpu_s, 0.0)


def _attention_share(config: Config, rates: Rates) -> float:
    T = config.model.block_size
    return _long_share(config, rates) * T / (T + _LONG_SEQUENCE) * _mask_share(config)


def _long_share(config: Config, rates: Rates) -> float:
    return rates.attention * (1.0 if config.model.head_width > 64 else _NARROW)


def _dropout_s(config: Config, rates: Rates, peak: float) -> float:
    """Returns the seconds that dropout adds to attention, for each FLOP of the scores of the forward pass.

    Only fused attention is known: manual attention drops in kernels of its own, and windows and documents with dropout
    use masks of T x T elements.
    """
    if config.model.dropout == 0 or config.model.attention_backend == "manual":
        return 0.0
    flops_of_pair = 4 * config.model.head_width
    return _DROPOUT_FLOPS / flops_of_pair / (_long_share(config, rates) * peak)


def _mask_share(config: Config) -> float:
    """Returns the rate of attention over all layers, relative to that of causal attention without windows."""
    T, documents = config.model.block_size, config.data.document_mask
    pairs = [(causal_pairs(T, window), window < T) for window in config.model.windows]
    time = sum(count / (_MASKED if limited else _DOCUMENTS if documents else 1.0) for count, limited in pairs)
    return sum(count for count, _ in pairs) / time


def _implementation(config: Config) -> Implementation:
    if config.system.kernels != "eager":
        return "triton"
    return "compiled" if config.system.compiles else "eager"


def _memory_bound_bytes(config: Config, recompute: Recompute) -> float:
    """Returns the bytes that the memory-bound ops move per token, forward and backward."""
    moved = _bytes_moved(config, recompute)
    again = 0 if recompute == "none" else moved.forward - moved.loss.forward - moved.embedding.forward
    return float(moved.total + again)


def _saved_by_packing(config: Config, gpu: Gpu, recompute: Recompute) -> int:
    """Returns the bytes per token that do not move where `gptperf.kernels.packed_attention` runs."""
    if packing_problem(config, gpu.capability, recompute) is not None:
        return 0
    model = config.model
    saved = position_of(model).saved_by_packing(model.query_width, model.kv_width, model.qk_norm)
    return element_bytes(config.system.compute_dtype) * model.n_layer * saved


def _bytes_moved(config: Config, recompute: Recompute) -> BytesMoved:
    kept = _implementation(config) != "triton"
    system = dataclasses.replace(config.system, recompute=recompute)
    size, again = element_bytes(system.compute_dtype), not system.keeps_ffn
    return flops.bytes_moved(config.model, size, logits_kept=kept, recompute_ffn=again)


def optimizer_flops(config: Config, *, halved: bool) -> int:
    """Returns the FLOPs of the matrix products in an update of the optimizer, over all GPUs.

    Args:
        config: the run.
        halved: whether only half of a symmetric product is computed, as the Triton op does.
    """
    card, hidden = optimizer_of(config.optimizer), hidden_matrices(config.model)
    return sum(times * card.flops(rows, columns, halved) for rows, columns, times in hidden.shapes)


def _optimizer_bytes(
    config: Config, micro_batches: float, num_gpus: int, strategy: Strategy, recompute: Recompute
) -> float:
    """Returns the bytes that an iteration moves to add up gradients, take their norm and update weights."""
    size = element_bytes(config.system.weight_copy_dtype)
    first, more, gradient = size + FP32_BYTES, size + 2 * FP32_BYTES, FP32_BYTES
    count, hidden = flops.parameters(config.model).total, hidden_matrices(config.model).elements
    added = count * (first + more * (micro_batches - 1))
    if direct_gradients(config, num_gpus, strategy):
        # Backward of a linear layer writes its gradient where the update reads it, unless it is compiled.
        compiles = dataclasses.replace(config.system, recompute=recompute).compiles
        added, gradient = (count - (0 if compiles else hidden)) * 2 * size, size
    update = optimizer_of(config.optimizer).update_bytes(count, hidden, size if size < FP32_BYTES else 0, gradient)
    shared = 1 if strategy == "ddp" else num_gpus
    return added + (gradient * count + update) / shared


def _communication_s(
    config: Config, rates: Rates, num_gpus: int, strategy: Strategy, micro_batches: float, compute_s: float
) -> float:
    """Returns the seconds that communication adds to an iteration.

    If the blocks are compiled separately or not at all, gradients are reduced during the last micro-batch's backward,
    which is two thirds of its time. If the model is compiled as one graph, backward returns all gradients at its end,
    so that nothing covers their reduction. NCCL moves gradients in `reduce_dtype`. Copy engines move them in the
    compute dtype, or in float32 if they were added up over micro-batches, and move sums in float32.
    """
    if num_gpus == 1:
        return 0.0
    count, size = flops.parameters(config.model).total, element_bytes(config.system.weight_copy_dtype)
    share, reduced = (num_gpus - 1) / num_gpus / rates.bus_byte_s, element_bytes(config.system.reduce_dtype)
    window = 2 / 3 * compute_s / micro_batches
    summed = reduced
    if copy_engines_move(config, num_gpus):
        added_up = config.system.fsdp_reduce_once if strategy == "fsdp" else micro_batches > 1
        reduced, summed = FP32_BYTES if added_up else size, FP32_BYTES
    if strategy == "ddp":
        reduce = (reduced + summed) * count * share
        covered = not config.system.one_graph
        return max(reduce - window, _BESIDE_COMPUTE * reduce) if covered else reduce
    gather = size * count * share
    reduce = reduced * count * share
    if strategy == "zero1":
        total = gather + reduce
        return max(total - compute_s / micro_batches, _BESIDE_COMPUTE * total)
    # The first forward covers a gather that is done once, and the last backward a reduction that is done once. All
    # compute covers gathers and reductions that are done in every micro-batch.
    forward, backward = compute_s / micro_batches / 3, 2 / 3 * compute_s / micro_batches
    gather_once, reduce_once = config.system.fsdp_gather_once, config.system.fsdp_reduce_once
    gather *= 1 if gather_once else 2 * micro_batches
    reduce *= 1 if reduce_once else micro_batches
    exposed = max(gather - forward, 0.0) if gather_once else 0.0
    exposed += max(reduce - backward, 0.0) if reduce_once else 0.0
    often = (0.0 if gather_once else gather) + (0.0 if reduce_once else reduce)
    return max(exposed + max(often - compute_s, 0.0), _BESIDE_COMPUTE * (gather + reduce))
