"""Choices that are valid but may surprise: each has a line, and the usual ones have none."""

import pytest

from gptperf.config import command_line

ROPE = ["--arch_preset=llama", "--warmup_iters=1"]


def told(*flags: str) -> list[str]:
    return command_line.resolve(flags).config.notes()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--max_iters=10", "--warmup_iters=20"], "warmup_iters = 20 is not shorter than the schedule"),
        (
            ["--ffn_type=swiglu", "--activation=relu"],
            "activation = 'relu' has no effect",
        ),
        ([*ROPE, "--rope_factor=2"], "rope_factor = 2.0 has no effect: rope_scaling = 'none'"),
        (
            [*ROPE, "--rope_scaling=linear", "--rope_factor=2", "--rope_low_freq_factor=2"],
            "rope_low_freq_factor = 2.0 has no effect: rope_scaling = 'linear'",
        ),
        (["--arch_preset=gpt2"], "preset gpt2 is post-norm"),
    ],
)
def test_a_choice_that_may_surprise_has_one_line(flags: list[str], line: str) -> None:
    assert [line in found for found in told(*flags)].count(True) == 1


@pytest.mark.parametrize("flags", [["--rope_scaling=llama3"], ["--rope_scaling=linear", "--rope_factor=2"], []])
def test_other_choices_have_none(flags: list[str]) -> None:
    assert told(*ROPE, *flags) == []
