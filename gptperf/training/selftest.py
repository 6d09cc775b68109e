"""A small run of every Triton op that a model calls, against eager PyTorch on the same device, before training starts.

The widths are the model's, for which kernels are compiled. It finds a kernel that does not compile, does not fit the
GPU or computes something else; exact errors are for the tests.
"""

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.kernels import reference
from gptperf.ops import Ops

__all__ = ["broken_ops"]

_Op = Callable[..., Any]
_Run = Callable[[_Op], list[Tensor]]
ROWS = 32
TOLERANCE = 0.05
"""Of the norm: bfloat16 is off by 0.005, a wrong kernel by about 1."""


def broken_ops(ops: Ops, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Run each op that Triton was chosen for.

    Args:
        ops: what was chosen.
        model: sizes and components.
        device: where to run.
        dtype: of the activations; vectors are float32.

    Returns:
        Op name -> what went wrong; empty where nothing did.
    """
    if "triton" not in ops.chosen.values():
        return {}
    from triton.errors import TritonError

    # Triton's cache and its C compiler raise OSError and CalledProcessError; out of memory is no fault of a kernel.
    failures = (TritonError, RuntimeError, ValueError, OSError, ImportError, subprocess.SubprocessError)
    found: dict[str, str] = {}
    for op, run in _runs(model, device, dtype):
        if ops.chosen[op] != "triton" or op in found:
            continue
        try:
            ours = run(getattr(ops, op))
        except torch.OutOfMemoryError:
            raise
        except failures as error:
            found[op] = f"its kernel failed on this GPU: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        wanted = run(getattr(reference, op))
        off = max(_off(a, b) for a, b in zip(ours, wanted, strict=True))
        if not off <= TOLERANCE:
            found[op] = f"its kernel is off eager PyTorch by {off:.2g} of the norm on this GPU"
    return found


def _runs(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, _Run]]:
    """Ops that the model calls, each with a run of an implementation of it on the same inputs each time."""
    generator = torch.Generator(device)

    def normal(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator.manual_seed(seed), device=device)
        return x.to(dtype).requires_grad_()

    def vector(seed: int, n: int) -> Tensor:
        return normal(seed, n, dtype=torch.float32)

    C, D, H, K = model.n_embd, model.head_dim, model.n_head, model.kv_heads
    V, F, eps = model.padded_vocab_size, model.ffn_width, model.norm_eps
    yield "adamw", lambda op: _updated(op, device, dtype)
    for residual in (None, normal(1, ROWS, C)):
        if model.normalization == "rmsnorm":
            yield "rms_norm", partial(_differentiated, arguments=(normal(2, ROWS, C), vector(3, C), eps, residual))
        elif model.normalization in ("layernorm", "layernorm_nobias"):
            bias = vector(4, C) if model.normalization == "layernorm" else None
            with_bias = (normal(2, ROWS, C), vector(3, C), bias, eps, residual)
            yield "layer_norm", partial(_differentiated, arguments=with_bias)
    qk_weights = (vector(5, D), vector(6, D)) if model.qk_norm else (None, None)
    if model.position_encoding == "rope":
        angles = torch.linspace(0, 3, ROWS * D // 2, device=device).view(ROWS, D // 2)
        qkv, pairs = normal(7, 2, ROWS, (H + 2 * K) * D), model.rope_pairs == "interleaved"
        packed = (qkv, angles.cos(), angles.sin(), H, K, *qk_weights, eps, pairs)
        yield "rope", partial(_differentiated, arguments=packed)
    elif model.qk_norm:
        yield "rms_norm", partial(_differentiated, arguments=(normal(7, ROWS, H, D), qk_weights[0], eps))
    if model.ffn_type == "swiglu":
        yield "swiglu", partial(_differentiated, arguments=(normal(8, ROWS, 2 * F), normal(9, 16, F)))
    targets = torch.linspace(0, V - 1, ROWS, device=device).long()
    targets[1] = -100
    logits_of = (normal(10, ROWS, 64), normal(11, V, 64), targets)
    yield "linear_cross_entropy", partial(_differentiated, arguments=logits_of)


def _differentiated(function: _Op, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [y.detach().clone() for y in outputs])
    return [x.detach() for x in (*outputs, *gradients)]


def _updated(function: _Op, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The weights, moments and copy after one update."""
    master, gradient, exp_avg, exp_avg_sq = torch.linspace(0.1, 2, 4 * 64 * ROWS, device=device).view(4, ROWS, 64)
    copy = None if dtype == torch.float32 else torch.zeros_like(master, dtype=dtype)
    scalars = torch.tensor([0.1, 3.0, 1 - 0.9**3, 1 - 0.95**3, 2.0, 0.0], device=device)
    function(master, gradient, exp_avg, exp_avg_sq, copy, scalars, 0.9, 0.95, 1e-8, 0.1)
    return [master, exp_avg, exp_avg_sq] + ([] if copy is None else [copy])


def _off(found: Tensor, wanted: Tensor) -> float:
    norm = torch.linalg.vector_norm(wanted.float())
    return (torch.linalg.vector_norm(found.float() - wanted.float()) / norm.clamp(min=1e-30)).item()
