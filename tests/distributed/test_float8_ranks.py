"""Runs with fp8 in any layout: the statistics that decide scales are the same on every rank, and in the first iteration
the same bits whatever the number of ranks."""

from pathlib import Path

import pytest
from test_parallel import MODELS, SIZES, STRATEGIES, TRAIN, spawn

pytestmark = pytest.mark.slow
FP8 = ["--matmul_dtype=fp8", "--dtype=bfloat16", "--kernels=eager", "--compile=False", "--fsdp_min_num_params=0"]
FLAGS = [*SIZES, *TRAIN, *FP8, *MODELS["llama"], "--gradient_accumulation_steps=4"]
CASES = {
    "ddp": [],
    "zero1": STRATEGIES["zero1"],
    "fsdp": STRATEGIES["fsdp"],
    "recomputed": [*STRATEGIES["fsdp"], "--recompute=full"],
}
STEPS = 3


def test_any_layout_has_the_same_scales(tmp_path: Path) -> None:
    cases = {name: {"flags": [*FLAGS, *flags], "steps": [0, STEPS]} for name, flags in CASES.items()}
    [alone] = spawn(1, {"ddp": cases["ddp"]}, tmp_path / "1")["ddp"]
    assert len(alone["largest"]) == 3 * 4
    for name, ranks in spawn(2, cases, tmp_path / "2").items():
        assert ranks[0]["largest"] == ranks[1]["largest"], name
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-3), name
        for layer, tensors in alone["largest"].items():
            for found, wanted in zip(ranks[0]["largest"][layer], tensors, strict=True):
                # The newest iteration comes first. After the first update, weights differ in the last bit.
                assert found[STEPS - 1] == wanted[STEPS - 1] > 0, (name, layer)
                assert found[: STEPS - 1] == pytest.approx(wanted[: STEPS - 1], rel=0.3), (name, layer)
                assert found[STEPS:] == wanted[STEPS:], (name, layer)
