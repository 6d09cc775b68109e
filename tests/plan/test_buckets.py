"""The planned buckets of hidden matrices, and the bytes of the states, against the real layouts on many GPUs."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptperf.config import Config, command_line
from gptperf.distributed.bucket_sizes import ALIGN
from gptperf.distributed.buckets import BucketGroup, Layout
from gptperf.distributed.collectives import Collectives
from gptperf.distributed.fsdp import FullySharded
from gptperf.distributed.replicated import Replicated
from gptperf.model import GPT
from gptperf.plan import buckets, memory
from gptperf.training.engine import packed_rows


def layouts_of(config: Config, gpus: int, strategy: str, bucket_numel: int) -> list[Layout]:
    """Returns the layouts that a run makes, from a model without memory and without the other processes."""
    found: list[Layout] = []

    class Laid:
        def _reserve(self, layouts: Sequence[Layout]) -> None:
            found.extend(layouts)

        def _add_bucket(self, layout: Layout) -> None:
            pass

    with torch.device("meta"):
        model = GPT(config.model)
    where = model, torch.bfloat16, mock.Mock(Collectives, world_size=gpus, rank=0)
    packed = packed_rows(model) if config.optimizer.optimizer == "muon" else None
    if strategy == "fsdp":
        numel = config.system.fsdp_min_num_params
        type("Laid", (Laid, FullySharded), {})(*where, packed=packed, min_num_params=numel)
    else:
        type("Laid", (Laid, Replicated), {})(*where, packed=packed, bucket_numel=bucket_numel)
    return found


@st.composite
def runs(draw: Any) -> Config:
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    flags = {
        "arch_preset": draw(st.sampled_from(["llama", "gpt2"])),
        "n_layer": draw(st.integers(1, 7)),
        "n_head": heads,
        "n_kv_head": draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0])),
        "n_embd": heads * draw(st.sampled_from([8, 16, 24, 40])),
        "d_ff": draw(st.integers(1, 30)) * 8,
        "weight_tying": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "optimizer": draw(st.sampled_from(["muon", "muon", "adamw"])),
        "fsdp_min_num_params": draw(st.integers(0, 60_000)),
    }
    flags["normuon"] = flags["optimizer"] == "muon" and draw(st.booleans())
    sizes = ("--vocab_size=96", "--block_size=8", "--dtype=bfloat16", "--device=cpu")
    return command_line.resolve([*sizes, *(f"--{key}={value}" for key, value in flags.items())]).config


gpu_counts = st.one_of(st.integers(2, 9), st.sampled_from([16, 24, 64]))


@given(runs(), gpu_counts, st.sampled_from(memory.STRATEGIES), st.integers(1, 100_000))
@settings(max_examples=150, deadline=None)
def test_the_planned_buckets_are_those_of_the_run(config: Config, gpus: int, strategy: Any, numel: int) -> None:
    real = [x for x in layouts_of(config, gpus, strategy, numel) if x.group is BucketGroup.HIDDEN]
    with mock.patch.object(buckets, "BUCKET_NUMEL", numel):
        planned = buckets.hidden_buckets(config, gpus, fsdp=strategy == "fsdp")
    if config.optimizer.optimizer == "muon":
        assert planned == [layout.numel for layout in real]
    else:  # without the gaps before aligned parameters
        assert planned == [sum(x.numel() for x in layout.parameters.values()) for layout in real]


@given(runs(), gpu_counts, st.sampled_from(memory.STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_the_planned_states_are_those_of_the_layouts(config: Config, gpus: int, strategy: Any) -> None:
    """But for the gaps of the other buckets: of vectors, embeddings and, with AdamW, all."""
    layouts = layouts_of(config, gpus, strategy, buckets.BUCKET_NUMEL)
    muon = config.optimizer.optimizer == "muon"
    weights = gradients = states = gaps = 0.0
    for layout in layouts:
        copy = 2 * layout.group.uses_compute_dtype
        parts = gpus if strategy != "ddp" else 1
        copies = gpus if strategy == "fsdp" and layout.group.fsdp_shards else 1
        weights += layout.numel * (4 / parts + copy / copies)
        gradients += layout.numel * 4 / copies
        own = muon and layout.group is BucketGroup.HIDDEN
        states += layout.numel * (4 if own else 8) / parts
        if own and config.optimizer.normuon:
            states += 4 * sum(x.shape[0] for x in layout.parameters.values()) / parts
        gaps += 0 if own else ALIGN * (len(layout.parameters) + gpus)
    plan = memory.footprint(config, gpus, strategy)
    whole = sum(numel_of(x.parameters.values()) for x in layouts if not x.group.fsdp_shards)
    slack = 18 * gaps + (8 * whole if strategy == "fsdp" else 0)  # FSDP's vectors stay whole, which is not counted
    for planned, found in ((plan.weights_gb, weights), (plan.gradients_gb, gradients), (plan.optimizer_gb, states)):
        assert 1e9 * planned <= found + 1
        assert found <= 1e9 * planned + slack + 1


def numel_of(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_the_padding_of_muon_is_in_the_plan() -> None:
    """With one block for 8 GPUs, 44% of a LLaMA's bucket is padding."""
    shape = ("--n_layer=1", "--n_embd=2048", "--n_head=16", "--d_ff=5504", "--arch_preset=llama")
    config = command_line.resolve([*shape, "--optimizer=muon", "--vocab_size=96"], world_size=8).config
    one, many = (memory.footprint(config, gpus) for gpus in (1, 8))
    hidden = sum(buckets.hidden_buckets(config, 1, fsdp=False))
    assert (many.optimizer_gb - one.optimizer_gb) * 1e9 / 4 / hidden == pytest.approx(0.44 / 0.56, rel=0.05)


def test_a_unit_of_fsdp_is_a_bucket_of_muon() -> None:
    """Half as many blocks as GPUs share a bucket, and two buckets are gathered at a time."""
    shape = ("--n_layer=16", "--n_embd=512", "--n_head=8", "--vocab_size=512", "--communication=process_group")
    muon, adamw = (
        command_line.resolve([*shape, f"--optimizer={name}"], world_size=8).config for name in ("muon", "adamw")
    )
    found = [memory.footprint(config, 8, "fsdp").buffers_gb for config in (muon, adamw)]
    units = [max(buckets.hidden_buckets(config, 8, fsdp=True)) for config in (muon, adamw)]
    assert units[0] >= 4 * units[1]
    assert 1e9 * (found[0] - found[1]) == pytest.approx((4 + 2 * 2) * (units[0] - units[1]), rel=0.01)


def test_nothing_is_padded_on_one_gpu() -> None:
    config = command_line.resolve(["--optimizer=muon", "--n_layer=2"]).config
    with torch.device("meta"):
        model: nn.Module = GPT(config.model)
    hidden = sum(x.numel() for name, x in model.named_parameters() if name.startswith("blocks.") and x.ndim == 2)
    assert sum(buckets.hidden_buckets(config, 1, fsdp=False)) == hidden
