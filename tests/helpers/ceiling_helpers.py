"""A model, a machine and a runner of known rates for the tests of measured ceilings."""

import dataclasses
from collections.abc import Callable
from typing import Any

from gptperf.config import ModelConfig
from gptperf.hardware.ceilings import Ceilings, Machine
from gptperf.hardware.measure import measure
from gptperf.hardware.workload import Copy, Gemm, Timer, Work

LLAMA = ModelConfig(
    n_layer=3,
    n_head=8,
    n_kv_head=2,
    n_embd=64,
    d_ff=176,
    block_size=32,
    vocab_size=100,
    vocab_multiple=16,
    ffn_type="swiglu",
    position_encoding="rope",
    weight_tying=False,
)
GPT = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=90)
MACHINE = Machine(
    device="NVIDIA H200",
    driver="575.57.08",
    versions={"torch": "2.11.0+cu130", "cuda": "13.0", "cudnn": "91900"},
    power_cap_w=700.0,
    power_default_w=700.0,
)
WHERE = ("bfloat16", "NVIDIA H200", "575.57.08", "2.11.0+cu130")


def rate_of(work: Work) -> float:
    """A rate of its own for every work, in FLOP/s or byte/s."""
    base = {"forward": 700e12, "dgrad": 650e12, "wgrad": 600e12}
    if isinstance(work, Gemm):
        return 690e12 if work.name == "square" else base[work.kind] - len(work.name) * 1e12
    if isinstance(work, Copy):
        return 4.25e12 if work.buffer_bytes > 1e9 else 4.12e12
    return 509e12 if work.name == "attention_forward" else 407e12


class FakeRunner:
    """Works at known rates; the first round is ten times as slow, later ones scatter by `scatter` up and down."""

    def __init__(self, rate: Callable[[Work], float] = rate_of, scatter: float = 0.0):
        self.rate, self.scatter = rate, scatter
        self.windows: list[tuple[str, int, float]] = []

    def machine(self) -> Machine:
        return MACHINE

    def prepare(self, work: Work) -> Timer:
        long_windows = 0

        def timer(launches: int) -> float:
            nonlocal long_windows
            slower = 10.0 if long_windows == 0 else 1 + self.scatter * (long_windows % 3 - 1)
            elapsed_ms = launches * work.amount / self.rate(work) * 1e3 * slower
            self.windows.append((work.name, launches, elapsed_ms))
            long_windows += elapsed_ms >= 300
            return elapsed_ms

        return timer


def measured(model: ModelConfig = LLAMA, batch_size: int = 4, **changed: Any) -> Ceilings:
    return dataclasses.replace(measure(model, batch_size, "bfloat16", runner=FakeRunner()), **changed)


ARGV = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=16", "--vocab_size=90", "--batch_size=4"]
"""The sizes of `GPT` as flags."""
