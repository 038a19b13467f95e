"""MDA and SMEA against enumeration in float64."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators

# A mean of a few float32 numbers of size 1.
TOLERANCE = 5e-6
few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)


def _rows(seed, cohort_size, kind='normal', scale=1.0, bad=0):
  """Returns [C, 6] float32 rows, the first ones spoiled."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 6)) + 0.4
  if kind == 'ties':
    rows = np.round(rows)
  if kind == 'equal':
    rows[2:] = rows[2]
  if kind == 'outlier':
    rows[3] = -1e6
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def _slow(rows, num_byzantine, cost):
  """Returns the mean of the first subset that costs least."""
  rows = np.asarray(rows, np.float64)
  best, least = None, np.inf
  for kept in itertools.combinations(
    range(len(rows)), len(rows) - num_byzantine
  ):
    subset = rows[list(kept)]
    if np.isfinite(subset).all() and cost(subset) < least:
      best, least = subset.mean(axis=0), cost(subset)
  return best


def _diameter(subset):
  pairs = itertools.combinations(subset, 2)
  return max((np.linalg.norm(x - y) for x, y in pairs), default=0.0)


def _top_variance(subset):
  return np.linalg.eigvalsh(np.cov(subset.T, ddof=0))[-1]


_COSTS = {'mda': _diameter, 'smea': _top_variance}


@functools.partial(jax.jit, static_argnames=('name', 'num_byzantine'))
def _rule(rows, name, num_byzantine):
  return getattr(aggregators, name)(rows, num_byzantine=num_byzantine)


@pytest.mark.parametrize('name', _COSTS)
@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  sizes=strategies.sampled_from([(5, 2), (7, 2), (7, 3), (6, 0)]),
  kind=strategies.sampled_from(['normal', 'equal', 'outlier']),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
)
def test_matches_enumeration(name, seed, sizes, kind, scale, bad):
  cohort_size, num_byzantine = sizes
  rows = _rows(seed, cohort_size, kind, scale, min(bad, num_byzantine))
  want = _slow(rows, num_byzantine, _COSTS[name])
  np.testing.assert_allclose(
    _rule(rows, name, num_byzantine),
    want,
    rtol=0,
    atol=TOLERANCE * max(scale, np.abs(want).max()),
  )


@few
@hypothesis.given(seed=strategies.integers(0, 999))
def test_mda_breaks_ties_in_the_order_of_the_rows(seed):
  # Small whole numbers: distances are exact, and many are equal.
  rows = np.random.default_rng(seed).integers(-2, 3, (7, 2)).astype(np.float32)
  np.testing.assert_allclose(
    _rule(rows, 'mda', 2), _slow(rows, 2, _diameter), rtol=0, atol=TOLERANCE
  )


def test_mda_takes_the_first_of_equal_sets_and_not_the_last():
  rows = jnp.array([[0.0], [1.0], [2.0]])
  np.testing.assert_array_equal(aggregators.mda(rows, num_byzantine=1), [0.5])


@pytest.mark.parametrize('name', _COSTS)
def test_more_bad_rows_than_assumed_leave_the_mean_of_the_others(name):
  rows = _rows(0, 7)
  rows[[1, 3, 5]] = np.nan
  np.testing.assert_allclose(
    _rule(rows, name, 2), rows[[0, 2, 4, 6]].mean(axis=0), atol=TOLERANCE
  )


def _one_power_step(subset, rng):
  """The defect: the top eigenvalue after one step from a random vector."""
  covariance = np.cov(subset.T, ddof=0)
  vector = covariance @ rng.standard_normal(len(covariance))
  vector /= np.linalg.norm(vector)
  return vector @ covariance @ vector


def test_smea_is_exact_where_one_power_step_is_a_lottery():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((7, 40)).astype(np.float32)
  lottery = {
    tuple(_slow(rows, 2, lambda x: _one_power_step(x, rng)).round(6))
    for _ in range(5)
  }
  assert len(lottery) > 1
  want = _slow(rows, 2, _top_variance)
  np.testing.assert_allclose(_rule(rows, 'smea', 2), want, atol=TOLERANCE)


@pytest.mark.parametrize('scale', [0.0, 1e-20])
def test_smea_bears_equal_and_tiny_rows(scale):
  # These raise, or give nothing, where eigenvalues are not scaled.
  rows = scale * _rows(0, 7)
  got = _rule(rows, 'smea', 2)
  assert np.isfinite(got).all()
  assert np.abs(got).max() <= np.abs(rows).max()


def test_too_many_sets_are_refused_before_any_work():
  with pytest.raises(ValueError, match=r'leaves 161700 sets .*\(smea\)'):
    aggregators.build('smea', cohort_size=100, num_byzantine=3)
  with pytest.raises(ValueError, match=r'leaves 3921225 sets .*\(mda\)'):
    aggregators.build('mda', cohort_size=100, num_byzantine=4)
  with pytest.raises(ValueError, match=r'2\*f\+1 = 9'):
    aggregators.build('mda', cohort_size=8, num_byzantine=4)
