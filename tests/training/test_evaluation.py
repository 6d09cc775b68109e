"""Evaluation over ranks that have different numbers of batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gptperf.config import command_line
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import load_tokenizer
from gptperf.distributed.process import Process
from gptperf.training.engine import build_engine
from gptperf.training.evaluation import _as_many_as_any_rank, evaluate, sample_text


@dataclass(eq=False)
class BesideALonger(Process):
    """One of two ranks; the other one has `longer` batches."""

    longer: int = 0
    asked: list[bool] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag or len(self.asked) <= self.longer


def _batches(count: int) -> Iterator[torch.Tensor]:
    return (torch.full((2, 3, 8), i + 1) for i in range(count))


def test_a_process_that_has_fewer_goes_on_with_what_does_not_count() -> None:
    process = BesideALonger(1, 2, torch.device("cpu"), longer=4)
    found = list(_as_many_as_any_rank(_batches(2), process, 8))
    assert [rows for _, rows in found] == [3, 3, 0, 0]
    assert [batch[0, 0, 0].item() for batch, _ in found] == [1, 2, 0, 0]
    assert found[2][0].shape == (2, 1, 8)
    assert process.asked == [True, True, False, False, False]


def test_the_longer_one_gives_what_it_has() -> None:
    process = BesideALonger(0, 2, torch.device("cpu"), longer=1)
    assert [rows for _, rows in _as_many_as_any_rank(_batches(3), process, 8)] == [3, 3, 3]


def test_dropout_is_off_in_an_evaluation_and_on_again_after_it(corpus: Path) -> None:
    flags = ["--dropout=0.5", f"--data_dir={corpus / 'data'}"]
    config = command_line.resolve([str(corpus / "small.toml"), *flags]).config
    engine = build_engine(config, Process(0, 1, torch.device("cpu")))
    tokens = TokenSource.open(corpus / "data" / "text", "val", vocab_size=config.model.vocab_size)
    first, second = (evaluate(engine, tokens) for _ in range(2))
    assert first == second
    assert engine.model.training
    batch = torch.zeros(2, 2, config.model.block_size, dtype=torch.int64)
    assert engine.model(*batch).item() != engine.model(*batch).item()


def test_a_sample_may_use_any_algorithm(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses the prefix sum of a draw on a GPU where only deterministic algorithms are permitted."""
    config = command_line.resolve([str(corpus / "small.toml"), f"--data_dir={corpus / 'data'}"]).config
    engine = build_engine(config, Process(0, 1, torch.device("cpu")))
    tokenizer = load_tokenizer("byte")
    permitted: list[bool] = []
    draw = engine.model.draw

    def watched(*arguments: Any) -> torch.Tensor:
        permitted.append(not torch.are_deterministic_algorithms_enabled())
        return draw(*arguments)

    monkeypatch.setattr(engine.model, "draw", watched)
    torch.use_deterministic_algorithms(True)
    try:
        sample_text(engine, tokenizer, 3)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert permitted
    assert all(permitted)


def test_ranks_go_on_from_the_same_part(corpus: Path) -> None:
    """One has two batches and the other one; requests to stop are agreed on after the same parts."""

    class Alone(Process):
        def mean(self, value: torch.Tensor) -> torch.Tensor:
            return value

    flags = [str(corpus / "small.toml"), f"--data_dir={corpus / 'data'}", "--eval_iters=3"]
    tokens, parts = TokenSource.open(corpus / "data" / "text", "val"), []
    for rank in (0, 1):
        config = command_line.resolve(flags).config
        process = Alone(rank, 2, torch.device("cpu"))
        engine = build_engine(config, Process(0, 1, torch.device("cpu")))
        engine.process = process
        evaluate(engine, tokens)
        parts.append(process.progress.part)
    assert parts == [2, 2]
