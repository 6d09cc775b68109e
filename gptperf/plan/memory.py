"""Predicts the GPU memory of a training run, by part, from its configuration alone.

The parts that stay for the whole run are exact: float32 master weights, gradients and optimizer states, and the copy of
the matrices in the compute dtype, with the padding of Muon's buckets. Activations are the tensors that autograd keeps
for backward, as the cards of the components list them. The buffers of the loss are added, or those of the last block's
backward if they are larger. PyTorch's own bookkeeping, the CUDA context and fragmentation are not in the sum;
`usable_gb` leaves room for them.

PyTorch and Inductor decide what eager ops keep; the constants for these ops were fitted to one run each. This module
loads no torch.
"""

from dataclasses import dataclass, replace
from typing import Literal

from gptperf import flops, registry
from gptperf.cards import FFN, FP32_BYTES, Implementation, element_bytes
from gptperf.config import Config, ModelConfig
from gptperf.flops.float8 import WRITES_FLOAT8, float8_layers
from gptperf.flops.matmuls import biases, hidden_matrices
from gptperf.flops.model_cards import attention_of, block_of, ffn_of, norm_of, optimizer_of, position_of
from gptperf.kernels.logit_chunks import chunk_rows, padded
from gptperf.plan.buckets import hidden_buckets

__all__ = [
    "RECOMPUTE",
    "STRATEGIES",
    "Footprint",
    "Recompute",
    "Strategy",
    "allocatable_gb",
    "copy_engines_move",
    "footprint",
]
__all__ += ["direct_gradients", "saved_bytes", "strategy_of", "unknown_memory", "usable_gb"]

Strategy = Literal["ddp", "zero1", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "fsdp")
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")

_INT64_BYTES = 8
_GPUS_OF_ONE_HOST = 8
_CONTEXT_GB = 0.7  # CUDA context with cuBLAS, cuDNN and the loaded kernels
_VISIBLE = 0.985  # share of a data sheet's memory (in GiB) that CUDA reports
_FRAGMENTATION = 0.97  # share of the reported memory that PyTorch can allocate before it finds no gap of enough bytes
_WORKSPACE_GB = 0.1  # cuBLAS, loss terms, gradient norms, batches


@dataclass(frozen=True)
class Footprint:
    """Peak memory of one GPU in 1e9 bytes, by part."""

    weights_gb: float
    """Master weights and the copy in the compute dtype."""
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    """Tensors that autograd keeps for backward."""
    logits_gb: float
    """Logits, and the gradients of the loss before they are scaled."""
    buffers_gb: float
    """Gathered parameters, workspaces, and what the backward of one block needs beyond the buffers of the loss."""

    @property
    def total_gb(self) -> float:
        """Peak memory."""
        states = self.weights_gb + self.gradients_gb + self.optimizer_gb
        return states + self.activations_gb + self.logits_gb + self.buffers_gb


def strategy_of(config: Config) -> Strategy:
    """Returns what the GPUs of a run shard."""
    return "fsdp" if config.system.use_fsdp else "zero1" if config.system.use_zero1 else "ddp"


def usable_gb(memory_gb: float) -> float:
    """Returns the memory in 1e9 bytes that PyTorch can allocate on a GPU whose data sheet states `memory_gb`.

    The GB of data sheets are GiB, less what error correction and the driver take.
    """
    return allocatable_gb(memory_gb * 2**30 / 1e9 * _VISIBLE)


def allocatable_gb(reported_gb: float) -> float:
    """Returns the memory in 1e9 bytes that PyTorch can allocate on a GPU for which CUDA reports `reported_gb`."""
    return (reported_gb - _CONTEXT_GB) * _FRAGMENTATION


def unknown_memory(model: ModelConfig) -> str | None:
    """Returns why `footprint` cannot count this model, or None if it can."""
    return flops.uncountable_parameters(model) or registry.no_card(attention_backend=model.attention_backend)


def footprint(
    config: Config, num_gpus: int = 1, strategy: Strategy = "ddp", recompute: Recompute = "none"
) -> Footprint:
    """Predicts the peak memory of one GPU during training.

    Args:
        config: the run; its batch_size is that of one GPU.
        num_gpus: GPUs of the run, which share the states under ZeRO-1 and FSDP.
        strategy: what the GPUs shard.
        recompute: what backward recomputes.

    Raises:
        ValueError: a component has no card (see `unknown_memory`).
    """
    reason = unknown_memory(config.model)
    if reason is not None:
        raise ValueError(f"the memory cannot be predicted from the configuration: {reason}")
    again = not replace(config.system, recompute=recompute).keeps_ffn
    config = replace(config, system=replace(config.system, recompute_ffn=again))
    weights, gradients, optimizer, gathered = _states(config, num_gpus, strategy)
    tokens = config.train.batch_size * config.model.block_size
    saved = tokens * saved_bytes(config, recompute)
    loss, kept = _loss_bytes(config, recompute, tokens)
    # The tensors that the last norm kept are freed before the backward of the blocks begins.
    backward = kept + tokens * (_backward_bytes(config, recompute) - _last_bytes(config))
    return Footprint(
        weights_gb=weights / 1e9,
        gradients_gb=gradients / 1e9,
        optimizer_gb=optimizer / 1e9,
        activations_gb=saved / 1e9,
        logits_gb=loss / 1e9,
        buffers_gb=(max(0.0, backward - loss) + gathered) / 1e9 + _WORKSPACE_GB,
    )


def _states(config: Config, num_gpus: int, strategy: Strategy) -> tuple[float, float, float, float]:
    """Returns the bytes of weights, gradients, optimizer states and gathered parameters."""
    model, count = config.model, flops.parameters(config.model)
    vectors = count.norm + biases(model)
    size = element_bytes(config.system.weight_copy_dtype)
    hidden = hidden_matrices(model)
    buckets = hidden_buckets(config, num_gpus, fsdp=strategy == "fsdp" and num_gpus > 1)
    padding = sum(buckets) - hidden.elements
    total = count.total + padding
    matrices = total - vectors
    copy = 0 if size == FP32_BYTES else size * matrices
    master = gradients = float(FP32_BYTES * total)
    states = float(optimizer_of(config.optimizer).state_bytes(total, hidden.elements + padding, hidden.rows))
    unit = max(count.embedding, *buckets)
    # The share of a bucket that this GPU copies from the other GPUs.
    others = (num_gpus - 1) / num_gpus if copy_engines_move(config, num_gpus) else 0.0
    if strategy != "fsdp" or num_gpus == 1:  # one GPU has nothing to gather
        single = config.train.gradient_accumulation_steps == num_gpus and size < FP32_BYTES
        # With one micro-batch per step, gradients are sent in the compute dtype, and three buckets may be in flight.
        pulled = (size * (3 + others) if single and others else others * FP32_BYTES) * unit
        if direct_gradients(config, num_gpus, strategy):
            gradients = float(size * matrices + FP32_BYTES * vectors)
        if strategy != "zero1":
            return master + copy, gradients, states, pulled
        return master / num_gpus + copy, gradients, states / num_gpus, pulled
    # Two or all units are gathered at a time; one or three gradients exist.
    once = config.system.fsdp_reduce_once
    gathered = (FP32_BYTES * others if once else size * (3 + others) if others else FP32_BYTES) * unit
    gathered += size * (matrices if config.system.fsdp_gather_once else 2 * unit)
    if not once:
        gradients /= num_gpus
    return (master + copy) / num_gpus, gradients, states / num_gpus, gathered


def direct_gradients(config: Config, num_gpus: int, strategy: Strategy) -> bool:
    """Returns whether the gradients of matrices stay in the compute dtype, as backward returns them.

    They do in a step of one micro-batch on one GPU. Otherwise they are added, or divided by a loss scale, in float32.
    """
    single = num_gpus == 1 and strategy == "ddp" and config.train.gradient_accumulation_steps == 1
    return single and config.system.dtype != "float16"


def copy_engines_move(config: Config, num_gpus: int) -> bool:
    """Returns whether copy engines move data between the GPUs, which is the default if one host may have all GPUs."""
    return config.system.communication != "process_group" and 1 < num_gpus <= _GPUS_OF_ONE_HOST


def _triton(config: Config) -> bool:
    return config.system.kernels != "eager" and config.system.device != "cpu"


def _implementation(config: Config) -> Implementation:
    if _triton(config):
        return "triton"
    return "compiled" if config.system.compiles else "eager"


def _compiles(config: Config, recompute: Recompute) -> bool:
    """Returns whether the blocks would be compiled with this recomputation."""
    return replace(config.system, recompute=recompute).compiles


def saved_bytes(config: Config, recompute: Recompute) -> float:
    """Returns the bytes per token of the activations that are kept for backward."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    block = block_of(model)
    layer = _layer_elements(config, recompute) * size
    if recompute == "none":
        statistics = block.norms * norm_of(model).statistics + attention_of(model).kept_statistics(model.n_head)
        statistics += position_of(model).kept_statistics(model.n_head, model.kv_heads, model.qk_norm)
        layer += FP32_BYTES * statistics
        layer += 2 * model.n_embd if model.dropout else 0  # masks are booleans
    missing = 0  # the first block has no residual as input
    if recompute != "none" and block.passes_residual:
        missing = model.n_embd * size
    return model.n_layer * layer - missing + _last_bytes(config) + _INT64_BYTES


def _last_bytes(config: Config) -> int:
    """Returns the bytes per token that the last norm keeps: its input, and its output if the loss keeps it."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    kept = 1 if _triton(config) else 2  # the Triton op keeps a gradient instead, which `_loss_bytes` counts
    return kept * model.n_embd * size + FP32_BYTES * norm_of(model).statistics


def _layer_elements(config: Config, recompute: Recompute) -> float:
    """Returns the elements per token that a block keeps for its backward."""
    model = config.model
    block, ffn = block_of(model), _ffn(config)
    C, F, HD, KD = model.n_embd, model.ffn_width, model.query_width, model.kv_width
    inputs = block.inputs * C
    if recompute == "full":
        return inputs
    if recompute == "selective":
        # Kept are the inputs, and the outputs of the matmuls and of attention. The FFN's last output is kept only if
        # the next op is in the same block, or if no compiler sees that nothing needs it.
        last = 0 if block.passes_residual and _compiles(config, recompute) else C
        hidden = sum(matmul.out for matmul in ffn.matmuls(C, F)[:-1])
        return inputs + C + HD + last + (HD + 2 * KD) + hidden
    position, implementation = position_of(model), _implementation(config)
    kept: float = block.norms * 2 * C  # a norm keeps the sum that it reads; the next op keeps the output of the norm
    kept += position.kept(HD, KD, model.qk_norm) + HD  # with attention's output
    kept += attention_of(model).kept(model.block_size, model.n_head) + _mask_elements(config)
    kept += ffn.kept(F, implementation) - _float8_saves(config, implementation)
    return kept if implementation == "triton" else kept + position.kept_by_pytorch(HD, implementation == "compiled")


def _float8_saves(config: Config, implementation: Implementation) -> float:
    """Returns the elements per token and layer by which fp8 keeps less: half of the inputs that it keeps in 8 bits.

    Attention keeps the input of the output projection, and SwiGLU's op recomputes the input of the down projection.
    Another op of an FFN runs without the down projection, so that its output is kept.
    """
    model, ffn, saves = config.model, ffn_of(config.model), 0.0
    for linear, blocks in float8_layers(config):
        name, recomputed = linear.matmul.name, linear.matmul.name == "ffn_out" and ffn.op in WRITES_FLOAT8
        if name == "ffn_out" and not recomputed:
            F = model.ffn_width
            saves -= blocks * (replace(ffn, op=None).kept(F, implementation) - ffn.kept(F, implementation))
        if config.system.fp8_level == "full" and name != "out" and not recomputed:
            saves += blocks * linear.matmul.into / 2
    return saves / model.n_layer


def _ffn(config: Config) -> FFN:
    """Returns the card of the FFN as its op runs."""
    system = config.system
    return replace(ffn_of(config.model), recomputes=system.recompute_ffn or system.matmul_dtype == "fp8")


def _mask_elements(config: Config) -> float:
    """Returns the elements per token and layer of masks of T x T elements: one a sequence, or one for all sequences."""
    model, T = config.model, config.model.block_size
    kept = attention_of(model).kept_mask(T, model.dropout > 0)
    if config.data.document_mask:
        return kept
    return kept / config.train.batch_size * sum(window < T for window in model.windows) / model.n_layer


def _loss_bytes(config: Config, recompute: Recompute, tokens: int) -> tuple[float, float]:
    """Returns the peak bytes of lm_head and the loss, and the bytes that remain during the backward of the blocks."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    V, C = model.padded_vocab_size, model.n_embd
    kept = size * V * C if model.weight_tying else 0  # the gradient of lm_head waits for the embedding's
    dx = tokens * C * size
    if not _triton(config):
        # Bytes per element of the logits, as bench.measure.ops measures them: when compiled, the logits and their
        # gradient; otherwise both of them in float32 too, and capped.
        eager = 2 * size + (3 if model.logit_softcap else 2) * FP32_BYTES
        return tokens * V * (2 * size if config.system.compiles else eager) + dx, kept
    rows = min(tokens, chunk_rows(V, size))
    # Alive are the input and, if blocks are recomputed, the last block's residual, which no block has kept.
    alive = 2 if recompute != "none" and block_of(model).passes_residual else 1
    copy = size * padded(V) * C if padded(V) > V else 0  # the weight with rows of zeros
    return rows * padded(V) * size + (1 + alive) * dx + copy + padded(V) * C * FP32_BYTES, kept


def _backward_bytes(config: Config, recompute: Recompute) -> float:
    """Returns the bytes per token of the gradients and of recomputed tensors in the backward of one block."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    C, F, HD = model.n_embd, model.ffn_width, model.query_width
    ffn = _ffn(config)
    # Gradients of attention's output, of q, k, v and of their projection, less what the FFN and its norm have freed.
    attention = HD + 2 * (HD + 2 * model.kv_width) - ffn.kept(F, "triton") - 2 * C
    again = _layer_elements(config, "none") - _layer_elements(config, recompute)
    if recompute == "full" and not _compiles(config, recompute):
        again += _layer_elements(config, "full")  # a block that is not compiled holds its inputs until its end
    return size * (C + max(ffn.backward_peak(F), attention) + again)
