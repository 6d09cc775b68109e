"""Calls of the ops that generate text, for `tests/helpers/aot.py`."""

from collections.abc import Callable, Iterator

import torch

__all__ = ["Call", "generation_calls"]

Call = tuple[str, Callable[[], object], bool]
"""The label of a call, the call, and whether its rows are the widest that the kernel takes."""
FULL = torch.float32
EPS = 1e-5


def decode_attention_case(heads: tuple[int, int, int], rows: int, size: int, dtype: torch.dtype, norm: bool) -> Call:
    """Attention of a new token. `norm`: QK-norm and interleaved rope; else the other rope, or none with an odd D."""
    H, K, D = heads

    def call() -> None:
        qkv, positions = torch.empty(rows, 1, (H + 2 * K) * D, dtype=dtype), torch.zeros(rows).long()
        keys, weight = torch.empty(rows, size, K, D, dtype=dtype), torch.empty(D) if norm else None
        table = torch.empty(size, D // 2) if D % 2 == 0 else None
        window = 100 if norm else 0
        op = torch.ops.gptperf.decode_attention
        op(qkv, positions, keys, keys, table, table, weight, weight, EPS, norm, window)

    return f"decode_attention {heads} {rows} {size} {str(dtype)[6:]} {norm}", call, False


def draw_case(V: int, top_k: int, dtype: torch.dtype) -> Call:
    def call() -> None:
        torch.ops.gptperf.draw(torch.empty(4, V, dtype=dtype), torch.empty(4), V - 3, 0.8, top_k, 0.9)

    return f"draw {V} {top_k} {str(dtype)[6:]}", call, False


def decode_linear_case(
    shape: tuple[int, int, int], dtype: torch.dtype, norm: str = "", activation: str = "", vectors: bool = False
) -> Call:
    """`norm`: "rms", "layer" or none; `vectors`: with biases and the residual."""

    def call() -> None:
        M, N, K = shape
        x, weight = torch.empty(M, 1, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
        bias, scale = (torch.empty(n) if used else None for n, used in ((N, vectors), (K, norm)))
        shift = torch.empty(K) if norm == "layer" and vectors else None
        residual = torch.empty(M, 1, N // 2 if activation == "swiglu" else N, dtype=dtype) if vectors else None
        torch.ops.gptperf.decode_linear(x, weight, bias, scale, shift, EPS, norm == "layer", activation, residual)

    words = ["decode_linear", f"{shape}", str(dtype)[6:], norm, activation, "vectors" * vectors]
    return " ".join(filter(None, words)), call, shape[2] == 16384


def generation_calls(capability: int, half: torch.dtype) -> Iterator[Call]:
    """Yields the calls for a GPU of this compute capability, in this dtype; on sm_90 in float32 too."""
    for dtype in (half, FULL) if capability == 90 else (half,):
        for heads in ((12, 12, 64), (16, 16, 128), (32, 8, 128), (7, 1, 72), (3, 3, 9)):
            yield decode_attention_case(heads, 1, 2048, dtype, norm=False)
        yield decode_attention_case((16, 4, 128), 32, 2048, dtype, norm=True)
        yield from (draw_case(V, 50, dtype) for V in (257, 50304, 131072))
    yield draw_case(50304, 1, half)
    yield decode_linear_case((4, 11264, 2048), half, "rms", "swiglu")
    yield decode_linear_case((4, 8192, 8192), half, "layer", "gelu", vectors=True)
    if capability == 90:
        yield decode_linear_case((1, 2304, 768), half, "layer")
        yield decode_linear_case((1, 11264, 2048), FULL, "rms", "swiglu")
        yield decode_linear_case((4, 4096, 8192), FULL, "layer", "gelu", vectors=True)
        yield decode_linear_case((1, 1, 33), FULL, vectors=True)
        yield decode_linear_case((4, 1000, 16384), half, "layer", "gelu_tanh", vectors=True)
