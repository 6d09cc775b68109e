"""Envelopes, bootstrap intervals and confidence sequences: by hand, by their properties and by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptperf.race.envelope import FEWEST_SEEDS, Interval, distances, log_tokens_at, product, t_interval
from gptperf.race.sequence import bounds

TOKENS = np.array([1e6, 2e6, 4e6])


def test_tokens_at_a_loss_by_hand() -> None:
    curves = np.array([[4.0, 3.0, 2.0], [4.0, 3.5, 3.75], [4.0, 4.5, 3.0]])
    found = np.exp(log_tokens_at(curves, np.log(TOKENS), np.array([4.5, 4.0, 3.5, 2.5, 1.9])))
    assert found[0] == pytest.approx([0.0, 1e6, math.sqrt(2) * 1e6, math.sqrt(8) * 1e6, math.inf])
    assert found[1] == pytest.approx([0.0, 1e6, 2e6, math.inf, math.inf])  # the end of a later cooldown is no better
    assert found[2, 2] == pytest.approx(math.sqrt(8) * 1e6)  # from 4.0 to 3.0: the envelope is flat up to 2e6


@given(
    st.lists(st.floats(1, 9), min_size=3, max_size=3),
    st.lists(st.floats(0.5, 9.5), min_size=2, max_size=6),
)
def test_lower_losses_never_take_fewer_tokens(curve: list[float], losses: list[float]) -> None:
    found = log_tokens_at(np.array([curve]), np.log(TOKENS), np.array(sorted(losses, reverse=True)))[0]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))
    inside = found[np.isfinite(found)]
    assert all(math.log(1e6) - 1e-9 <= value <= math.log(4e6) + 1e-9 for value in inside)


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.6])
def test_the_ratio_of_equal_curves_that_are_shifted(ratio: float) -> None:
    """Where one arm needs `ratio` times the tokens at every loss, this is the distance, but for the interpolation."""

    def curve(tokens: np.ndarray) -> np.ndarray:
        return 2 + 3 * (tokens / 1e6) ** -0.1

    first, second = (np.tile(curve(TOKENS / part), (FEWEST_SEEDS, 1)) for part in (1.0, ratio))
    found = distances(first, second, (TOKENS, TOKENS))
    assert found is not None
    # The chord of a power law b t^-0.1 over a factor of 2 in t errs by at most 0.1^2 log(2)^2 / 8 of b, which is that
    # divided by 0.1 in log t.
    error = 0.1 * math.log(2) ** 2 / 8 * 2**0.1
    for one in (*found.at_loss, found.whole):
        assert math.log(one.ratio / ratio) == pytest.approx(0, abs=2 * error)
        assert one.low == pytest.approx(one.ratio)  # seeds that agree leave no doubt
        assert one.high == pytest.approx(one.ratio)
    swapped = distances(second, first, (TOKENS, TOKENS))
    assert swapped is not None
    assert swapped.whole.ratio == pytest.approx(1 / found.whole.ratio)
    more = distances(first, second, (TOKENS, 3 * TOKENS))
    assert more is not None
    assert more.whole.ratio == pytest.approx(3 * found.whole.ratio)


def test_nothing_is_extrapolated() -> None:
    first = np.tile([4.0, 3.8, 3.6], (5, 1))
    assert distances(first, first - 0.5, (TOKENS, TOKENS)) is None
    noisy = first - 0.38 + np.linspace(-0.1, 0.1, 5)[:, None]
    found = distances(first, noisy, (TOKENS, TOKENS))
    assert found is not None
    assert found.whole.low == 0  # in some resamples the second arm is below the loss from its first point on
    assert 0 < found.whole.ratio < 1


def test_what_both_arms_of_a_seed_share_leaves_no_doubt() -> None:
    """Seeds that differ by much more than the arms do: the arms of a seed are resampled together."""
    of_seed = np.linspace(-0.2, 0.2, 6)[:, None]
    first = np.array([4.0, 3.5, 3.0]) + of_seed
    found = distances(first, first.copy(), (TOKENS, 0.9 * TOKENS))
    assert found is not None
    assert (found.whole.ratio, found.whole.low, found.whole.high) == pytest.approx((0.9, 0.9, 0.9))


def _covered(seeds: int, races: int) -> float:
    """Returns the share of simulated races whose interval holds the true ratio."""
    random, inside = np.random.default_rng(seeds), 0
    for _ in range(races):
        of_seed = random.normal(0, 0.01, (seeds, 1))  # both arms of a seed share it
        slopes = np.array([0.4, 0.2, 0.0]) + 3
        first, second = (slopes + of_seed + random.normal(0, 0.01, (seeds, 3)) for _ in range(2))
        found = distances(first, second, (TOKENS, 0.7 * TOKENS))
        assert found is not None
        inside += (found.whole.low or 0) <= 0.7 <= (found.whole.high or 0)
    return inside / races


def test_intervals_hold_the_true_ratio_as_often_as_stated() -> None:
    """With 5 seeds in 92% of races, and 4 standard errors of a share of 600 races are 4.4%.

    The limits of a mean of 5 normal values are (4 smallest + next) / 5 and its mirror image: they hold the true mean in
    92.2%. Plain percentiles would hold it in about 84%.
    """
    assert _covered(5, 600) > 0.922 - 4 * math.sqrt(0.922 * 0.078 / 600)


def test_an_interval_needs_five_seeds() -> None:
    first = np.tile([4.0, 3.5, 3.0], (4, 1))
    found = distances(first, first - 0.1, (TOKENS, TOKENS))
    assert found is not None
    assert (found.whole.low, found.whole.high) == (None, None)
    assert not found.whole.excludes_one


def test_products_of_ratios() -> None:
    a, exact = Interval(0.8, 0.7, 0.9), Interval(1.25, 1.25, 1.25)
    found = product(a, exact)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.0, 0.875, 1.125))
    wide = product(a, a)
    assert wide.low == pytest.approx(0.64 * math.exp(-math.sqrt(2) * math.log(0.8 / 0.7)))
    assert product(a, Interval(1.0, None, None)).low is None
    assert product(a, Interval(1.0, 0.0, math.inf)) == Interval(0.8, 0.0, math.inf)
    times = t_interval(np.log([1.1, 1.2, 1.3]))
    assert times.low is not None
    assert times.low < times.ratio == pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3))


def test_a_sequence_that_is_looked_at_all_the_time_is_seldom_wrong() -> None:
    """A martingale from 1 reaches 20 with a chance of at most 5% (Ville), which bounds the share of false decisions."""
    random = np.random.default_rng(1)
    runs, wrong, wrong_t = 1500, 0, 0
    for values in random.normal(0, 1, (runs, 25)):
        found = bounds(list(values), 0.05)
        wrong += found.low > 0 or found.high < 0
        counts = np.arange(1, 26)
        means = np.cumsum(values) / counts
        deviations = np.sqrt((np.cumsum(values**2) - counts * means**2)[1:] / (counts[1:] - 1))
        wrong_t += bool((np.abs(means[1:]) > 2.5 * deviations / np.sqrt(counts[1:])).any())
    assert wrong / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
    assert wrong_t / runs > 0.15  # an interval for one look is wrong far more often


def test_a_sequence_finds_an_effect() -> None:
    """An effect of 3 standard deviations is decided by 8 pairs nearly always: 1.6 would suffice for these means."""
    random = np.random.default_rng(2)
    found = [bounds(list(values), 0.05) for values in random.normal(3, 1, (200, 8))]
    assert sum(one.low > 0 for one in found) / 200 > 0.95
    assert not any(one.high < 0 for one in found)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.floats(0.5, 2), st.floats(-1, 1))
def test_a_sequence_follows_scale_and_shift_and_only_narrows(values: list[float], scale: float, shift: float) -> None:
    found = bounds(values, 0.05)
    moved = bounds([scale * value + shift for value in values], 0.05)
    assert moved.mean == pytest.approx(scale * found.mean + shift, abs=1e-9)
    assert moved.low == pytest.approx(scale * found.low + shift, abs=1e-7)
    earlier = bounds(values[:-1], 0.05)
    assert earlier.low <= found.low + 1e-12
    assert found.high <= earlier.high + 1e-12
    stricter = bounds(values, 0.01)
    assert stricter.low <= found.low + 1e-12
    assert found.high <= stricter.high + 1e-12


def test_a_bound_by_hand() -> None:
    """The ratio of the likelihoods reaches 1 / level exactly at the bound."""
    values = [1.0, 1.2, 0.9, 1.1]
    found = bounds(values, 0.05)
    mean, squares = 1.05, sum((value - 1.05) ** 2 for value in values)
    a = 0.1 / 4.1
    u = 4 * (mean - found.low) ** 2 / squares
    assert math.sqrt(a) * ((1 + a * u) / (1 + u)) ** -2 == pytest.approx(20)
    assert bounds(values[:2], 0.05).low == -math.inf
