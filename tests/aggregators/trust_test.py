"""FLTrust and Zeno against slow definitions written from their papers."""

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


def _rows(seed, cohort_size, scale=1.0, bad=0):
  """Returns [C, 13] float32 rows, the first ones spoiled, and a root."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 13)) + 0.4
  rows[-1] = rows[0]
  rows *= scale
  rows[:bad, 3] = np.nan
  root = scale * (rng.standard_normal(13) + 0.4)
  return rows.astype(np.float32), root.astype(np.float32)


def slow_fltrust(rows, root):
  total, whole = np.zeros(len(root)), 0.0
  for row in np.asarray(rows, np.float64):
    if not np.isfinite(row).all():
      continue
    cosine = row @ root / np.linalg.norm(row) / np.linalg.norm(root)
    trust = max(cosine, 0.0)
    total += trust * np.linalg.norm(root) / np.linalg.norm(row) * row
    whole += trust
  return total / whole if whole else total


def slow_zeno(rows, loss, num_byzantine, rho):
  rows = np.asarray(rows, np.float64)
  scores = []
  for row in rows:
    gain = loss(np.zeros_like(row)) - loss(row)
    bad = not np.isfinite(row).all()
    scores.append(-np.inf if bad else gain - rho * row @ row)
  order = np.argsort(-np.array(scores), kind='stable')
  kept = [i for i in order[: len(rows) - num_byzantine] if scores[i] > -np.inf]
  return rows[kept].mean(axis=0)


@jax.jit
def _fltrust(rows, root):
  return aggregators.fltrust(rows, root_delta=root)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 3),
)
def test_fltrust_matches_its_definition(seed, scale, bad):
  rows, root = _rows(seed, 8, scale, bad)
  np.testing.assert_allclose(
    _fltrust(rows, root),
    slow_fltrust(rows, root.astype(np.float64)),
    rtol=0,
    atol=TOLERANCE * scale,
  )


def test_fltrust_without_trust_is_zero_and_not_the_mean():
  rows, root = _rows(0, 8)
  rows = np.abs(rows)
  against = -np.abs(root)
  assert not _fltrust(rows, against).any()
  # The fallback of some programs: everybody alike when nobody is trusted.
  assert rows.mean(axis=0).any()
  for useless in (0 * root, np.full_like(root, np.nan), np.inf * root):
    assert not _fltrust(rows, useless).any()


@pytest.mark.parametrize('size', [1e6, 1e15])
def test_fltrust_never_exceeds_the_root_delta(size):
  rows, root = _rows(1, 8)
  rows[:7] = size * root
  got = np.linalg.norm(_fltrust(rows, root))
  assert got <= np.linalg.norm(root) * (1 + 1e-6)
  assert np.linalg.norm(rows.mean(axis=0)) > 1e5 * got


def test_fltrust_shares_are_of_the_trust():
  build = aggregators.build('fltrust', cohort_size=3)
  rows = jnp.array([[1e6, 0.0], [1.0, 1.0], [-1.0, 0.0]])
  output = build.update(
    rows, (), weights=None, key=None, root_delta=jnp.array([1.0, 0.0])
  )
  trust = np.array([1.0, np.sqrt(0.5), 0.0])
  np.testing.assert_allclose(
    output.client_weights, trust / trust.sum(), atol=1e-6
  )


@functools.cache
def _zeno(num_byzantine):
  def rule(rows, root, rho):
    return aggregators.zeno(
      rows,
      num_byzantine=num_byzantine,
      loss_fn=lambda delta: jnp.sum((delta - root) ** 2),
      rho=rho,
    )

  return jax.jit(rule)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  num_byzantine=strategies.sampled_from([0, 2, 7]),
  bad=strategies.integers(0, 3),
  rho=strategies.sampled_from([0.0, 5e-4, 0.7]),
)
def test_zeno_matches_its_definition(seed, scale, num_byzantine, bad, rho):
  rows, root = _rows(seed, 8, scale, bad)

  got = _zeno(num_byzantine)(rows, root, rho)

  def loss(delta):
    return ((delta - root) ** 2).sum()

  want = slow_zeno(rows, loss, num_byzantine, rho)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * scale)


def test_zeno_keeps_the_lowest_of_equal_rows():
  rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
  got = aggregators.zeno(rows, num_byzantine=2, loss_fn=lambda x: 0.0 * x[0])
  np.testing.assert_array_equal(got, rows[0])


def test_zeno_drops_rows_whose_loss_is_not_finite():
  rows = jnp.array([[1.0], [2.0], [3.0]])

  def loss(delta):
    return jnp.where(delta[0] == 2.0, jnp.nan, 0.0)

  got = aggregators.zeno(rows, num_byzantine=1, loss_fn=loss)
  np.testing.assert_array_equal(got, [2.0])  # the mean of 1 and 3


def test_what_the_round_must_give_is_named():
  rows = jnp.ones((4, 2))
  with pytest.raises(ValueError, match="fltrust needs 'root_delta'"):
    aggregators.fltrust(rows)
  with pytest.raises(ValueError, match="zeno needs 'loss_fn'"):
    aggregators.zeno(rows, num_byzantine=1)
  assert aggregators.inputs('fltrust') == {'root_delta'}
  assert aggregators.inputs('zeno') == {'loss_fn'}
