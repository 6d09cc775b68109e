"""Numbers, durations and values as text."""

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptperf.formats import (
    about,
    byte_text,
    count_text,
    counted,
    duration,
    mfu_scale,
    number,
    one_line,
    percent,
    percentiles,
    rough_duration,
    short_count,
    value_text,
    with_error,
    with_unit,
)


def test_an_mfu_names_convention_peak_dtype_and_basis() -> None:
    whole = {"convention": "strict", "hardware_peak_tflops": 2250.0, "peak_dtype": "bfloat16", "peak_basis": "dense"}
    assert mfu_scale(whole) == "strict, of 2,250.0 TFLOP/s bf16 dense"
    assert mfu_scale({}) == ""
    for key, gone in {"convention": "strict, ", "peak_dtype": "bf16 ", "peak_basis": " dense"}.items():
        assert mfu_scale(whole | {key: None}) == mfu_scale(whole).replace(gone, "")
    damaged = mfu_scale({"convention": ["x\n" * 99], "hardware_peak_tflops": 10**400, "peak_basis": {"a": 1}})
    assert damaged.isprintable()
    assert len(damaged) <= 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0 s"),
        (1e-5, "under 1 ms"),
        (0.04, "40 ms"),
        (42, "42.0 s"),
        (100, "1:40"),
        (600.6, "10:01"),
        (3600, "1:00:00"),
    ],
)
def test_a_duration_below_a_day(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0678, "0.068 s"), (119, "120 s"), (148, "2.5 minutes"), (7200, "2 hours"), (9e9, "2,500,000 hours")],
)
def test_an_estimated_duration_has_two_digits(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


@given(st.floats(0, 1e15))
def test_no_number_of_bytes_reads_as_nothing(count: float) -> None:
    value, unit = byte_text(count).split(" ")
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(value) * scale == pytest.approx(count, rel=1e-3, abs=0.5)
    assert unit == "B" or float(value) >= 1
    assert unit == "TB" or float(value) < 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (12.34e9, "12.34 GB"), (16e9, "16.00 GB"), (150.1e9, "150.1 GB"), (999_960, "1.000 MB")],
)
def test_bytes_have_four_digits(count: float, text: str) -> None:
    assert byte_text(count) == text


@given(st.floats(1e-9, 1e9))
def test_no_figure_reads_as_nothing(value: float) -> None:
    for text in (percent(value), count_text(value), duration(value)):
        assert any(digit in text for digit in "123456789"), text


@given(st.integers(0, 10**9))
def test_a_noun_agrees_with_its_number(count: int) -> None:
    assert counted(count, "thread") == f"{count:,} thread{'' if count == 1 else 's'}"
    assert counted(count, "copy", "copies").split(" ")[1] == ("copy" if count == 1 else "copies")


def test_an_estimate_is_as_exact_as_it_is_known() -> None:
    texts = [about(seconds) for seconds in (None, 0.3, 12.4, 150.0)]
    assert texts == ["", " (less than 1 s)", " (about 12 s)", " (about 2:30)"]


def test_a_duration_of_days() -> None:
    assert duration(93784) == "1d 02:03:04"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (999_600, "1M"), (1_572_864_000, "1.57B"), (-2e12, "-2T")]
)
def test_a_count_has_three_digits_and_a_letter(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.798e9, "0.798 GFLOPs"), (5e11, "0.5 TFLOPs"), (50, "0.05 kFLOPs")])
def test_a_unit_has_the_prefix_that_leaves_a_tenth_before_it(value: float, text: str) -> None:
    assert with_unit(value, "FLOPs") == text


def test_what_is_missing_is_a_dash_unless_told_otherwise() -> None:
    assert (number(None, ".1f"), number(None, ".1f", "nan"), number(0.123, ".1%")) == ("-", "nan", "12.3%")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_percentiles_are_of_the_values_and_in_order(values: list[float]) -> None:
    low, middle, high = percentiles(values)
    assert {low, high} <= set(values)
    assert low <= middle <= high
    assert middle == statistics.median(values)
    below = sum(value < low for value in values)
    assert below <= len(values) // 10
    assert sum(value > high for value in values) <= len(values) // 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (9_999, "9999"),
        (10_000, "10,000"),
        (10**400, "a number with too many digits"),
        (0.000123456, "0.00012346"),
        (12_345.6, "12,346"),
        (1e30, "1e+30"),
        ([1, None, "x"], "1, -, x"),
        ({"torch": "2.11", "fits": False}, "torch 2.11, fits no"),
    ],
)
def test_a_value_of_any_kind_is_a_cell(value: Any, text: str) -> None:
    assert value_text(value) == text
    assert value_text([value], 3) == value_text(value, 3)


@given(st.text(max_size=200), st.integers(10, 80))
def test_one_line_holds_no_control_character_and_is_short(text: str, most: int) -> None:
    found = one_line(text, most)
    assert found.isprintable()
    assert len(found) <= most
    if text.isprintable() and len(text) <= most:
        assert found == text


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"acc": 0.25123}, "0.2512"),
        ({"acc": 0.25123, "acc_stderr": 0.0043}, "0.2512 +- 0.0043"),
        ({"acc": None, "acc_stderr": None}, "-"),
        ({"acc_norm": 0.5}, "-"),
    ],
)
def test_a_score_has_its_standard_error(scores: dict[str, float | None], text: str) -> None:
    assert with_error(scores, "acc") == text
    assert with_error({"perplexity": 418315169917.3, "perplexity_stderr": 88.0}, "perplexity") == "4.183e+11 +- 88"
