"""LASA against a slow definition written from its paper."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators

# Sums of a dozen float32 numbers of size 1.
TOLERANCE = 5e-6
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
KINDS = ('honest', 'flipped layer', 'huge', 'nonfinite', 'ties', 'zeros')


def make_layers(seed, kind='honest', cohort_size=9, scale=1.0):
  """Returns [C, 3, 8] float32 rows of three layers."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 3, 8)) + 0.4
  if kind == 'flipped layer':
    rows[:3, 1] = -2 - rng.random((3, 8))
  if kind == 'huge':
    rows[1] *= 1e4
  if kind == 'nonfinite':
    rows[[0, 4], 2, 3] = np.nan, np.inf
  if kind == 'ties':
    rows = np.round(2 * rows) / 2
  if kind == 'zeros':
    rows[0] = 0
    rows[1, 2] = 0
  return (scale * rows).astype(np.float32)


def _near(values, most, resolution):
  values = np.array(values)
  spread = max(values.std(), resolution)
  if not spread:
    return np.full(len(values), True)
  return np.abs(values - np.median(values)) / spread < most


def slow_lasa(rows, sparsity, most):
  """Returns [layers, ...]; `rows` are [C, layers, ...]."""
  rows = np.asarray(rows, np.float64)
  rows = rows[np.isfinite(rows).all(axis=(1, 2))]
  bound = np.median([np.linalg.norm(row) for row in rows])
  sparse = []
  for row in rows:
    count = max(int((1 - sparsity) * row.size), 1)
    least = np.sort(np.abs(row), axis=None)[-count]
    clipped = row * min(1.0, bound / (np.linalg.norm(row) or 1.0))
    sparse.append(np.where(np.abs(row) >= least, clipped, 0.0))
  layers = []
  for layer in np.stack(sparse, axis=1):
    norms = [np.linalg.norm(row) for row in layer]
    purity = []
    for row in layer:
      share = np.sign(row).sum() / max(np.count_nonzero(row), 1)
      purity.append(0.5 * (1 + (1 - sparsity) * share))
    kept = _near(norms, most, 1e-6 * np.median(norms))
    kept &= _near(purity, most, 1e-6)
    layers.append(layer[kept if kept.any() else slice(None)].mean(axis=0))
  return np.stack(layers)


@functools.cache
def _lasa(sparsity, stacked_layers=True):
  def rule(rows, most):
    return aggregators.lasa(
      rows,
      sparsity=sparsity,
      max_norm_score=most,
      max_sign_score=most,
      stacked_layers=stacked_layers,
    )

  return jax.jit(rule)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  kind=strategies.sampled_from(KINDS),
  cohort_size=strategies.sampled_from([8, 9]),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  most=strategies.sampled_from([0.3, 0.9, 1.7, 3.0]),
  sparsity=strategies.sampled_from([0.0, 0.3, 0.9]),
)
def test_matches_its_definition(seed, kind, cohort_size, scale, most, sparsity):
  rows = make_layers(seed, kind, cohort_size, scale)
  np.testing.assert_allclose(
    _lasa(sparsity)(rows, most),
    slow_lasa(rows, sparsity, most),
    rtol=0,
    atol=TOLERANCE * scale,
  )


def test_layers_may_be_leaves_or_an_axis():
  rows = make_layers(0, 'flipped layer')
  leaves = {f'layer {i}': rows[:, i] for i in range(3)}
  apart = _lasa(0.3, stacked_layers=False)(leaves, 1.0)
  together = _lasa(0.3)(rows, 1.0)
  for i in range(3):
    np.testing.assert_allclose(apart[f'layer {i}'], together[i], atol=1e-6)
  # One leaf that is not said to be stacked is one layer.
  whole = _lasa(0.3, stacked_layers=False)(rows, 1.0)
  assert np.abs(whole - together).max() > 100 * TOLERANCE


def test_a_client_is_dropped_from_the_layer_that_it_spoils():
  rng = np.random.default_rng(1)
  rows = (1 + 0.2 * rng.random((9, 3, 8))).astype(np.float32)
  rows[0, 1] = -rows[0, 1]
  got = _lasa(0.0)(rows, 2.0)
  clean = rows[1:, 1].mean(axis=0)
  assert np.abs(got[1] - clean).max() < 0.1
  assert np.abs(rows[:, 1].mean(axis=0) - clean).max() > 0.1


def test_shares_are_means_over_the_coordinates():
  rule = aggregators.build('lasa', cohort_size=9, stacked_layers=True)
  rows = make_layers(0, 'nonfinite')
  shares = rule.update(rows, (), weights=None, key=None).client_weights
  assert float(shares.sum()) == pytest.approx(1, abs=1e-6)
  assert not shares[jnp.array([0, 4])].any()
  # Of three layers of one size, shares are thirds of layers' shares.
  assert len(np.unique(np.round(shares, 5))) > 2


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'sparsity': 1.0}, 'sparsity=1.0'),
    ({'max_norm_score': 0.0}, 'max_norm_score=0.0'),
    ({'stacked_layers': True}, r'needs leaves \[C, layers'),
  ],
)
def test_what_cannot_work_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    aggregators.lasa(jnp.ones(5), **kwargs)
  with pytest.raises(ValueError, match='cohort_size=2'):
    aggregators.build('lasa', cohort_size=2)
