"""Measures fp8: `python -m bench.measure.float8 [--what kernels gemms] [--sweep] [--json PATH]`.

- kernels: the kernels that quantise, on the shapes of llama_1.36b at 16 x 2048, as fractions of the speed of a copy
  that moves the same bytes; with --sweep also other tiles, so that the best ones can be written into the kernels.
- gemms: the matmuls of its blocks in bfloat16 and in 8 bits, with sums of fewer bits or not, and with either format of
  the gradient.

A step in fp8 is the variant `fp8` of `bench.measure.step`, and `bench.measure.rivals` times it beside torchao's.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch

from bench.measure import timing
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.errors import run_main
from gptperf.kernels import quantize, quantize_swiglu
from gptperf.kernels.linear import scaled_mm

__all__ = ["kernel_calls", "main"]

M, C, F = 32768, 2048, 5632
Calls = dict[str, tuple[int, Callable[[], object]]]
_TILES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps}
    for m, n, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
    if 4096 <= m * n <= 16384
]
_ROW_TILES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps}
    for m, n, warps in itertools.product((4, 8, 16, 32), (128, 256, 512), (4, 8))
    if 2048 <= m * n <= 8192
]


def kernel_calls(rows: int = M, n_embd: int = C, d_ff: int = F, device: str = "cuda") -> Calls:
    """Returns the kernels on the shapes of a layer: name -> bytes moved, and the call with a delayed scale."""
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    scale = torch.full((4,), 16.0, device=device)
    x, dqkv, gate_up, dy = normal(rows, n_embd), normal(rows, 3 * n_embd), normal(rows, 2 * d_ff), normal(rows, d_ff)
    calls: Calls = {}
    for name, tensor, e5m2 in (("x", x, False), ("dqkv", dqkv, True)):
        both = partial(quantize.quantize, tensor, scale, e5m2=e5m2, columns=True)
        calls[f"quantize {name}, both layouts"] = (4 * tensor.numel(), both)
    calls["quantize x, rows"] = (3 * x.numel(), partial(quantize.quantize, x, scale))
    again = partial(quantize.quantize, x, scale, rows=False, columns=True, after=scale)
    calls["quantize x, columns, again"] = (3 * x.numel(), again)
    calls["quantize x, its own scale"] = (
        6 * x.numel(),
        partial(quantize.quantize, x, torch.zeros_like(scale), columns=True),
    )
    calls["quantize_swiglu"] = (5 * dy.numel(), partial(quantize_swiglu.quantize_swiglu, gate_up, scale))
    backward = partial(quantize_swiglu.quantize_swiglu_backward, dy, gate_up, scale, scale, e5m2=True)
    calls["quantize_swiglu_backward"] = (11 * dy.numel(), backward)
    return calls


def _time_kernels(calls: Calls, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the time of each kernel and its fraction of the speed of a copy."""
    for name, (moved, call) in calls.items():
        works = {"copy": timing.copies(moved), "kernel": timing.capture([call])}
        times = {key: median(values) for key, values in timing.alternate(works, rounds).items()}
        yield {"name": name, "us": 1e3 * times["kernel"], "of_copy": times["copy"] / times["kernel"]}


def _sweep(rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the times of the kernels with other tiles."""
    for tiles, names in ((_ROW_TILES, ("x, rows", "quantize_swiglu")), (_TILES, ("both", "again", "_backward"))):
        for tile in tiles:
            with (
                mock.patch.object(quantize, "tile_shape", lambda *_, tile=tile: tile),
                mock.patch.object(quantize_swiglu, "FORWARD_TILE", tile),
                mock.patch.object(quantize_swiglu, "BACKWARD_TILE", tile),
            ):
                calls = {name: call for name, call in kernel_calls().items() if name.endswith(names) or "both" in name}
                calls = {name: call for name, call in calls.items() if any(word in name for word in names)}
                for row in _time_kernels(calls, rounds):
                    yield row | {"tile": tile}


def _gemms(rounds: int) -> Iterator[dict[str, Any]]:
    """Yields TFLOP/s of every matmul of a block, as (rows, columns, sum) of its result."""
    normal = partial(torch.randn, device="cuda")
    one = torch.ones((), device="cuda")
    for name, out, into in (("qkv", 3 * C, C), ("out", C, C), ("gate_up", 2 * F, C), ("down", C, F)):
        for part, (m, n, k) in {"forward": (M, out, into), "dgrad": (M, into, out), "wgrad": (out, into, M)}.items():
            a, b = normal(m, k).bfloat16(), normal(n, k).bfloat16()
            works = {"bfloat16": timing.capture([partial(torch.mm, a, b.t())])}
            formats = (torch.float8_e4m3fn,) if part == "forward" else (torch.float8_e4m3fn, torch.float8_e5m2)
            for form, fast in itertools.product(formats, (True, False)):
                a8, b8 = a.to(form), b.to(torch.float8_e4m3fn)
                call = partial(scaled_mm, a8, b8, one, one, torch.bfloat16, fast)
                works[f"{str(form)[13:]}{', fast' if fast else ''}"] = timing.capture([call])
            times = timing.alternate(works, rounds, window_ms=100)
            yield {
                "name": f"{name} {part}",
                "shape": [m, n, k],
                "tflop_s": {key: 2e-9 * m * n * k / median(values) for key, values in times.items()},
            }


@dataclass(frozen=True, kw_only=True)
class _Float8Flags(Flags):
    """What to measure."""

    what: tuple[Annotated[str, Choice(("kernels", "gemms"))], ...] = ("kernels", "gemms")
    """Parts."""
    sweep: bool = False
    """Measure the kernels with other tiles too."""
    rounds: Annotated[int, Range(1)] = 7
    """Windows of each kernel and matmul."""
    json: Path | None = None
    """Write the figures to this file, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures of the chosen parts."""
    args = parse(_Float8Flags, argv, "bench.measure.float8", __doc__)
    if not torch.cuda.is_available():
        print("bench.measure.float8: no GPU here; fp8 is timed on a GPU only")
        return 0
    found: dict[str, Any] = {"environment": timing.environment()}
    for part in args.what:
        with timing.side_stream():
            rows = _gemms(args.rounds) if part == "gemms" else _time_kernels(kernel_calls(), args.rounds)
            if part == "kernels" and args.sweep:
                rows = itertools.chain(rows, _sweep(args.rounds))
            found[part] = []
            for row in rows:
                print(json.dumps(row), flush=True)
                found[part].append(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
