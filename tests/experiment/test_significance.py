"""The differences of an ablation: pairs of seeds, Student's t, and Holm's correction for several comparisons."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptperf.ablate import results
from gptperf.experiment import significance


def test_differences_are_paired_by_seed() -> None:
    baseline = {1: 3.0, 2: 3.2, 3: 3.4}
    found = results.difference({1: 2.9, 2: 3.09, 3: 3.31}, baseline)  # -0.10, -0.11, -0.09
    assert found is not None
    assert found.mean == pytest.approx(-0.10)
    assert found.standard_error == pytest.approx(0.01 / math.sqrt(3))
    assert found.interval == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert (found.low, found.high) == pytest.approx((-0.11, -0.09))
    assert found.verdict == "better"  # though the seeds lie further apart than the variants
    noisy = results.difference({1: 2.9, 2: 3.3, 3: 3.2}, baseline)
    assert noisy is not None
    assert noisy.verdict == "within the spread"
    worse = results.difference({2: 3.3, 3: 3.501}, baseline)
    assert worse is not None
    assert (worse.verdict, list(worse.by_seed)) == ("worse", [2, 3])
    single = results.difference({1: 2.0}, baseline)
    assert single is not None
    assert (single.standard_error, single.verdict) == (None, "one seed, no spread")
    assert results.difference({9: 1.0}, baseline) is None


@given(st.floats(0, 20), st.integers(1, 12))
def test_p_is_the_area_of_both_tails(t: float, freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    heights = [scale * (1 + (t * i / 4000) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(4001)]
    area = t / 4000 / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    assert significance.t_p_value(t, freedom) == pytest.approx(1 - 2 * area, abs=1e-6)
    assert significance.t_p_value(-t, freedom) == significance.t_p_value(t, freedom)


def test_holm_by_hand() -> None:
    # 0.005 x 4 = 0.02; 0.01 x 3 = 0.03; 0.03 x 2 = 0.06; 0.04 x 1 = 0.04, but not below the 0.06 before it.
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.03]) == [0.03]
    assert significance.holm([0.6, 0.7]) == [1.0, 1.0]
    assert significance.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_raw_p_and_bonferroni(raw: list[float]) -> None:
    adjusted = significance.holm(raw)
    assert all(p <= q <= min(1, len(raw) * p) or q == pytest.approx(p) for p, q in zip(raw, adjusted, strict=True))
    ranked = sorted(zip(raw, adjusted, strict=True))
    assert [q for _, q in ranked] == sorted(adjusted)
    assert min(adjusted) == pytest.approx(min(1, len(raw) * min(raw)))
    # step down by step down: it rejects the smallest ones for which each p is at most level / (number that is left)
    for level in (0.05, 0.2):
        steps = [p * (len(raw) - i) <= level for i, p in enumerate(sorted(raw))]
        rejected = steps.index(False) if False in steps else len(steps)
        assert sum(q <= level for q in adjusted) == rejected


def test_holm_keeps_the_errors_of_many_arms_at_the_level() -> None:
    """Arms without a true difference: among eight, one is called different in at most 5% of the ablations."""
    random, wrong, wrong_alone = Random(7), 0, 0
    for _ in range(400):
        raw = []
        for _ in range(8):
            values = {seed: random.gauss(0, 1) for seed in range(4)}
            found = results.difference(values, dict.fromkeys(values, 0.0))
            assert found is not None
            raw.append(found.p or 0.0)
        wrong += min(significance.holm(raw)) < significance.LEVEL
        wrong_alone += min(raw) < significance.LEVEL
    assert wrong / 400 < 0.08  # 0.05 and three standard errors
    assert wrong_alone / 400 > 0.2


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (9, 2.262), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_quantiles_of_t(freedom: int, t: float) -> None:
    assert significance.t_half_width(freedom) == pytest.approx(t, abs=6e-4)
    assert significance.t_p_value(t, freedom) == pytest.approx(0.05, abs=2e-4)
