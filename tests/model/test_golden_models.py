"""What every preset builds, name by name: a refactoring that keeps this file keeps checkpoints, draws and layouts.

`python tests/model/test_golden_models.py` wrote `golden_models.json` beside it, with `.` on PYTHONPATH. Other
files state why these names and layouts are right; this one says that they stay.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptperf.config import ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.replicated import Replicated
from gptperf.distributed.zero1 import Sharded
from gptperf.model import GPT
from gptperf.monitor.gradients import component_of, layer_of

GOLDEN = Path(__file__).parent / "golden_models.json"
SIZES = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 36, "d_ff": 80, "block_size": 16, "vocab_size": 50}
VARIANTS: dict[str, dict[str, Any]] = {name: {} for name in PRESETS}
VARIANTS |= {"llama_qk_norm": PRESETS["llama"] | {"qk_norm": True}, "gpt2_untied": {"weight_tying": False}}
VARIANTS |= {"swiglu_bias_relu": {"ffn_type": "swiglu", "bias": True, "normalization": "layernorm"}}
BUCKET_NUMEL = 4000


class Draws(TorchDispatchMode):
    """Records every op that draws random numbers, with the shape that it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            numbers = ", ".join(f"{x:.6g}" for x in args[1:])
            self.found.append(f"{func.name().removeprefix('aten::')}({numbers}) {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def _model(name: str) -> GPT:
    preset = PRESETS.get(name, {})
    return GPT(ModelConfig(**(SIZES | preset | VARIANTS[name])))  # type: ignore[arg-type]


def _layout(weights: Replicated) -> list[str]:
    """A line a bucket: whether it is decayed, its elements, and the offset of each parameter."""
    lines = []
    for bucket in weights.buckets:
        inside = " ".join(f"{name}@{weights.places[name].offset}" for name in bucket.names)
        group = "decayed" if bucket.decayed else "not decayed"
        lines.append(f"{group}, {bucket.compute.numel()}, {bucket.copy is not None}: {inside}")
    return lines


def _layouts(name: str) -> dict[str, list[str]]:
    """The buckets of every strategy, as rank 1 of 3 has them."""
    three = Collectives(3, 1, torch.device("cpu"))
    with mock.patch.object(dist, "broadcast"):
        return {
            "replicated": _layout(Replicated(_model(name), torch.bfloat16, bucket_numel=BUCKET_NUMEL)),
            "zero1": _layout(Sharded(_model(name), torch.bfloat16, three, bucket_numel=BUCKET_NUMEL)),
            "fsdp": _layout(FullySharded(_model(name), torch.bfloat16, three, min_num_params=0)),
            "fsdp_joined": _layout(FullySharded(_model(name), torch.bfloat16, three, min_num_params=20_000)),
        }


def _facts(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    with Draws() as draws:
        model = _model(name)
    state = [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items()]
    names = [key for key, _ in model.named_parameters()]
    return {
        "state_dict": state,
        "draws": draws.found,
        "parsed": [f"{key}: {layer_of(key)}, {component_of(key)}" for key in names],
        "buckets": _layouts(name),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_preset_builds_stays(name: str) -> None:
    found, wanted = _facts(name), json.loads(GOLDEN.read_text())[name]
    for fact in wanted:
        assert found[fact] == wanted[fact], fact


def test_every_drawn_weight_is_drawn_twice() -> None:
    """PyTorch draws when it makes a layer, gptperf when the model is whole: a record of draws has both."""
    with Draws() as draws:
        model = _model("llama")
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert len(draws.found) == 2 * len(matrices)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: _facts(name) for name in VARIANTS}, indent=1) + "\n")
