"""Rivals: the plain model is gptperf's model, and contenders take turns."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import rivals
from bench.measure.models import RIVAL_MODELS, SHAPES, rival_config
from bench.measure.plain_model import PlainGPT, unsupported
from bench.report import outside
from gptperf.config import command_line
from gptperf.errors import run_main
from gptperf.model import GPT
from gptperf.plan import find_gpu, plan

SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=61", "--vocab_multiple=8"]


@pytest.mark.parametrize("flags", [["--bias=True"], ["--norm_position=pre"], ["--activation=relu_squared"], []])
@pytest.mark.parametrize("preset", ["gpt2", "llama", "gpt2_openai", "hybrid"])
def test_the_plain_model_is_gptperfs(preset: str, flags: list[str]) -> None:
    config = command_line.resolve([*SIZES, f"--arch_preset={preset}", *flags]).config.model
    ours, plain = GPT(config), PlainGPT(config)
    named = dict(plain.named_parameters())
    assert named.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
        named[name].data.copy_(parameter.data)
    tokens = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (ours, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=2e-4, atol=1e-6, msg=name)


def test_a_part_that_the_plain_model_lacks_is_named() -> None:
    for flag, part in (("--qk_norm=True", "qk_norm"), ("--n_kv_head=1", "n_kv_head"), ("--window=4", "window")):
        config = command_line.resolve([*SIZES, "--arch_preset=llama", flag]).config.model
        assert part in str(unsupported(config))


def test_the_shapes_have_as_many_tokens_as_they_say() -> None:
    for model in RIVAL_MODELS:
        small, usual, long = (rival_config(model, shape) for shape in SHAPES)
        assert unsupported(usual.model) is None
        assert small.train.batch_size == 1
        assert small.model.block_size == usual.model.block_size
        assert long.model.block_size == 8192
        assert long.tokens_per_iter == pytest.approx(usual.tokens_per_iter, rel=0.01)
        gpu = find_gpu("H200")
        assert plan(long, gpu).fits


def test_a_rival_is_known_or_gptperf_with_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main(rivals.main, ["--rivals", "compile", "gptperf --cuda_graph=False", "torchoa", "gptperfs"])
    message = capsys.readouterr().err
    assert "found 'torchoa'" in message
    assert "nearest: torchao" in message
    assert "found 'gptperfs'" in message
    assert "cuda_graph" not in message


def test_a_variant_is_gptperf_with_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens per second are those of its own configuration."""
    built: list[int] = []

    def build(turn: rivals.Turn) -> int:
        built.append(turn.config.train.batch_size)
        return built[-1]

    monkeypatch.setattr(rivals, "_CONTENDERS", {rivals.OURS: build})
    monkeypatch.setattr(rivals, "cuda_window", lambda size: lambda first, steps: [size] * steps)
    variant = "gptperf --batch_size=3"
    other = rival_config("shakespeare_char", "usual", ["--batch_size=3"])
    turn = rivals.Turn(rival_config("shakespeare_char", "small"), {variant: other})
    found = rivals.measure(turn, [rivals.OURS, variant], rounds=1, steps=5)
    assert built == [1, 3]
    assert found[variant]["ratio"] == 3
    assert found[variant]["tokens_per_sec"] == found[rivals.OURS]["tokens_per_sec"] == pytest.approx(256e3)
    assert variant in "\n".join(rivals.lines(found))


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each runs one window a round; one that cannot train the model is left out with the reason, and said so."""
    ran: list[tuple[str, int, int]] = []

    def contender(name: str, ms: float) -> Any:
        def build(turn: rivals.Turn) -> Any:
            ran.append((name, -1, -1))
            return name, ms

        return build

    def window(step: Any) -> Any:
        name, ms = step

        def run(first: int, steps: int) -> list[float]:
            ran.append((name, first, steps))
            return [ms] * steps

        return run

    def cannot(turn: rivals.Turn) -> Any:
        raise NotImplementedError("no such part")

    contenders = {rivals.OURS: contender(rivals.OURS, 2.0), "compile": contender("compile", 3.0), "liger": cannot}
    monkeypatch.setattr(rivals, "_CONTENDERS", contenders)
    monkeypatch.setattr(rivals, "cuda_window", window)
    turn = rivals.Turn(rival_config("shakespeare_char", "small"))
    found = rivals.measure(turn, [rivals.OURS, "compile", "liger"], rounds=2, steps=5)
    assert [row for row in ran if row[2] == 5] == [
        (name, first, 5) for first in (12, 17) for name in (rivals.OURS, "compile")
    ]
    assert len([row for row in ran if row[1] == -1]) == 2  # each is built once while all fit
    assert found["compile"]["peak_memory_gb"] is None
    assert found["compile"]["ratio"] == 1.5
    assert found["compile"]["tokens_per_sec"] == pytest.approx(256 / 3e-3)
    assert found["liger"] == {"reason": "no such part"}
    record: Any = {"status": "done", "results": {"model": "m", "shape": "small", "contenders": found}}
    (section,) = outside.rivals({"rivals/m/small": record})
    assert [(*row[:3], row[-1]) for row in section.tables[0].rows] == [
        ("m", "small", rivals.OURS, "1.000"),
        ("m", "small", "compile", "1.500"),
        ("m", "small", "liger", ""),
    ]
    text = "\n".join(rivals.lines(found))
    assert "1.500" in text
    assert "no such part" in text


@pytest.mark.parametrize("fits", [0, 1])
def test_contenders_that_do_not_fit_together_are_built_for_each_turn(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of memory beside others costs no figure; running out of memory alone is the contender's reason."""
    built: list[str] = []

    def contender(name: str) -> Any:
        def build(turn: rivals.Turn) -> Any:
            if len(built) >= fits:
                raise torch.OutOfMemoryError
            built.append(name)
            return name

        return build

    monkeypatch.setattr(rivals, "_CONTENDERS", {name: contender(name) for name in (rivals.OURS, "compile")})
    monkeypatch.setattr(rivals, "cuda_window", lambda name: lambda first, steps: [2.0] * steps)
    monkeypatch.setattr(rivals, "_free", lambda windows: (windows.clear(), built.clear()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7e9)
    found = rivals.measure(rivals.Turn(rival_config("shakespeare_char", "small")), [rivals.OURS, "compile"], 2, 5)
    if fits:
        assert {row["step_ms"] for row in found.values()} == {2.0}
        assert found["compile"]["peak_memory_gb"] == 7.0
    else:
        assert found == {name: {"reason": "out of memory"} for name in (rivals.OURS, "compile")}


def test_rivals_train_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain step and Hugging Face's step lower the loss of one batch that is repeated."""
    config = command_line.resolve([*SIZES, "--arch_preset=llama", "--batch_size=4", "--learning_rate=1e-2"]).config
    turn = rivals.Turn(dataclasses.replace(config))
    tokens = torch.randint(0, 61, (2, 4, 16))

    def repeated(*_: Any) -> Iterator[torch.Tensor]:
        while True:
            yield tokens

    monkeypatch.setattr(rivals, "random_batches", repeated)
    monkeypatch.setattr(torch, "autocast", lambda *_: torch.enable_grad())
    model = PlainGPT(config.model)
    step = rivals._trained(turn, model, model)
    losses = [step(i).item() for i in range(12)]  # type: ignore[attr-defined]
    assert losses[-1] < losses[0] - 0.5
