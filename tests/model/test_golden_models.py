"""The model of every preset, name by name: if `golden_models.json` still holds, so do checkpoints, draws and layouts.

`python tests/model/test_golden_models.py` wrote `golden_models.json` beside it, with `.` on PYTHONPATH. The other
tests here, and other files, state why these names and layouts are right; the recorded file says that they stay.
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
from gptperf.distributed.bucket_sizes import ALIGN
from gptperf.distributed.buckets import BucketGroup
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
    """A line per bucket: group, elements, whether the model reads a copy, and the offset of each parameter."""
    lines = []
    for bucket in weights.buckets:
        inside = " ".join(f"{name}@{weights.places[name].offset}" for name in bucket.names)
        lines.append(f"{bucket.group.value}, {bucket.compute.numel()}, {bucket.copy is not None}: {inside}")
    return lines


def _weights(name: str) -> dict[str, Replicated]:
    """The weights of a model under every strategy, as rank 1 of 3 has them."""
    three = Collectives(3, 1, torch.device("cpu"))
    with mock.patch.object(dist, "broadcast"):
        return {
            "replicated": Replicated(_model(name), torch.bfloat16, bucket_numel=BUCKET_NUMEL),
            "zero1": Sharded(_model(name), torch.bfloat16, three, bucket_numel=BUCKET_NUMEL),
            "fsdp": FullySharded(_model(name), torch.bfloat16, three, min_num_params=0),
            "fsdp_joined": FullySharded(_model(name), torch.bfloat16, three, min_num_params=20_000),
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
        "buckets": {strategy: _layout(weights) for strategy, weights in _weights(name).items()},
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_preset_builds_stays(name: str) -> None:
    found, wanted = _facts(name), json.loads(GOLDEN.read_text())[name]
    for fact in wanted:
        assert found[fact] == wanted[fact], fact


@pytest.mark.parametrize("name", VARIANTS)
def test_buckets_hold_every_parameter_once_by_group_in_the_order_of_backward(name: str) -> None:
    """Whatever the recorded layouts are: what optimizers, reductions and kernels rely on."""
    parameters = dict(_model(name).named_parameters())
    for strategy, weights in _weights(name).items():
        order = [key for bucket in weights.buckets for key in bucket.names]
        vectors = [key for key, parameter in parameters.items() if parameter.ndim == 1]
        matrices = [key for key in parameters if key not in vectors]
        # The last layer first, as backward reaches them; vectors, of which every layer has some, after all matrices.
        assert order == [*reversed(matrices), *reversed(vectors)], strategy
        for bucket in weights.buckets:
            wanted = {_group(key, parameters[key]) for key in bucket.names}
            assert wanted == {bucket.group}, f"{strategy}: {bucket.names}"
            end = 0
            for key in bucket.names:
                place = weights.places[key]
                assert (place.bucket, place.shape) == (bucket, parameters[key].shape)
                assert place.offset % ALIGN == 0
                assert end <= place.offset < end + ALIGN, f"{strategy}: {key} overlaps, or leaves a gap of a line"
                end = place.offset + place.shape.numel()
            assert end <= bucket.compute.numel()
            assert bucket.compute.numel() % (ALIGN * weights.world_size) == 0  # equal shards, each aligned


def _group(name: str, parameter: torch.Tensor) -> BucketGroup:
    if parameter.ndim == 1:
        return BucketGroup.VECTOR
    return BucketGroup.EMBEDDING if name.split(".")[0] in ("wte", "position", "lm_head") else BucketGroup.HIDDEN


def test_every_drawn_weight_is_drawn_twice() -> None:
    """PyTorch draws when it makes a layer, gptperf when the model is whole: a record of draws has both."""
    with Draws() as draws:
        model = _model("llama")
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert len(draws.found) == 2 * len(matrices)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: _facts(name) for name in VARIANTS}, indent=1) + "\n")
