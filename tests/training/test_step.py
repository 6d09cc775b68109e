"""One training step: the update of a plain PyTorch loop, other dropout in every micro-batch, and all of its state."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from run_helpers import masters

from gptperf import checkpoint
from gptperf.config import command_line
from gptperf.distributed.process import Process
from gptperf.training.engine import Engine, build_engine
from gptperf.training.saved_state import TrainState, restore, snapshot
from gptperf.training.step import train_step

SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--vocab_size=31", "--batch_size=2"]
FLAGS = [*SIZES, "--gradient_accumulation_steps=4", "--max_iters=8", "--device=cpu", "--compile=False"]


def _engine(*flags: str) -> Engine:
    config = command_line.resolve([*FLAGS, "--dtype=float32", *flags]).config
    return build_engine(config, Process(0, 1, torch.device("cpu")))


def _batches(seed: int = 0) -> "itertools.repeat[torch.Tensor]":
    generator = torch.Generator().manual_seed(seed)
    return iter(lambda: torch.randint(0, 31, (2, 2, 8), generator=generator), None)  # type: ignore[return-value]


def test_a_step_is_the_one_of_a_plain_loop() -> None:
    """Every hyperparameter differs from its default, so a step that uses a default is another step."""
    flags = ["--arch_preset=gpt2_openai", "--learning_rate=2e-2", "--min_lr=4e-3", "--warmup_iters=2", "--beta1=0.7"]
    engine = _engine(*flags, "--beta2=0.9", "--adam_eps=1e-2", "--weight_decay=0.3", "--grad_clip=0.1")
    theirs = copy.deepcopy(engine.model)
    named = dict(theirs.named_parameters())
    groups = [{"params": [p for p in named.values() if (p.ndim >= 2) is is_matrix]} for is_matrix in (True, False)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups, betas=(0.7, 0.9), eps=1e-2, weight_decay=0.3)
    ours, same = _batches(), _batches()
    for step in range(5):
        result = train_step(engine, ours, step)
        losses = []
        for tokens, targets in itertools.islice(same, 4):
            losses.append(F.cross_entropy(theirs(tokens).flatten(0, 1), targets.flatten()))
            (losses[-1] / 4).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        fallen = (1 - math.cos(math.pi * (step - 2) / (8 - 2))) / 2
        rate = 2e-2 * (step + 1) / 3 if step < 2 else 2e-2 - fallen * (2e-2 - 4e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 2 * 0.1  # the step is clipped
        assert result.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert result.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-4)
        assert result.learning_rate == pytest.approx(rate)
        for name, master in masters(engine.weights):
            torch.testing.assert_close(master, named[name].data, rtol=1e-4, atol=1e-6, msg=f"{step}: {name}")


def test_every_micro_batch_of_a_job_drops_other_elements() -> None:
    """The random state of a micro-batch depends on seed, iteration and place in the job, not on the number of ranks."""
    found: dict[tuple[int, int], list[int]] = {}
    for seed, ranks in itertools.product((1, 2), (1, 2)):
        seeds: list[int] = []
        for rank in range(ranks):
            engine = _engine(f"--seed={seed}")
            engine.process = Process(rank, ranks, torch.device("cpu"))
            engine.model.register_forward_pre_hook(lambda *_, seeds=seeds: seeds.append(torch.initial_seed()))
            for step in range(3):
                train_step(engine, _batches(), step)
        found[seed, ranks] = sorted(seeds)
    for seed in (1, 2):
        assert found[seed, 1] == found[seed, 2]
    every = found[1, 1] + found[2, 1]
    assert len(set(every)) == len(every) == 2 * 3 * 4


def test_a_checkpoint_has_all_of_the_state(tmp_path: Path) -> None:
    """No value of the state equals that of a new run, and a resumed run has every one of them."""
    flags = ["--arch_preset=llama", "--dtype=float16", "--qk_norm=True"]
    engine, again = _engine(*flags, "--seed=1"), _engine(*flags, "--seed=2")
    for step in range(2):
        train_step(engine, _batches(), step)
    engine.scaler.update(123.0)
    state = TrainState(2, 64, 1.5, 32, 640, 3.25, 1, "run_7", "validation", 12.5, 2, True)
    for field in dataclasses.fields(TrainState):
        assert getattr(state, field.name) != getattr(TrainState(), field.name), field.name
    tensors, saved = snapshot(engine, state, "", {})
    path = checkpoint.save(tmp_path, step=2, tensors=tensors, state=saved)
    assert restore(checkpoint.load(path), again, "") == state
    assert again.scaler.state_dict() == engine.scaler.state_dict()
    assert again.scaler.get_scale() == 123
    assert again.optimizer.steps == 2
    for a, b in zip(engine.weights.buckets, again.weights.buckets, strict=True):
        for name, values in engine.optimizer.states(a).items():
            assert values.any()
            assert torch.equal(again.optimizer.states(b)[name], values), name
        assert torch.equal(a.master, b.master)
        assert torch.equal(a.compute, b.compute)
