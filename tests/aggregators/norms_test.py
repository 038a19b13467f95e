"""CGE, MoNNA and the norm-bounded mean against slow definitions."""

import functools

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
    # Norms and distances are roots of small whole numbers, many of them equal.
    rows = np.round(rows)
  if kind == 'outlier':
    rows[3] = -1e6
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def _mean_of_lowest(rows, lengths, count):
  """Returns the mean of the finite rows of least length."""
  lengths = np.where(np.isfinite(rows).all(axis=1), lengths, np.inf)
  kept = np.argsort(lengths, kind='stable')[:count]
  return rows[[i for i in kept if np.isfinite(lengths[i])]].mean(axis=0)


def slow_cge(rows, num_byzantine):
  rows = np.asarray(rows, np.float64)
  lengths = np.array([np.sqrt(np.sum(row**2)) for row in rows])
  return _mean_of_lowest(rows, lengths, len(rows) - num_byzantine)


def slow_monna(rows, num_byzantine, trusted_row):
  rows = np.asarray(rows, np.float64)
  change = rows - rows[trusted_row]
  lengths = np.array([np.sqrt(np.sum(row**2)) for row in change])
  lengths[trusted_row] = -1.0
  return _mean_of_lowest(rows, lengths, len(rows) - num_byzantine)


def slow_norm_bounded_mean(rows, max_norm):
  rows = np.asarray(rows, np.float64)
  clipped = []
  for row in rows[np.isfinite(rows).all(axis=1)]:
    norm = np.sqrt(np.sum(row**2))
    clipped.append(row * min(1.0, max_norm / norm) if norm > 0 else row)
  return np.mean(clipped, axis=0)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _selected(name, rows, num_byzantine, trusted_row=None):
  kwargs = {} if trusted_row is None else {'trusted_row': trusted_row}
  rule = getattr(aggregators, name)
  return rule(rows, num_byzantine=num_byzantine, **kwargs)


@jax.jit
def _bounded(rows, max_norm):
  return aggregators.norm_bounded_mean(rows, max_norm=max_norm)


examples = hypothesis.given(
  seed=strategies.integers(0, 999),
  num_byzantine=strategies.sampled_from([0, 2, 3]),
  kind=strategies.sampled_from(['normal', 'ties', 'outlier']),
  scale=strategies.sampled_from([2.0**-26, 1.0, 2.0**26]),
  bad=strategies.integers(0, 2),
)


def _check(got, want, scale):
  size = max(scale, np.abs(want).max())
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * size)


@few
@examples
def test_cge_matches_its_definition(seed, num_byzantine, kind, scale, bad):
  # The center of the geometry is a whole number too: norms are exact.
  rows = _rows(seed, 7, kind, scale, bad)
  _check(
    _selected('cge', rows, num_byzantine), slow_cge(rows, num_byzantine), scale
  )


@few
@examples
def test_monna_matches_its_definition(seed, num_byzantine, kind, scale, bad):
  rows = _rows(seed, 7, kind, scale, bad)
  want = slow_monna(rows, num_byzantine, 4)
  _check(_selected('monna', rows, num_byzantine, 4), want, scale)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  kind=strategies.sampled_from(['normal', 'ties', 'outlier']),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
  max_norm=strategies.sampled_from([1e-3, 2.0, 1e5]),
)
def test_norm_bounded_mean_matches_its_definition(
  seed, kind, scale, bad, max_norm
):
  rows = _rows(seed, 7, kind, scale, bad)
  rows[5] = 0.0
  max_norm *= scale
  want = slow_norm_bounded_mean(rows, max_norm)
  _check(_bounded(rows, max_norm), want, min(scale, max_norm))


def test_norm_bounded_mean_takes_a_bound_that_is_traced():
  rows, bounds = _rows(0, 7), jnp.array([0.5, 2.0, 1e3])
  got = jax.jit(jax.vmap(_bounded, in_axes=(None, 0)))(rows, bounds)
  for bound, delta in zip(bounds, got, strict=True):
    _check(delta, slow_norm_bounded_mean(rows, float(bound)), 1.0)


def test_no_row_moves_the_norm_bounded_mean_far():
  rows = np.zeros((8, 6), np.float32)
  rows[2, 5] = 1e15
  np.testing.assert_allclose(_bounded(rows, 4.0), 0.5 * np.eye(6)[5], rtol=1e-6)


def test_monna_keeps_the_trusted_row_among_equals():
  # Equal rows 0 to 5 and a trusted row equal to them: two are left out.
  rows = jnp.ones((7, 3))
  aggregator = aggregators.build(
    'monna', cohort_size=7, num_byzantine=2, trusted_row=6
  )
  update = jax.jit(aggregator.update)
  output = update(rows, (), weights=None, key=None)
  np.testing.assert_allclose(
    output.client_weights, [0.2, 0.2, 0.2, 0.2, 0.0, 0.0, 0.2]
  )


def test_monna_trusts_nobody_without_its_trusted_row():
  rows = _rows(0, 7)
  rows[4, 2] = np.nan
  assert not _selected('monna', rows, 2, 4).any()
  assert _selected('monna', rows, 2, 3).all()


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('cge', {'num_byzantine': 4}, r'2\*f\+1 = 9 \(cge\)'),
    ('monna', {'num_byzantine': 4}, r'2\*f\+1 = 9 \(monna\)'),
    ('monna', {'num_byzantine': 1, 'trusted_row': 8}, r'must lie in \[0, 7\]'),
    ('norm_bounded_mean', {'max_norm': 0.0}, 'max_norm=0.0'),
    ('norm_bounded_mean', {}, "needs the argument 'max_norm'"),
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    aggregators.build(name, cohort_size=8, **kwargs)
