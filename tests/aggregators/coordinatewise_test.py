"""Rules of single coordinates against slow float64 definitions.

Values lie on a grid of halves, so that medians, means of 2^k values and the
differences to them are exact in float32 and ties are ties in both.
"""

import functools
import math
import statistics

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_safety import aggregators

SETTINGS = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
# Sums of at most 40 float32 numbers of size 4.
TOLERANCE = 2e-5
BAD = [math.nan, math.inf, -math.inf]
GRID = st.integers(-8, 8).map(lambda x: x / 2)
VALUES = st.one_of(GRID, GRID, GRID, st.sampled_from(BAD))


def _per_column(function, rows, *args):
  columns = np.where(np.isfinite(rows), rows, np.inf).astype(np.float64).T
  return np.array([function(sorted(column), *args) for column in columns])


def _median(ordered):
  middle = statistics.median(ordered)
  return middle if math.isfinite(middle) else 0.0


def _finite_mean(values):
  finite = [v for v in values if math.isfinite(v)]
  return statistics.fmean(finite) if finite else 0.0


def _trimmed_mean(ordered, f):
  """Bad values are trimmed first, even if more than f."""
  num_finite = sum(map(math.isfinite, ordered))
  end = min(num_finite, len(ordered) - f)
  return _finite_mean(ordered[f:end])


def _mean_around(center, ordered, f):
  if not math.isfinite(center):
    return 0.0
  by_distance = sorted(ordered, key=lambda v: (abs(v - center), v))
  return _finite_mean(by_distance[: len(ordered) - f])


def _meamed(ordered, f):
  return _mean_around(statistics.median(ordered), ordered, f)


def _phocas(ordered, f):
  middle = [v for v in ordered[f : len(ordered) - f] if math.isfinite(v)]
  center = statistics.fmean(middle) if middle else math.inf
  return _mean_around(center, ordered, f)


DEFINITIONS = {
  'median': _median,
  'trimmed_mean': _trimmed_mean,
  'meamed': _meamed,
  'phocas': _phocas,
}


@functools.cache
def _jitted(name, **kwargs):
  return jax.jit(functools.partial(getattr(aggregators, name), **kwargs))


def _compare(name, rows, f, tolerance=TOLERANCE):
  kwargs = {} if name == 'median' else {'num_byzantine': f}
  got = _jitted(name, **kwargs)(jnp.asarray(rows))
  want = _per_column(DEFINITIONS[name], rows, *kwargs.values())
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize('name', DEFINITIONS)
@pytest.mark.parametrize(
  'cohort_size, f', [(1, 0), (2, 0), (5, 2), (8, 2), (8, 0), (9, 4), (40, 12)]
)
@SETTINGS
@hypothesis.given(data=st.data())
def test_matches_its_definition(name, cohort_size, f, data):
  # Phocas' center is exact: n - 2f is a power of two.
  shape = (cohort_size, 64)
  flat = data.draw(st.lists(VALUES, min_size=3, max_size=20))
  seed = data.draw(st.integers(0, 999))
  rows = np.random.default_rng(seed).choice(flat, shape).astype(np.float32)
  _compare(name, rows, f)


@pytest.mark.parametrize('name', DEFINITIONS)
@SETTINGS
@hypothesis.given(
  rows=hnp.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=16))
)
def test_any_values_of_small_cohorts(name, rows):
  # Half-precision values: their medians and differences are exact.
  _compare(name, rows, 1 if name != 'phocas' else 2, tolerance=1e-4)


@pytest.mark.parametrize('name', DEFINITIONS)
@pytest.mark.parametrize('scale', [1e-8, 1.0, 1e8])
@pytest.mark.parametrize('cohort_size, f', [(11, 3), (33, 10), (100, 20)])
def test_random_rows_at_any_scale(name, scale, cohort_size, f):
  rng = np.random.default_rng(cohort_size)
  rows = (scale * rng.standard_normal((cohort_size, 200))).astype(np.float32)
  rows[1] *= -1e6
  rows[5] = np.nan
  _compare(name, rows, f, tolerance=TOLERANCE * scale)


@pytest.mark.parametrize('name', DEFINITIONS)
def test_single_and_double_precision_agree_on_bfloat16_rows(name):
  rows = np.random.default_rng(3).standard_normal((9, 50))
  narrow = jnp.asarray(rows, jnp.bfloat16)
  kwargs = {} if name == 'median' else {'num_byzantine': 2}
  got = _jitted(name, **kwargs)(narrow)
  want = _per_column(
    DEFINITIONS[name], np.asarray(narrow, np.float32), *kwargs.values()
  )
  # Rounded once, to 8 bits.
  np.testing.assert_allclose(
    got.astype(jnp.float32), want, rtol=2.0**-8, atol=1e-6
  )


@pytest.mark.parametrize('name', ['meamed', 'phocas'])
def test_ties_go_to_the_smaller_value(name):
  rows = jnp.array([[-1.0], [0.0], [1.0]])
  got = getattr(aggregators, name)(rows, num_byzantine=1)
  np.testing.assert_array_equal(got, [-0.5])


def test_meamed_and_phocas_keep_different_values():
  rows = jnp.array([[0.0], [1.0], [2.0], [8.0], [9.0]])
  # Medians 2; the trimmed mean of f = 1 is 11/3 and keeps 8 instead of 0.
  np.testing.assert_allclose(aggregators.meamed(rows, num_byzantine=1), [2.75])
  np.testing.assert_allclose(aggregators.phocas(rows, num_byzantine=2), [1.0])
  np.testing.assert_allclose(aggregators.phocas(rows, num_byzantine=1), [2.75])


@pytest.mark.parametrize('name', ['meamed', 'phocas'])
@pytest.mark.parametrize('size', [1e6, -1e6, 1e15, -1e15, 3e38, -3e38])
def test_no_digit_is_lost_to_an_outlier(name, size):
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((9, 30)).astype(np.float32)
  rows[[2, 6]] = size
  _compare(name, rows, 2)


def test_adding_and_taking_off_an_outlier_would_lose_the_digits():
  rows = np.float32([1.0, 2.0, 3.0, 4.0, -1e15])
  ordered = np.sort(rows)
  running = np.float32(ordered[:4].sum()) + (ordered[4] - ordered[0])
  got = aggregators.meamed(jnp.asarray(rows)[:, None], num_byzantine=1)
  np.testing.assert_allclose(got, [2.5])
  assert abs(running / 4 - 2.5) > 1.0


@pytest.mark.parametrize('name', ['meamed', 'phocas', 'trimmed_mean'])
def test_half_of_the_clients_is_too_many(name):
  with pytest.raises(ValueError, match=f'num_byzantine=2 .* = 5 .{name}'):
    getattr(aggregators, name)(jnp.ones((4, 1)), num_byzantine=2)


def _votes(column):
  finite = [v for v in column if math.isfinite(v)]
  return sum(v > 0 for v in finite) - sum(v < 0 for v in finite)


@SETTINGS
@hypothesis.given(
  rows=hnp.arrays(np.float32, (7, 6), elements=VALUES),
  threshold=st.integers(0, 7),
)
def test_signs_match_their_definitions(rows, threshold):
  votes = np.array([_votes(column) for column in rows.T])
  got = _jitted('sign_majority')(jnp.asarray(rows))
  np.testing.assert_array_equal(got, np.sign(votes))
  means = np.array([_finite_mean(column) for column in np.float64(rows.T)])
  want = np.where(np.abs(votes) >= threshold, means, -means)
  got = jax.jit(aggregators.robust_learning_rate)(
    jnp.asarray(rows), threshold=jnp.float32(threshold)
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_minority_of_any_size_cannot_turn_an_agreed_sign():
  rows = jnp.ones((7, 5)).at[:3].set(-1e30)
  np.testing.assert_array_equal(aggregators.sign_majority(rows), jnp.ones(5))


def test_what_few_clients_want_is_undone():
  rows = jnp.zeros((5, 2)).at[:, 0].set(1.0).at[0, 1].set(5.0)
  got = aggregators.robust_learning_rate(rows, threshold=3)
  np.testing.assert_array_equal(got, [1.0, -1.0])


@pytest.mark.parametrize('threshold', [-1, 6, 5.5])
def test_a_threshold_that_no_cohort_meets_is_refused(threshold):
  with pytest.raises(ValueError, match=r'threshold=.* must lie in \[0, 5\]'):
    aggregators.robust_learning_rate(jnp.ones((5, 1)), threshold=threshold)
