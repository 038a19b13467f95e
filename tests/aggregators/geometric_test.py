"""Geometric median and centered clipping against slow definitions."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators

# 64 iterations, each a mean of a dozen float32 numbers of size 1; later ones
# forget the rounding of earlier ones.
TOLERANCE = 1e-5
few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
KEY = jax.random.key(0)


def _rows(seed, cohort_size, kind='normal', scale=1.0, bad=0):
  """Returns [C, 13] float32 rows, the first ones spoiled."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 13)) + 0.4
  if kind == 'ties':
    rows = np.round(rows)
  if kind == 'equal':
    rows[2:] = rows[2]
  if kind == 'outlier':
    rows[3] = -1e6
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def _first_point(rows, cohort_size, start):
  if start == 'zero':
    return np.zeros(rows.shape[1])
  if start == 'mean':
    return rows.mean(axis=0)
  dists = [[np.linalg.norm(x - y) for y in rows] for x in rows]
  best = int(np.argmin([sum(row) for row in dists]))
  nearest = np.argsort(dists[best], kind='stable')
  return rows[nearest[: cohort_size // 2 + 1]].mean(axis=0)


def slow_geometric_median(rows, num_iterations, start, smoothing):
  cohort_size = len(rows)
  rows = np.asarray(rows, np.float64)
  rows = rows[np.isfinite(rows).all(axis=1)]
  point = _first_point(rows, cohort_size, start)
  for _ in range(num_iterations):
    total, whole = np.zeros(rows.shape[1]), 0.0
    for row in rows:
      weight = 1.0 / max(smoothing, np.linalg.norm(row - point))
      total, whole = total + weight * row, whole + weight
    point = total / whole
  return point


@functools.partial(jax.jit, static_argnames=('num_iterations', 'start'))
def _geometric_median(rows, num_iterations=64, start='central', smoothing=1e-6):
  return aggregators.geometric_median(
    rows, num_iterations=num_iterations, start=start, smoothing=smoothing
  )


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  cohort_size=strategies.sampled_from([5, 8]),
  kind=strategies.sampled_from(['normal', 'ties', 'equal', 'outlier']),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
  smoothing=strategies.sampled_from([1e-6, 0.1, 30.0]),
)
def test_geometric_median_matches_its_definition(
  seed, cohort_size, kind, scale, bad, smoothing
):
  rows = _rows(seed, cohort_size, kind, scale, bad)
  want = slow_geometric_median(rows, 64, 'central', smoothing)
  # Where most of the rows count as near, it is a mean with the outlier in it.
  size = max(scale, np.abs(want).max())
  np.testing.assert_allclose(
    _geometric_median(rows, smoothing=smoothing),
    want,
    rtol=0,
    atol=TOLERANCE * size,
  )


@pytest.mark.parametrize('start', ['central', 'mean', 'zero'])
def test_three_iterations_match_the_definition_from_every_start(start):
  rows = _rows(1, 8)
  np.testing.assert_allclose(
    _geometric_median(rows, 3, start, 0.1),
    slow_geometric_median(rows, 3, start, 0.1),
    rtol=0,
    atol=TOLERANCE,
  )


def test_published_example():
  # The example in the documentation of ByzFL: 3 iterations from 0, 0.1.
  rows = jnp.arange(1.0, 10.0).reshape(3, 3)
  np.testing.assert_allclose(
    _geometric_median(rows, 3, 'zero', 0.1),
    [3.78788764, 4.78788764, 5.78788764],
    rtol=1e-6,
  )


def _pull(rows, point) -> float:
  """Returns the norm of the gradient of the sum of distances."""
  units = [(r - point) / np.linalg.norm(r - point) for r in np.float64(rows)]
  return float(np.linalg.norm(sum(units)))


def _compounding(rows, num_iterations):
  """The defect: the weights of an iteration are those of the last, scaled."""
  weights, point = np.ones(len(rows)), rows.mean(axis=0)
  for _ in range(num_iterations):
    weights = weights / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-6)
    weights /= weights.sum()
    point = weights @ rows
  return point


def test_weights_do_not_compound_over_iterations():
  rows = _rows(3, 8)
  assert _pull(rows, np.asarray(_geometric_median(rows))) < 1e-4
  assert _pull(rows, _compounding(rows, 4)) > 0.5


def test_equal_numbers_of_rows_do_not_collapse():
  # A program that kept weights in a set returned the first row, 0.
  np.testing.assert_allclose(
    aggregators.geometric_median(jnp.arange(5.0)[:, None]), [2.0], atol=1e-5
  )


def test_a_far_row_drags_the_mean_start_and_not_the_others():
  rows = _rows(4, 8, 'outlier')
  honest = rows[[0, 1, 2, 4, 5, 6, 7]]
  reach = {
    start: np.abs(np.asarray(_geometric_median(rows, 3, start))).max()
    for start in ('central', 'zero', 'mean')
  }
  assert max(reach['central'], reach['zero']) < np.abs(honest).max()
  assert reach['mean'] > 100 * np.abs(honest).max()


@pytest.mark.parametrize('offset', [0.0, 2.0**12])
def test_chain_equals_the_rule_on_the_rows_mixed(offset):
  rows = _rows(5, 8, 'outlier') + np.float32(offset)
  mixing = aggregators.nearest_neighbor_mixing(num_byzantine=3)
  rule = aggregators.geometric_median()
  mixed = aggregators.nearest_neighbor_mixing(rows, num_byzantine=3)
  np.testing.assert_allclose(
    aggregators.chain(mixing, rule)(rows),
    slow_geometric_median(mixed, 64, 'central', 1e-6),
    rtol=0,
    # Mixed rows carry the rounding of a mean of numbers of that size.
    atol=TOLERANCE * max(1.0, offset * 2.0**-5),
  )


def test_geometric_median_has_a_derivative():
  rows = jnp.asarray(_rows(6, 5))
  step = 1e-2
  bump = jnp.zeros_like(rows).at[1, 4].set(step)

  def total(x):
    return jnp.sum(aggregators.geometric_median(x))

  slope = (total(rows + bump) - total(rows - bump)) / (2 * step)
  # Central differences: rounding over the step, and the step squared.
  assert jax.grad(total)(rows)[1, 4] == pytest.approx(float(slope), abs=2e-3)


def slow_centered_clipping(rows, center, clip_norm, num_iterations):
  rows = np.asarray(rows, np.float64)
  rows = rows[np.isfinite(rows).all(axis=1)]
  for _ in range(num_iterations):
    step = np.zeros_like(center)
    for row in rows:
      norm = np.linalg.norm(row - center)
      factor = min(1.0, clip_norm / norm) if norm > 0 else 1.0
      step += factor * (row - center) / len(rows)
    center = center + step
  return center


def _clipping_update(cohort_size, num_iterations):
  def update(rows, state, clip_norm):
    aggregator = aggregators.build(
      'centered_clipping',
      cohort_size=cohort_size,
      clip_norm=clip_norm,
      num_iterations=num_iterations,
    )
    return aggregator.update(rows, state, weights=None, key=None)

  return jax.jit(update)


_three_steps = _clipping_update(8, 3)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  kind=strategies.sampled_from(['normal', 'ties', 'equal', 'outlier']),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
  clip_norm=strategies.sampled_from([0.5, 3.0, 1e3]),
)
def test_centered_clipping_matches_its_definition_over_rounds(
  seed, kind, scale, bad, clip_norm
):
  clip_norm *= scale
  state, center = jnp.zeros(13), np.zeros(13)
  for turn in range(3):
    rows = _rows(seed + turn, 8, kind, scale, bad)
    output = _three_steps(rows, state, clip_norm)
    state = output.state
    center = slow_centered_clipping(rows, center, clip_norm, 3)
    np.testing.assert_allclose(
      output.delta,
      center,
      rtol=0,
      atol=TOLERANCE * max(scale, np.abs(center).max()),
    )
    assert int(output.metrics['num_nonfinite']) == bad


def test_the_center_is_carried_from_round_to_round():
  rows = _rows(0, 8)
  first = _three_steps(rows, jnp.zeros(13), 0.5)
  second = _three_steps(rows, first.state, 0.5)
  np.testing.assert_allclose(
    second.delta,
    slow_centered_clipping(rows, np.zeros(13), 0.5, 6),
    rtol=0,
    atol=TOLERANCE,
  )
  # The defect: every round starts anew.
  assert np.abs(second.delta - first.delta).max() > 0.1


def test_rows_at_the_center_do_not_divide_by_zero():
  rows = np.ones((8, 13), np.float32)
  output = _three_steps(rows, jnp.ones(13), 0.5)
  np.testing.assert_array_equal(output.delta, rows[0])


def test_a_row_moves_the_center_by_the_clip_norm_over_c():
  rows = np.zeros((8, 13), np.float32)
  rows[5, 2] = 1e15
  output = _clipping_update(8, 1)(rows, jnp.zeros(13), 2.0)
  np.testing.assert_allclose(output.delta, 2.0 / 8 * np.eye(13)[2], atol=1e-6)


def test_without_a_usable_row_the_center_stays():
  rows = np.full((8, 13), np.nan, np.float32)
  output = _three_steps(rows, jnp.arange(13.0), 1.0)
  np.testing.assert_array_equal(output.delta, jnp.arange(13.0))
  assert not output.client_weights.any()


def test_the_center_is_float32_and_the_delta_is_not():
  rows = jnp.asarray(_rows(0, 8), jnp.bfloat16)
  output = _three_steps(rows, jnp.zeros(13), 3.0)
  assert output.delta.dtype == jnp.bfloat16
  assert output.state.dtype == jnp.float32
  wide = _three_steps(rows.astype(jnp.float32), jnp.zeros(13), 3.0)
  np.testing.assert_allclose(output.state, wide.state, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('geometric_median', {'smoothing': 0.0}, 'smoothing=0.0'),
    ('geometric_median', {'num_iterations': 0}, 'num_iterations=0'),
    ('geometric_median', {'start': 'men'}, "did you mean 'mean'"),
    ('centered_clipping', {}, "needs the argument 'clip_norm'"),
    ('centered_clipping', {'clip_norm': -1.0}, 'clip_norm=-1.0'),
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    aggregators.build(name, cohort_size=8, **kwargs)
