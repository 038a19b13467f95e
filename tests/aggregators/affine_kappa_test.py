"""The error that rules prove, for every honest subset and under attack.

A rule is (f, κ)-robust if its squared distance from the mean of any C - f
rows is at most κ times their mean squared distance from it; the others may be
anything. Some bounds are in the largest eigenvalue of the covariance of those
rows instead of its trace, or in their diameter.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

_ATTACKS = ('alie', 'gaussian', 'ipm', 'min_max', 'min_sum', 'reversal')
# Float32 rounding of rows of size up to 1e4, relative to honest spreads of 1.
SLACK = 1e-3


@functools.cache
def _cohorts(cohort_size: int, num_byzantine: int) -> np.ndarray:
  """Returns [trials, C, 5] rows, the last ones under attacks of all sizes."""
  is_malicious = jnp.arange(cohort_size) >= cohort_size - num_byzantine
  rng = np.random.default_rng(cohort_size)
  cohorts = []
  for trial, name in enumerate(_ATTACKS):
    rows = rng.standard_normal((cohort_size, 5)) * rng.uniform(0.1, 2, 5)
    attack = jax.jit(attacks.build(name))
    attacked = attack(jnp.float32(rows), is_malicious, jax.random.key(trial))
    cohorts.append(np.asarray(attacked))
  # Byzantine rows that agree on a direction, near and far.
  for size in (0.5, 1.0, 2.0, 4.0, 20.0, 1e4):
    rows = rng.standard_normal((cohort_size, 5))
    rows[np.asarray(is_malicious)] = size * rng.standard_normal(5)
    cohorts.append(rows.astype(np.float32))
  return np.stack(cohorts)


def _ratio(rows: np.ndarray, delta: np.ndarray, size: int, spread) -> float:
  """Returns the largest squared error over the spread, of all subsets."""
  rows, worst = np.asarray(rows, np.float64), 0.0
  for kept in itertools.combinations(range(len(rows)), size):
    subset = rows[list(kept)]
    error = np.sum((delta - subset.mean(axis=0)) ** 2)
    worst = max(worst, error / spread(subset))
  return worst


def _variance(subset):
  return np.mean(np.sum((subset - subset.mean(axis=0)) ** 2, axis=1))


def _top_variance(subset):
  return np.linalg.eigvalsh(np.cov(subset.T, ddof=0))[-1]


def _sq_diameter(subset):
  change = subset[:, None] - subset[None]
  return np.sum(change**2, axis=2).max()


def _to_trusted(subset):
  # Row 0 is the trusted one; without it the bound says nothing.
  return np.mean(np.sum((subset - subset[0]) ** 2, axis=1))


def _caf_bound(n, f):
  """A bound in the top eigenvalue, for f so small that the argument holds.

  When honest rows first lose more weight than Byzantine ones, the weighted
  top eigenvalue is at most t² times the honest one; the mean returned has one
  no larger, and at least n - 3f of its weight is honest.
  """
  r = f / (n - 2 * f)
  a = (n - 2 * f) / (n - f) / 2 - r
  t = (r + np.sqrt(r * r + a * (1 + r))) / a
  return (t + np.sqrt(2)) ** 2 * f / (n - 3 * f)


_BOUNDS = {
  'geometric_median': (
    _variance,
    lambda n, f: 4 * ((n - f) / (n - 2 * f)) ** 2,
  ),
  'mda': (_sq_diameter, lambda n, f: (2 * f / (n - f)) ** 2),
  'smea': (
    _top_variance,
    lambda n, f: 4 * f / (n - f) * ((n - f) / (n - 2 * f)) ** 2,
  ),
  'caf': (_top_variance, _caf_bound),
  'trimmed_mean after adaptive_clipping': (
    _variance,
    lambda n, f: 3 * 6 * f / (n - 2 * f) * ((n - f) / (n - 2 * f)),
  ),
  'geometric_median after nearest_neighbor_mixing': (
    _variance,
    lambda n, f: 8 * f / (n - f) * (4 * ((n - f) / (n - 2 * f)) ** 2 + 1),
  ),
}


def _deltas(rule: str, cohort_size: int, num_byzantine: int) -> np.ndarray:
  """Returns [trials, 5], what a rule makes of all cohorts."""
  name, _, before = rule.partition(' after ')
  inputs = {'num_byzantine': num_byzantine}
  aggregator = aggregators.build(
    name,
    cohort_size=cohort_size,
    preaggregators=[{'name': before} | inputs] if before else [],
    **({} if name in ('geometric_median', 'mean') else inputs),
  )

  def delta(rows):
    return aggregator.update(rows, (), weights=None, key=None).delta

  cohorts = _cohorts(cohort_size, num_byzantine)
  return np.asarray(jax.jit(jax.vmap(delta))(cohorts), np.float64)


@pytest.mark.parametrize(
  ('rule', 'cohort_size', 'num_byzantine'),
  [(rule, 9, 1) for rule in _BOUNDS]
  # The argument for the bound of CAF needs f / n to be small.
  + [(rule, 7, 3) for rule in _BOUNDS if rule != 'caf'],
)
def test_error_is_within_the_bound(rule, cohort_size, num_byzantine):
  spread, bound = _BOUNDS[rule]
  kappa = bound(cohort_size, num_byzantine)
  deltas = _deltas(rule, cohort_size, num_byzantine)
  cohorts = _cohorts(cohort_size, num_byzantine)
  size = cohort_size - num_byzantine
  for rows, delta in zip(cohorts, deltas, strict=True):
    assert _ratio(rows, delta, size, spread) <= kappa * (1 + SLACK)


@pytest.mark.parametrize('rule', _BOUNDS)
def test_the_mean_is_not_within_the_bound(rule):
  spread, bound = _BOUNDS[rule]
  cohorts, deltas = _cohorts(9, 1), _deltas('mean', 9, 1)
  worst = max(
    _ratio(rows, delta, 8, spread)
    for rows, delta in zip(cohorts, deltas, strict=True)
  )
  assert worst > bound(9, 1)


@pytest.mark.parametrize(('cohort_size', 'num_byzantine'), [(9, 2), (7, 3)])
def test_monna_is_within_its_bound_while_its_row_is_honest(
  cohort_size, num_byzantine
):
  deltas = _deltas('monna', cohort_size, num_byzantine)
  kappa = 4 * num_byzantine / (cohort_size - num_byzantine)
  size = cohort_size - num_byzantine
  cohorts = np.asarray(_cohorts(cohort_size, num_byzantine), np.float64)
  for rows, delta in zip(cohorts, deltas, strict=True):
    for others in itertools.combinations(range(1, cohort_size), size - 1):
      subset = rows[[0, *others]]
      error = np.sum((delta - subset.mean(axis=0)) ** 2)
      assert error <= kappa * _to_trusted(subset) * (1 + SLACK)
