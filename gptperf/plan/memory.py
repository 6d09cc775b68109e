"""GPU memory of a training run, by part, from its configuration alone.

What stays for the whole run is exact: float32 master weights, gradients and two moments, and the copy of the matrices
in the compute dtype. Activations are those that autograd keeps for backward, tensor by tensor as `gptperf.model` makes
them; to these come the buffers of the loss, or of the last block's backward, whichever are larger. PyTorch's own
bookkeeping, the CUDA context and fragmentation are not in the sum; `usable_gb` leaves room for them. No torch here.

Eager ops let PyTorch and Inductor keep what they like; for these the constants below were fitted to one run each.
"""

from dataclasses import dataclass
from typing import Literal

from gptperf import flops
from gptperf.config import Config, ModelConfig
from gptperf.kernels.logit_chunks import chunk_rows, padded

__all__ = [
    "STRATEGIES",
    "Footprint",
    "Recompute",
    "Strategy",
    "element_bytes",
    "footprint",
    "saved_bytes",
    "strategy_of",
]
__all__ += ["pulls", "usable_gb"]

Strategy = Literal["ddp", "zero1", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "fsdp")
Recompute = Literal["none", "selective", "full"]

_FP32, _INT64 = 4, 8
_BUCKET_NUMEL = 32 << 20  # of `gptperf.distributed.replicated`
_OF_ONE_HOST = 8
_CONTEXT_GB = 0.7  # CUDA context with cuBLAS, cuDNN and the loaded kernels
_VISIBLE = 0.985  # of the memory that a data sheet names, in GiB: what CUDA reports
_FRAGMENTATION = 0.97  # of that can be allocated before PyTorch finds no gap that is wide enough
_WORKSPACE_GB = 0.1  # cuBLAS, loss terms, gradient norms, batches


@dataclass(frozen=True)
class Footprint:
    """Peak memory of one GPU in 1e9 bytes, by part."""

    weights_gb: float
    """Master weights and the copy in the compute dtype."""
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    """Kept for backward."""
    logits_gb: float
    """Of the loss: logits, and its gradients before they are scaled."""
    buffers_gb: float
    """Of one block's backward where it needs more than the loss, gathered parameters, workspaces."""

    @property
    def total_gb(self) -> float:
        """The peak."""
        states = self.weights_gb + self.gradients_gb + self.optimizer_gb
        return states + self.activations_gb + self.logits_gb + self.buffers_gb


def strategy_of(config: Config) -> Strategy:
    """What a run of several GPUs shares out."""
    return "fsdp" if config.system.use_fsdp else "zero1" if config.system.use_zero1 else "ddp"


def element_bytes(dtype: str) -> int:
    """Bytes of an element of a compute dtype."""
    return {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]


def usable_gb(memory_gb: float) -> float:
    """What PyTorch can allocate on a GPU whose data sheet says `memory_gb`.

    Data sheets count as memory makers do: 80 GB are 80 GiB less what error correction and the driver take.
    """
    return allocatable_gb(memory_gb * 2**30 / 1e9 * _VISIBLE)


def allocatable_gb(reported_gb: float) -> float:
    """What PyTorch can allocate of the memory that CUDA reports, in 1e9 bytes."""
    return (reported_gb - _CONTEXT_GB) * _FRAGMENTATION


def footprint(
    config: Config, num_gpus: int = 1, strategy: Strategy = "ddp", recompute: Recompute = "none"
) -> Footprint:
    """Peak memory of one GPU while it trains.

    Args:
        config: of the run; its batch_size is that of one GPU.
        num_gpus: that share the states under ZeRO-1 and FSDP.
        strategy: what is shared out.
        recompute: what backward computes again.

    Raises:
        ValueError: a component comes from a plugin, and its size is not known.
    """
    weights, gradients, optimizer, gathered = _states(config, num_gpus, strategy)
    tokens = config.train.batch_size * config.model.block_size
    saved = tokens * saved_bytes(config, recompute)
    loss, kept = _loss_bytes(config, recompute, tokens)
    # What the last norm has kept is gone when the blocks' backward begins.
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
    """Bytes of weights, gradients, optimizer and gathered parameters."""
    model, count = config.model, flops.parameters(config.model)
    vectors = count.norm + _biases(model)
    size = element_bytes(config.system.weight_copy_dtype)
    matrices = count.total - vectors
    copy = 0 if size == _FP32 else size * matrices
    master, gradients, moments = (float(_FP32 * n * count.total) for n in (1, 1, 2))
    others = (num_gpus - 1) / num_gpus if pulls(config, num_gpus) else 0.0  # of a bucket, pulled from them
    if strategy != "fsdp" or num_gpus == 1:  # one GPU has nothing to gather
        single = config.train.gradient_accumulation_steps == num_gpus and size < _FP32
        # With one micro-batch a step gradients travel as they came, and three of them may be on their way.
        pulled = (size * (3 + others) if single and others else others * _FP32) * max(count.embedding, _BUCKET_NUMEL)
        if strategy != "zero1":
            return master + copy, gradients, moments, pulled
        return master / num_gpus + copy, gradients, moments / num_gpus, pulled
    block = (count.attention + count.ffn) / model.n_layer
    unit = max(block, count.embedding)  # two are gathered at a time, or all; one's gradient is there, or three's
    once = config.system.fsdp_reduce_once
    gathered = (_FP32 * others if once else size * (3 + others) if others else _FP32) * unit
    gathered += size * (matrices if config.system.fsdp_gather_once else 2 * unit)
    if not once:
        gradients /= num_gpus
    return (master + copy) / num_gpus, gradients, moments / num_gpus, gathered


def pulls(config: Config, num_gpus: int) -> bool:
    """Whether copy engines move what the GPUs exchange: by default, where they may be those of one host."""
    return config.system.communication != "process_group" and 1 < num_gpus <= _OF_ONE_HOST


def _biases(model: ModelConfig) -> int:
    if not model.bias:
        return 0
    kv_width = model.kv_heads * model.head_dim
    ffn = 0 if model.ffn_type == "swiglu" else model.ffn_width
    gates = 2 * model.ffn_width if model.ffn_type == "swiglu" else 0
    return model.n_layer * (model.n_embd + 2 * kv_width + model.n_embd + ffn + gates + model.n_embd)


def _triton(config: Config) -> bool:
    return config.system.kernels != "eager" and config.system.device != "cpu"


def saved_bytes(config: Config, recompute: Recompute) -> float:
    """Activations kept for backward, bytes a token."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    statistics = _FP32 * (1 if model.normalization == "rmsnorm" else 2)
    layer = _layer_elements(config, recompute) * size
    if recompute == "none":
        layer += 2 * statistics + _FP32 * model.n_head  # two norms, attention's log-sum-exp
        if model.qk_norm and model.position_encoding != "rope":  # RoPE's op computes them again
            layer += _FP32 * (model.n_head + model.kv_heads)
        layer += 2 * model.n_embd if model.dropout else 0  # masks are booleans
    missing = 0  # residual that comes into the first block
    if recompute != "none" and model.norm_position == "pre":
        missing = model.n_embd * size
    return model.n_layer * layer - missing + _last_bytes(config) + _INT64


def _last_bytes(config: Config) -> int:
    """Bytes a token that the norm before lm_head keeps: its input, and what it gives where the loss keeps that."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    kept = 1 if _triton(config) else 2  # the Triton op keeps a gradient instead, which `_loss_bytes` counts
    return kept * model.n_embd * size + _FP32 * (1 if model.normalization == "rmsnorm" else 2)


def _layer_elements(config: Config, recompute: Recompute) -> float:
    """Elements a token that a block keeps for its backward."""
    model = config.model
    C, F, packed = model.n_embd, model.ffn_width, model.n_embd + 2 * model.kv_heads * model.head_dim
    gates, product = (2 * F, F) if model.ffn_type == "swiglu" else (F, F)
    inputs = C if model.norm_position == "post" else 2 * C  # branch and residual
    if recompute == "full":
        return inputs
    if recompute == "selective":
        # Those, and what the matrix products and attention give; the last product only where the next op is in the
        # block, or where no compiler sees that nothing needs it.
        last = C if model.norm_position == "post" or not config.system.compile else 0
        return inputs + 2 * C + last + packed + gates
    if model.ffn_type == "swiglu" and _triton(config):
        product = 0  # the op computes it again
    if not _triton(config) and model.ffn_type != "swiglu" and config.system.compile:
        product = 0  # so does Inductor
    scores = 2 * model.n_head * model.block_size if model.attention_backend == "manual" else 0
    before_norm = 0  # what the norm of the heads read; v is part of it, and RoPE writes v once more
    if model.qk_norm:
        before_norm = packed if model.position_encoding == "rope" else packed - model.kv_heads * model.head_dim
    # Two norms: sum and normed; q, k, v; attention's output; the FFN.
    other = 0.0 if _triton(config) else _other_elements(config)
    return 4 * C + packed + before_norm + C + scores + gates + product + other


def _other_elements(config: Config) -> float:
    """Elements of a token and layer that PyTorch's own ops keep beyond those of the list.

    Fitted to one run each on an H200 with PyTorch 2.11, llama_1.36b at 16 x 2048 tokens and gpt2_124m at 64 x 1024:
    compiled 86.0 and 28.7 GB at their peak, not compiled 111.8 and 64.0.
    """
    C, rope = config.model.n_embd, config.model.position_encoding == "rope"
    if config.system.compile:
        return C if rope else 0.0
    return 6.5 * C if rope else 2.0 * C


def _loss_bytes(config: Config, recompute: Recompute, tokens: int) -> tuple[float, float]:
    """Of lm_head and the loss: bytes at their peak, and what of them is there while the blocks' backward goes on."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    V, C = model.padded_vocab_size, model.n_embd
    kept = size * V * C if model.weight_tying else 0  # the gradient of lm_head waits for the embedding's
    dx = tokens * C * size
    if not _triton(config):
        # Of an element of the logits, as bench.measure.ops measures: compiled the logits and their gradient,
        # else also float32.
        return tokens * V * (2 * size if config.system.compile else 2 * size + 2 * _FP32) + dx, kept
    rows = min(tokens, chunk_rows(V, size))
    # What comes in, and the last block's residual, which a recomputed block has not kept.
    alive = 2 if recompute != "none" and model.norm_position == "pre" else 1
    copy = size * padded(V) * C if padded(V) > V else 0  # of W, with rows of zeros
    return rows * padded(V) * size + (1 + alive) * dx + copy + padded(V) * C * _FP32, kept


def _backward_bytes(config: Config, recompute: Recompute) -> float:
    """Bytes a token of the gradients, and of what is computed again, inside one block's backward."""
    model, size = config.model, element_bytes(config.system.compute_dtype)
    C, F, packed = model.n_embd, model.ffn_width, model.n_embd + 2 * model.kv_heads * model.head_dim
    # SwiGLU: gradients of product, gate and up, and the product again. Else the gradient of the activation's output,
    # then that of its input, when the output itself is gone.
    ffn = (4 if model.ffn_type == "swiglu" else 1) * F
    # Gradients of attention's output, of q, k, v and of their projection, when what the FFN and its norm kept is gone.
    attention = C + 2 * packed - 2 * F - 2 * C
    again = _layer_elements(config, "none") - _layer_elements(config, recompute)
    if recompute == "full" and not config.system.compile:
        again += _layer_elements(config, "full")  # what came in stays until a block that is not compiled is done
    return size * (C + max(ffn, attention) + again)
