"""CAF against a slow definition, and the ways in which others fail."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators

# Up to C filters, each by an eigenvector: its rounding is that of float32
# over the gap between eigenvalues, here about a hundredth of the largest.
TOLERANCE = 1e-4
few = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


def _rows(seed, cohort_size, kind='normal', scale=1.0, bad=0):
  """Returns [C, 6] float32 rows of distinct spreads, the first ones spoiled."""
  rng = np.random.default_rng(seed)
  spread = np.array([3.0, 1.5, 0.8, 0.4, 0.2, 0.1])
  rows = spread * rng.standard_normal((cohort_size, 6)) + 0.4
  if kind == 'ties':
    rows = np.round(rows)
  if kind == 'equal':
    rows[2:] = rows[2]
  if kind == 'outliers':
    rows[3], rows[4] = -1e6, 1e3
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def slow_caf(rows, num_byzantine, *, over_all=False, most=1000):
  """Returns the delta and the filters it took; `over_all` is the defect."""
  rows = np.asarray(rows, np.float64)
  finite = np.isfinite(rows).all(axis=1)
  clean = np.where(finite[:, None], rows, 0.0)
  weights, least, count = finite.astype(float), np.inf, 0
  best = clean[finite].mean(axis=0)
  while weights.sum() > len(rows) - 2 * num_byzantine and count < most:
    count += 1
    middle = weights @ clean / weights.sum()
    change = clean - middle
    values, vectors = np.linalg.eigh((change.T * weights) @ change)
    if values[-1] / weights.sum() < least:
      best, least = middle, values[-1] / weights.sum()
    far = (change @ vectors[:, -1]) ** 2
    farthest = far.max() if over_all else far[weights > 0].max()
    if farthest == 0:
      break
    weights = np.maximum(weights * (1 - far / farthest), 0.0)
  return best, count


@functools.partial(jax.jit, static_argnames='num_byzantine')
def _caf(rows, num_byzantine):
  return aggregators.caf(rows, num_byzantine=num_byzantine)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  sizes=strategies.sampled_from([(9, 2), (9, 4), (7, 3)]),
  kind=strategies.sampled_from(['normal', 'ties', 'equal', 'outliers']),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
)
def test_matches_its_definition(seed, sizes, kind, scale, bad):
  cohort_size, num_byzantine = sizes
  rows = _rows(seed, cohort_size, kind, scale, bad)
  want, _ = slow_caf(rows, num_byzantine)
  np.testing.assert_allclose(
    _caf(rows, num_byzantine),
    want,
    rtol=0,
    atol=TOLERANCE * max(scale, np.abs(want).max()),
  )


@pytest.mark.parametrize('size', [1e6, 1e15])
def test_a_far_row_ends_the_filter_instead_of_stalling_it(size):
  rows = _rows(0, 9)
  rows[3] = size
  _, steps = slow_caf(rows, 2)
  _, stalled = slow_caf(rows, 2, over_all=True)
  assert steps <= 9
  assert stalled == 1000
  got = _caf(rows, 2)
  honest = np.delete(rows, 3, axis=0)
  assert (honest.min(axis=0) <= got).all()
  assert (got <= honest.max(axis=0)).all()


def test_rows_of_three_sizes_leave_float32_intact():
  rows = _rows(1, 11)
  rows[3], rows[7] = 1e15, 1e12
  aggregator = aggregators.build('caf', cohort_size=11, num_byzantine=2)
  output = jax.jit(aggregator.update)(rows, (), weights=None, key=None)
  assert np.flatnonzero(output.client_weights == 0).tolist() == [3, 7]


@pytest.mark.parametrize('kind', ['normal', 'equal', 'outliers'])
def test_without_byzantine_rows_it_is_the_mean(kind):
  rows = _rows(2, 9, kind)
  np.testing.assert_allclose(
    _caf(rows, 0), np.float64(rows).mean(axis=0), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize('scale', [0.0, 1e-20])
def test_equal_and_tiny_rows_end_too(scale):
  rows = np.float32(scale) * _rows(3, 9)
  got = np.asarray(_caf(rows, 4))
  assert np.isfinite(got).all()
  assert np.abs(got).max() <= np.abs(rows).max()


def test_two_calls_agree_bit_by_bit():
  rows = _rows(4, 9)
  np.testing.assert_array_equal(_caf(rows, 2), _caf(rows.copy(), 2))


def test_bound_is_checked():
  with pytest.raises(ValueError, match=r'2\*f\+1 = 9 \(caf\)'):
    aggregators.build('caf', cohort_size=8, num_byzantine=4)
