"""A small run of every Triton op that a model calls, against eager PyTorch on the same device, before training starts.

The shapes are the model's where a kernel is compiled for them, so what is compiled here is what training uses. It finds
a kernel that does not compile, does not fit the GPU or computes something else; exact errors are for the tests.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptperf.config import ModelConfig
from gptperf.kernels import reference
from gptperf.registry import Ops

__all__ = ["broken_ops"]

_Op = Callable[..., Any]
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

    found = {}
    for op, run in _runs(model, device, dtype).items():
        if ops.chosen[op] != "triton":
            continue
        try:
            ours = run(getattr(ops, op))
        except (TritonError, RuntimeError, ValueError) as error:
            found[op] = f"its kernel failed on this GPU: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        wanted = run(getattr(reference, op))
        off = max(_off(a, b) for a, b in zip(ours, wanted, strict=True))
        if not off <= TOLERANCE:
            found[op] = f"its kernel is off eager PyTorch by {off:.2g} of the norm on this GPU"
    return found


def _runs(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[_Op], list[Tensor]]]:
    """Op name -> a run of an implementation of it on the same inputs each time; only the ops that the model calls."""
    generator = torch.Generator(device)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        seeded = generator.manual_seed(shape[0])  # the same at each call, but no tensor a part of another
        return torch.randn(shape, generator=seeded, device=device).to(dtype).requires_grad_()

    def vector(n: int) -> Tensor:
        return normal(n, dtype=torch.float32)

    C, D, H, K = model.n_embd, model.head_dim, model.n_head, model.kv_heads
    V, F, eps = model.padded_vocab_size, model.ffn_width, model.norm_eps
    runs: dict[str, Callable[[_Op], list[Tensor]]] = {"adamw": lambda op: _updated(op, device, dtype)}
    if model.normalization == "rmsnorm":
        runs["rms_norm"] = lambda op: _differentiated(op, normal(ROWS, C), vector(C), eps, normal(ROWS, C))
    elif model.normalization in ("layernorm", "layernorm_nobias"):
        bias = vector(C) if model.normalization == "layernorm" else None
        runs["layer_norm"] = lambda op: _differentiated(op, normal(ROWS, C), vector(C), bias, eps, normal(ROWS, C))
    if model.position_encoding == "rope":
        angles = torch.linspace(0, 3, ROWS * D // 2, device=device).view(ROWS, D // 2)
        weights = (vector(D), vector(D)) if model.qk_norm else (None, None)
        qkv = normal(1, ROWS, (H + 2 * K) * D)
        pairs = model.rope_pairs == "interleaved"
        runs["rope"] = lambda op: _differentiated(op, qkv, angles.cos(), angles.sin(), H, K, *weights, eps, pairs)
    if model.ffn_type == "swiglu":
        runs["swiglu"] = lambda op: _differentiated(op, normal(ROWS, 2 * F), normal(16, F))
    targets = torch.arange(ROWS, device=device) % V
    runs["linear_cross_entropy"] = lambda op: _differentiated(op, normal(ROWS, 64), normal(V, 64), targets)
    return runs


def _differentiated(function: _Op, *arguments: Any) -> list[Tensor]:
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
