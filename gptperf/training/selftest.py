"""The self-test before training: runs every Triton op that a model calls, and compares it with eager PyTorch.

Both run on the device of the training run, on a few rows with the model's widths, for which the kernels are compiled
first, in parallel.
The self-test finds a kernel that does not compile, does not fit the GPU or computes wrong results. It does not measure
small errors; the tests of the kernels do.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptperf import registry
from gptperf.cards import FFN, Norm, PositionEncoding
from gptperf.config import ModelConfig
from gptperf.flops.model_cards import ffn_of
from gptperf.kernels import reference
from gptperf.kernels.checks import DECODE_WIDTH, interpreter_is_on
from gptperf.ops import Ops

__all__ = ["broken_ops"]

_Op = Callable[..., Any]
_Run = Callable[[_Op], list[Tensor]]
ROWS = 32
_THREADS = 16
"""Most threads that compile kernels."""
TOLERANCE = 0.05
"""Largest allowed difference, relative to the norm of the result. The error is 0.005 for bfloat16, and about 1 for a
wrong kernel."""


def broken_ops(
    ops: Ops,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    moments: torch.dtype = torch.float32,
    *,
    gradients: torch.dtype = torch.float32,
    trains: bool = True,
) -> dict[str, str]:
    """Runs each op for which Triton was chosen, and returns the ops that fail.

    Args:
        ops: the chosen implementations.
        model: sizes and components.
        device: device of the training run.
        dtype: dtype of the activations; vectors are float32.
        moments: dtype of AdamW's moments.
        gradients: dtype of the matrices' gradients, for which AdamW's kernel is compiled.
        trains: whether the model is trained; else backward, the loss and the optimizers' ops are not run.

    Returns:
        Op name -> what went wrong; empty if every op works.
    """
    if "triton" not in ops.chosen.values():
        return {}
    from triton.errors import TritonError

    # Triton's cache raises OSError, and its C compiler CalledProcessError. If the GPU has no memory left, no kernel is
    # at fault, so that error is raised.
    failures = (TritonError, RuntimeError, ValueError, OSError, ImportError, subprocess.SubprocessError)
    unused = set() if trains else _OF_TRAINING
    runs = [
        (op, run)
        for op, run in _runs(model, device, dtype, (moments, gradients), trains)
        if _is_chosen(ops, op) and op not in unused
    ]
    with contextlib.suppress(Exception):  # this only saves time: what fails here fails again below
        _compile(ops, runs)
    found: dict[str, str] = {}
    for op, run in runs:
        if op in found:
            continue
        try:
            ours = run(getattr(ops, op))
        except torch.OutOfMemoryError:
            raise
        except failures as error:
            found[op] = f"its kernel failed on this GPU: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        wanted = run(getattr(reference, op)) if ours else []
        off = max((_off(a, b) for a, b in zip(ours, wanted, strict=True)), default=0.0)
        if not off <= TOLERANCE:
            found[op] = f"its kernel is off eager PyTorch by {off:.2g} of the norm on this GPU"
    return found


def _compile(ops: Ops, runs: list[tuple[str, _Run]]) -> None:
    """Compiles the kernels in parallel."""
    if interpreter_is_on():
        return
    from gptperf.kernels.launch import compile_ahead  # without Triton nothing is chosen, and this is not called

    with compile_ahead(min(os.cpu_count() or 1, _THREADS)):
        for op, run in runs:
            with contextlib.suppress(Exception):
                run(getattr(ops, op))


def _is_chosen(ops: Ops, op: str) -> bool:
    return ops.packed_attention is not None if op == _PACKED else ops.chosen.get(op) == "triton"


_PACKED = "packed_attention"
_OF_TRAINING = {"adamw", "symmetric_matmul", "linear_cross_entropy", "accumulate"}
"""Ops that a model which is not trained does not call."""


class _Inputs:
    """The sizes of a model, and random inputs that are the same for every implementation of an op."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self.generator = torch.Generator(device)

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator.manual_seed(seed), device=self.device)
        return x.to(dtype or self.dtype).requires_grad_()

    def vector(self, seed: int, n: int) -> Tensor:
        return self.normal(seed, n, dtype=torch.float32)

    def qk_weights(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        D = self.model.head_width
        return (self.vector(5, D), self.vector(6, D)) if self.model.qk_norm else (None, None)

    def position_options(self, T: int = 4 * ROWS) -> tuple[Any, ...]:
        """The arguments of decode_attention after the cache: tables of rope for T positions, QK-norm, eps and pairs."""
        model = self.model
        tables: tuple[Tensor, ...] | tuple[None, None] = (None, None)
        if model.position_encoding == "rope":
            angles = torch.linspace(0, 3, T * model.head_width // 2, device=self.device)
            angles = angles.view(T, model.head_width // 2)
            tables = angles.cos(), angles.sin()
        interleaved = model.position_encoding == "rope" and model.rope_pairs == "interleaved"
        weights = (None if x is None else x.detach() for x in self.qk_weights())
        return *tables, *weights, model.norm_eps, interleaved


def _rms_norm(inputs: _Inputs, residual: Tensor | None) -> tuple[Any, ...]:
    C = inputs.model.n_embd
    return inputs.normal(2, ROWS, C), inputs.vector(3, C), inputs.model.norm_eps, residual


def _layer_norm(inputs: _Inputs, residual: Tensor | None) -> tuple[Any, ...]:
    C = inputs.model.n_embd
    card: Norm = registry.card("normalization", inputs.model.normalization)
    bias = inputs.vector(4, C) if card.bias else None
    return inputs.normal(2, ROWS, C), inputs.vector(3, C), bias, inputs.model.norm_eps, residual


def _qk_norm(inputs: _Inputs) -> tuple[Any, ...]:
    model = inputs.model
    return inputs.normal(7, ROWS, model.n_head, model.head_width), inputs.qk_weights()[0], model.norm_eps


def _rope(inputs: _Inputs) -> tuple[Any, ...]:
    model = inputs.model
    D, H, K = model.head_width, model.n_head, model.kv_heads
    angles = torch.linspace(0, 3, ROWS * D // 2, device=inputs.device).view(ROWS, D // 2)
    qkv, interleaved = inputs.normal(7, 2, ROWS, (H + 2 * K) * D), model.rope_pairs == "interleaved"
    return qkv, angles.cos(), angles.sin(), H, K, *inputs.qk_weights(), model.norm_eps, interleaved


def _swiglu(inputs: _Inputs) -> tuple[Any, ...]:
    F = inputs.model.ffn_width
    return inputs.normal(8, ROWS, 2 * F), inputs.normal(9, 16, F)


def _activation(inputs: _Inputs) -> tuple[Any, ...]:
    F = inputs.model.ffn_width
    return inputs.normal(8, ROWS, F), inputs.model.activation, inputs.normal(9, 16, F)


def _linear_cross_entropy(inputs: _Inputs) -> tuple[Any, ...]:
    V = inputs.model.padded_vocab_size
    targets = torch.linspace(0, V - 1, ROWS, device=inputs.device).long()
    targets[1] = -100
    return inputs.normal(10, ROWS, 64), inputs.normal(11, V, 64), targets, -100, inputs.model.logit_softcap


_NORMS: dict[str, Callable[[_Inputs, Tensor | None], tuple[Any, ...]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
}
_OTHERS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {"rope": _rope, "activation": _activation, "swiglu": _swiglu}
"""Op that a card names -> its arguments."""


def _runs(
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    of_adamw: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    trains: bool = True,
) -> Iterator[tuple[str, _Run]]:
    """Yields every op that the model calls, as named by the cards of its components, with a function that runs it.

    `of_adamw` has the dtypes of AdamW's moments and of the gradients that it reads.
    """
    inputs, run = _Inputs(model, device, dtype), _differentiated if trains else _forward
    norm: Norm | None = registry.card("normalization", model.normalization)
    position: PositionEncoding | None = registry.card("position_encoding", model.position_encoding)
    ffn: FFN | None = None if registry.card("ffn_type", model.ffn_type) is None else ffn_of(model)
    yield "adamw", lambda op: _updated(op, device, dtype, *of_adamw)
    yield "symmetric_matmul", lambda op: _symmetric(op, inputs)
    yield "accumulate", lambda op: _accumulated(op, inputs)
    if norm is not None and norm.op is not None:
        for residual in (None, inputs.normal(1, ROWS, model.n_embd)):
            yield norm.op, partial(run, arguments=_NORMS[norm.op](inputs, residual))
    if model.qk_norm and (position is None or position.op is None):  # else that op includes QK-norm
        yield "rms_norm", partial(run, arguments=_qk_norm(inputs))
    for card in (position, ffn):
        if card is not None and card.op is not None:
            yield card.op, partial(run, arguments=_OTHERS[card.op](inputs))
    if model.attention_backend == "sdpa":
        yield _PACKED, lambda op: _attended(op, inputs, run)
    yield "decode_attention", lambda op: _decoded(op, inputs)
    yield "decode_linear", lambda op: _decoded_layers(op, inputs)
    yield "draw", lambda op: _drawn(op, inputs)
    yield "linear_cross_entropy", partial(run, arguments=_linear_cross_entropy(inputs))


def _differentiated(function: _Op, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Returns the outputs of a function, then the gradients of its arguments."""
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    # The gradient of each output is the output. Given as an argument of `grad`, it would make PyTorch import sympy.
    total = torch.stack([torch.sum(y * y.detach()).float() for y in outputs]).sum()
    gradients = torch.autograd.grad(total, wanted)
    return [x.detach() for x in (*outputs, *gradients)]


def _forward(function: _Op, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Returns the outputs of a function."""
    with torch.no_grad():
        outputs = function(*arguments)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _attended(function: _Op, inputs: _Inputs, run: Callable[[_Op, tuple[Any, ...]], list[Tensor]]) -> list[Tensor]:
    """Returns the attention of a packed projection and its gradients; nothing where the op does not take this model.

    The sequence is as long as the model's, because cuDNN chooses its kernels by the length.
    """
    model, (cos, sin, _, _, eps, interleaved) = inputs.model, inputs.position_options(inputs.model.block_size)
    packed = inputs.normal(20, 1, model.block_size, model.query_width + 2 * model.kv_width)
    arguments = (packed, cos, sin, model.n_head, model.kv_heads, *inputs.qk_weights(), eps, interleaved)
    with torch.no_grad():
        if function(packed.clone(), *arguments[1:]) is None:
            return []
    return run(lambda x, *others: function(x.clone(), *others), arguments)  # the op overwrites its input


def _decoded(function: _Op, inputs: _Inputs) -> list[Tensor]:
    """Returns the attention of a token after ROWS tokens, and the cache with that token."""
    model, options = inputs.model, inputs.position_options()
    K, D = model.kv_heads, model.head_width
    keys, values = (inputs.normal(seed, 1, 512, K, D).detach() for seed in (14, 15))
    positions = torch.full((1,), ROWS, device=inputs.device)
    qkv = inputs.normal(13, 1, 1, (model.n_head + 2 * K) * D).detach()  # last, as in a step
    return [function(qkv, positions, keys, values, *options), keys, values]


def _decoded_layers(function: _Op, inputs: _Inputs) -> list[Tensor]:
    """Returns an FFN of one token: the layer after the norm, with the activation, and that before the residual."""
    model, name = inputs.model, "swiglu" if inputs.model.ffn_type == "swiglu" else "gelu"
    C, F = model.n_embd, model.ffn_width
    if max(C, F) > DECODE_WIDTH:
        return [torch.zeros(1)]
    up = inputs.normal(17, 2 * F if name == "swiglu" else F, C).detach() * C**-0.5
    down = inputs.normal(18, C, F).detach() * F**-0.5
    norm = inputs.vector(3, C).detach(), None, model.norm_eps, model.normalization != "rmsnorm"
    x, y = (inputs.normal(19, 1, 1, width).detach() for width in (C, F))  # last, as in a step
    return [function(x, up, None, *norm, name), function(y, down, residual=x)]


def _drawn(function: _Op, inputs: _Inputs) -> list[Tensor]:
    """Returns the likeliest token of some logits, and whether a token of the 50 likeliest was drawn."""
    V = inputs.model.padded_vocab_size
    logits, uniform = inputs.normal(16, 1, V).detach(), torch.full((1,), 0.7, device=inputs.device)
    drawn = function(logits, uniform, V, 0.8, min(50, V))
    among = logits[0, drawn.clamp(0, V - 1)] >= logits[0].topk(min(50, V)).values[-1]
    return [function(logits, uniform, V, 0.0), among]


def _updated(
    function: _Op, device: torch.device, dtype: torch.dtype, moments: torch.dtype, gradients: torch.dtype
) -> list[Tensor]:
    """Returns the weights, moments and copy after one update of AdamW."""
    master, gradient, exp_avg, exp_avg_sq = torch.linspace(0.1, 2, 4 * 64 * ROWS, device=device).view(4, ROWS, 64)
    copy = None if dtype == torch.float32 else torch.zeros_like(master, dtype=dtype)
    scalars = torch.tensor([0.1, 3.0, 1 - 0.9**3, 1 - 0.95**3, 2.0, 0.0], device=device)
    exp_avg, exp_avg_sq = exp_avg.to(moments), exp_avg_sq.to(moments)
    seeds = torch.arange(ROWS, dtype=torch.int32, device=device) if moments == torch.bfloat16 else None
    function(master, gradient.to(gradients), exp_avg, exp_avg_sq, copy, scalars, 0.9, 0.95, 1e-8, 0.1, seeds)
    return [master, exp_avg, exp_avg_sq] + ([] if copy is None else [copy])


def _accumulated(function: _Op, inputs: _Inputs) -> list[Tensor]:
    """Returns the sum of a gradient and of those before it."""
    total, gradient = inputs.normal(21, ROWS, 64, dtype=torch.float32).detach(), inputs.normal(22, ROWS, 64).detach()
    function(total, gradient)
    return [total]


def _symmetric(function: _Op, inputs: _Inputs) -> list[Tensor]:
    """Returns the products of Muon for two matrices with ROWS rows, and for one of as many as a model's."""
    found = []
    for shape in ((2, ROWS, inputs.model.n_embd), (1, inputs.model.n_embd, ROWS)):
        x = inputs.normal(12, *shape).detach()
        gram = function(x)
        found += [gram, function(gram / shape[2], None, gram, 0.5, -1.5), function(gram / shape[2], gram)]
    return found


def _off(found: Tensor, wanted: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of `wanted`."""
    norm = torch.linalg.vector_norm(wanted.float())
    return (torch.linalg.vector_norm(found.float() - wanted.float()) / norm.clamp(min=1e-30)).item()
