"""The intervals and agreements, against tables, equations and simulation."""

import doctest
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from fedjax_safety import statistics

counts = st.integers(1, 400).flatmap(
  lambda n: st.tuples(st.integers(0, n), st.just(n))
)
verdicts = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1)


def test_examples_in_the_docstrings():
  result = doctest.testmod(statistics)
  assert result.attempted > 5
  assert result.failed == 0


@pytest.mark.parametrize(
  ('successes', 'n', 'low', 'high'),
  [
    (8, 10, 0.4902, 0.9433),
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (81, 263, 0.2553, 0.3662),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_matches_published_bounds(successes, n, low, high):
  interval = statistics.wilson_interval(successes, n)
  assert interval.value == successes / n
  assert interval.low == pytest.approx(low, abs=5e-5)
  assert interval.high == pytest.approx(high, abs=5e-5)


@hypothesis.given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_bounds_solve_the_score_equation(count, confidence):
  successes, n = count
  share, low, high = statistics.wilson_interval(successes, n, confidence)
  z = {0.5: 0.674490, 0.9: 1.644854, 0.95: 1.959964, 0.99: 2.575829}[confidence]
  for bound in (low, high):
    slack = z * math.sqrt(bound * (1 - bound) / n)
    # The bounds 0 and 1 solve it trivially: the share is there as well.
    assert abs(bound - share) == pytest.approx(slack, abs=1e-5)
  assert 0 <= low <= share <= high <= 1
  assert high > low


@hypothesis.given(counts)
def test_wilson_is_symmetric_in_success_and_failure(count):
  successes, n = count
  _, low, high = statistics.wilson_interval(successes, n)
  _, other_low, other_high = statistics.wilson_interval(n - successes, n)
  assert other_low == pytest.approx(1 - high, abs=1e-12)
  assert other_high == pytest.approx(1 - low, abs=1e-12)


def test_wilson_without_trials_knows_nothing():
  value, low, high = statistics.wilson_interval(0, 0)
  assert math.isnan(value)
  assert (low, high) == (0, 1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((11, 10), 'successes=11'),
    ((-1, 10), 'successes=-1'),
    ((0, -1), 'n=-1'),
    ((1, 2, 1.0), 'confidence=1.0'),
    ((1, 2, 0.0), 'confidence=0.0'),
  ],
)
def test_wilson_refuses_impossible_counts(arguments, message):
  with pytest.raises(ValueError, match=message):
    statistics.wilson_interval(*arguments)


def test_difference_matches_newcombes_own_example():
  interval = statistics.difference_interval(56, 70, 48, 80)
  assert interval.value == pytest.approx(0.2)
  assert interval.low == pytest.approx(0.0524, abs=5e-5)
  assert interval.high == pytest.approx(0.3339, abs=5e-5)


@hypothesis.given(counts, counts)
def test_difference_is_antisymmetric_and_contains_its_value(ours, theirs):
  value, low, high = statistics.difference_interval(*ours, *theirs)
  back = statistics.difference_interval(*theirs, *ours)
  assert -1 <= low <= value <= high <= 1
  assert back == pytest.approx((-value, -high, -low))


@pytest.mark.parametrize(
  ('degrees', 'confidence', 'quantile'),
  [
    (1, 0.95, 12.706),
    (2, 0.95, 4.303),
    (3, 0.95, 3.182),
    (4, 0.95, 2.776),
    (9, 0.95, 2.262),
    (10, 0.95, 2.228),
    (30, 0.95, 2.042),
    (120, 0.95, 1.980),
    (1, 0.99, 63.657),
    (2, 0.99, 9.925),
    (9, 0.99, 3.250),
    (4, 0.90, 2.132),
    (5, 0.50, 0.727),
  ],
)
def test_t_quantile_matches_the_tables(degrees, confidence, quantile):
  found = statistics.t_quantile(degrees, confidence)
  assert found == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize('degrees', [1, 2, 5, 8, 31])
def test_t_quantile_covers_what_it_says_by_integration(degrees):
  bound = statistics.t_quantile(degrees, 0.95)
  scale = math.exp(
    math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
  ) / math.sqrt(degrees * math.pi)
  steps = 20_000
  width = 2 * bound / steps
  covered = sum(
    scale
    * (1 + (-bound + (i + 0.5) * width) ** 2 / degrees) ** (-(degrees + 1) / 2)
    for i in range(steps)
  )
  assert covered * width == pytest.approx(0.95, abs=1e-6)


def test_t_quantile_refuses_no_degrees_of_freedom():
  with pytest.raises(ValueError, match='degrees=0'):
    statistics.t_quantile(0)


def test_mean_interval_by_hand():
  # Mean 4, standard deviation 2, error 2 / sqrt(3), t(2) = 4.302653.
  interval = statistics.mean_interval([2.0, 4.0, 6.0])
  half = 4.302653 * 2 / math.sqrt(3)
  assert interval == pytest.approx((4, 4 - half, 4 + half), rel=1e-6)


def test_mean_interval_of_one_value_has_no_bounds():
  value, low, high = statistics.mean_interval([0.25])
  assert value == 0.25
  assert math.isnan(low) and math.isnan(high)


def test_mean_interval_of_equal_values_has_no_width():
  assert statistics.mean_interval([0.1] * 3) == pytest.approx((0.1, 0.1, 0.1))


def test_mean_interval_needs_a_value():
  with pytest.raises(ValueError, match='at least one value'):
    statistics.mean_interval([])


def test_kappa_of_a_worked_example():
  # 20 both yes, 5 and 10 split, 15 both no: observed .7, expected .5.
  a = [True] * 25 + [False] * 25
  b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
  assert statistics.cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_at_its_ends():
  a = [True, True, False, False]
  assert statistics.cohen_kappa(a, a) == 1
  assert statistics.cohen_kappa(a, [not x for x in a]) == -1
  assert statistics.cohen_kappa(a, [True, False, True, False]) == 0
  assert statistics.cohen_kappa(a, [True] * 4) == 0


def test_kappa_is_undefined_without_any_contrast():
  assert math.isnan(statistics.cohen_kappa([True] * 5, [True] * 5))
  assert math.isnan(statistics.cohen_kappa([], []))


@hypothesis.given(verdicts)
def test_kappa_is_symmetric_and_at_most_one(pairs):
  a, b = zip(*pairs, strict=True)
  kappa = statistics.cohen_kappa(a, b)
  assert kappa == pytest.approx(statistics.cohen_kappa(b, a), nan_ok=True)
  assert math.isnan(kappa) or -1 <= kappa <= 1


def test_kappa_refuses_sequences_that_do_not_pair_up():
  with pytest.raises(ValueError, match='got 2 and 1'):
    statistics.cohen_kappa([True, False], [True])


def test_precision_and_recall_by_hand():
  called = [True, True, True, False, False]
  real = [True, False, False, True, False]
  precision, recall = statistics.precision_recall(called, real)
  assert precision == pytest.approx(1 / 3)
  assert recall == pytest.approx(1 / 2)


def test_precision_and_recall_are_undefined_without_positives():
  precision, recall = statistics.precision_recall([False], [True])
  assert math.isnan(precision)
  assert recall == 0
  precision, recall = statistics.precision_recall([True], [False])
  assert precision == 0
  assert math.isnan(recall)
