"""Bulyan against a slow definition, and against those that went wrong."""

import functools

import hypothesis
import jax
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
  if kind == 'outlier':
    rows[3] = -1e6
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def _krum_order(rows, num_byzantine):
  """Returns the rows that Krum selects, each of those that are left."""
  left, selected = list(range(len(rows))), []
  finite = np.isfinite(rows).all(axis=1)
  while len(selected) < len(rows) - 2 * num_byzantine:
    neighbors = max(1, len(left) - num_byzantine - 2)
    scores = []
    for i in left:
      others = [
        np.sum((rows[i] - rows[j]) ** 2) if finite[i] and finite[j] else np.inf
        for j in left
        if j != i
      ]
      # A row that is not finite is never selected, even as the last one left.
      score = sum(sorted(others)[:neighbors])
      scores.append(score if finite[i] else np.inf)
    selected.append(left.pop(int(np.argmin(scores))))
  return selected


def _near_median(rows, count):
  """Returns per coordinate the mean of the values nearest to the median."""
  columns = []
  for column in rows.T:
    far = np.abs(column - np.median(column))
    columns.append(column[np.argsort(far, kind='stable')[:count]].mean())
  return np.array(columns)


def slow_bulyan(rows, num_byzantine):
  rows = np.asarray(rows, np.float64)
  # The lowest of equal distances is kept: rows in their own order.
  selected = rows[sorted(_krum_order(rows, num_byzantine))]
  return _near_median(selected, len(rows) - 4 * num_byzantine)


@functools.partial(jax.jit, static_argnames='num_byzantine')
def _bulyan(rows, num_byzantine):
  aggregator = aggregators.build(
    'bulyan', cohort_size=len(rows), num_byzantine=num_byzantine
  )
  output = aggregator.update(rows, (), weights=None, key=None)
  return output.delta, output.client_weights


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  sizes=strategies.sampled_from([(7, 1), (11, 2), (13, 2)]),
  kind=strategies.sampled_from(['normal', 'ties', 'outlier']),
  scale=strategies.sampled_from([2.0**-26, 1.0, 2.0**26]),
  bad=strategies.integers(0, 2),
)
def test_matches_its_definition(seed, sizes, kind, scale, bad):
  cohort_size, num_byzantine = sizes
  rows = _rows(seed, cohort_size, kind, scale, min(bad, num_byzantine))
  got, _ = _bulyan(rows, num_byzantine)
  np.testing.assert_allclose(
    got, slow_bulyan(rows, num_byzantine), rtol=0, atol=TOLERANCE * scale
  )


@pytest.mark.parametrize('size', [1e3, -1e6, 1e15])
def test_two_outliers_of_eleven_are_bounded(size):
  rows = _rows(0, 11)
  rows[[1, 6]] = size
  got, _ = _bulyan(rows, 2)
  honest = np.delete(rows, [1, 6], axis=0)
  assert (honest.min(axis=0) <= got).all()
  assert (got <= honest.max(axis=0)).all()


@pytest.mark.parametrize('seed', range(5))
def test_no_value_leaves_the_honest_range_by_more_than_its_width(seed):
  rng = np.random.default_rng(seed)
  rows = _rows(seed, 11)
  for row in (1, 6):
    rows[row] += 3.0 * rng.standard_normal(6)
  got, _ = _bulyan(rows, 2)
  honest = np.delete(rows, [1, 6], axis=0)
  low, high = honest.min(axis=0), honest.max(axis=0)
  assert (low - (high - low) <= got).all()
  assert (got <= high + (high - low)).all()


def test_every_row_is_selected_at_most_once():
  # A program that mixed up places before and after a removal selected rows
  # [2, 3, 1, 1, 1, 1, 1] of such a cohort.
  _, shares = _bulyan(_rows(0, 11), 2)
  assert np.count_nonzero(shares) == 7
  np.testing.assert_allclose(shares[shares > 0], 1 / 7, rtol=1e-6)


def _one_shot(rows, num_byzantine):
  """The defect: one round of Krum's scores selects all rows."""
  rows = np.asarray(rows, np.float64)
  squares = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
  nearest = np.sort(squares, axis=1)[:, 1 : len(rows) - num_byzantine - 1]
  order = np.argsort(nearest.sum(axis=1), kind='stable')
  kept = rows[sorted(order[: len(rows) - 2 * num_byzantine])]
  return _near_median(kept, len(rows) - 4 * num_byzantine)


def _without_second_step(rows, num_byzantine):
  """The defect: all values of the selected rows are averaged."""
  rows = np.asarray(rows, np.float64)
  return rows[_krum_order(rows, num_byzantine)].mean(axis=0)


@pytest.mark.parametrize('defect', [_one_shot, _without_second_step])
def test_the_steps_that_some_programs_leave_out_are_there(defect):
  # Some cohort tells them apart, and there the definition is followed.
  found = 0
  for seed in range(6):
    rows = _rows(seed, 11)
    got, _ = _bulyan(rows, 2)
    np.testing.assert_allclose(got, slow_bulyan(rows, 2), atol=TOLERANCE)
    found += bool(np.abs(defect(rows, 2) - got).max() > 1e-2)
  assert found > 0


def test_the_rows_of_the_caller_stay():
  rows = _rows(0, 11)
  before = rows.copy()
  _bulyan(rows, 2)
  np.testing.assert_array_equal(rows, before)


def test_without_byzantine_rows_it_is_the_mean():
  rows = _rows(0, 11)
  got, _ = _bulyan(rows, 0)
  np.testing.assert_allclose(got, rows.mean(axis=0), atol=TOLERANCE)


def test_bound_is_checked():
  with pytest.raises(ValueError, match=r'4\*f\+3 = 11 \(bulyan\)'):
    aggregators.build('bulyan', cohort_size=10, num_byzantine=2)
