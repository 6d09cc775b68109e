"""The key `dtype`, and the three dtypes that follow from it."""

import pytest

from gptperf.config import Config, SystemConfig, command_line
from gptperf.plan import find_gpu, plan

ARGV = ["configs/llama_124m.toml", "--gradient_accumulation_steps=2", "--batch_size=4"]
MEANINGS = ("compute_dtype", "weight_copy_dtype", "peak_dtype")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_meaning_follows_the_key(dtype: str) -> None:
    system = command_line.resolve([f"--dtype={dtype}"]).config.system
    assert {getattr(system, meaning) for meaning in MEANINGS} == {system.dtype} == {dtype}


def _planned(config: Config) -> dict[str, float | None]:
    found = plan(config, find_gpu("H200"))
    gb = found.memory
    return {
        "activations": gb.activations_gb,
        "weights": gb.weights_gb,
        "gemm": found.parts_ms["gemm"],
        "memory_bound": found.parts_ms["memory_bound"],
        "optimizer": found.parts_ms["optimizer"],
    }


@pytest.mark.parametrize(
    ("meaning", "changed"),
    [
        ("compute_dtype", {"activations", "memory_bound"}),
        ("weight_copy_dtype", {"weights", "optimizer"}),
        ("peak_dtype", {"gemm"}),
    ],
)
def test_each_meaning_can_change_alone(meaning: str, changed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dtype that differs between the three needs one changed property, and no other line of the plan."""
    config = command_line.resolve(ARGV).config
    before = _planned(config)
    monkeypatch.setattr(SystemConfig, meaning, "float32")
    after = _planned(config)
    assert {part for part in before if before[part] != after[part]} == changed
