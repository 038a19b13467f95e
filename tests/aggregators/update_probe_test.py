"""The linear probe on deltas: its fit, and whom it drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators
from fedjax_safety.aggregators import _classifier

SAFE, UNSAFE = np.eye(6)[0], np.eye(6)[1]


def _made(rng, direction, count, noise=0.3):
  return direction + rng.normal(0, noise, (count, 6))


@functools.cache
def _inputs(num_malicious):
  rng = np.random.default_rng(0)
  references = np.concatenate([_made(rng, SAFE, 6), _made(rng, UNSAFE, 3)])
  rows = np.concatenate(
    [
      _made(rng, SAFE, 10 - num_malicious),
      _made(rng, UNSAFE, num_malicious),
    ]
  )
  is_unsafe = jnp.arange(9) >= 6
  return jnp.asarray(rows), (jnp.asarray(references), is_unsafe)


def _update(rows, made, **kwargs):
  rule = aggregators.build('update_probe', cohort_size=len(rows), **kwargs)
  return rule.update(rows, (), weights=None, key=None, references=lambda: made)


@pytest.mark.parametrize('num_malicious', [0, 1, 5, 9])
def test_unsafe_rows_have_no_part_whatever_their_number(num_malicious):
  rows, made = _inputs(num_malicious)
  found = _update(rows, made)
  assert not found.client_weights[10 - num_malicious :].any()
  assert (found.client_weights[: 10 - num_malicious] > 0).all()
  p = found.metrics['probe_unsafe_by_row']
  want = jnp.where(p < 0.5, 1 - p, 0)
  np.testing.assert_allclose(found.client_weights, want / want.sum(), rtol=1e-5)


def test_length_says_nothing_of_who_a_row_is():
  rows, made = _inputs(3)
  lengths = jnp.asarray(np.logspace(-3, 30, 10))[:, None]
  np.testing.assert_allclose(
    _update(rows * lengths, made).client_weights,
    _update(rows, made).client_weights,
    atol=1e-5,
  )


def test_no_row_counts_for_more_than_the_longest_safe_reference():
  rows, (references, is_unsafe) = _inputs(3)
  references = jnp.where(is_unsafe[:, None], 100.0, 1.0) * references
  longest = np.linalg.norm(references[~is_unsafe], axis=1).max()
  lengths = jnp.asarray(np.logspace(-3, 30, 10))[:, None]
  found = _update(rows * lengths, (references, is_unsafe))
  sent = np.asarray(rows * lengths, np.float64)
  norms = np.linalg.norm(sent, axis=1, keepdims=True)
  want = found.client_weights @ (sent * np.minimum(1, longest / norms))
  np.testing.assert_allclose(found.delta, want, rtol=1e-5)
  assert np.linalg.norm(found.delta) <= longest


def test_if_no_row_is_left_nothing_moves():
  _, (references, is_unsafe) = _inputs(0)
  rows = references[is_unsafe]
  found = _update(rows, (references, is_unsafe))
  assert not found.delta.any() and not found.client_weights.any()
  found = _update(rows.at[0].set(jnp.nan), (references, is_unsafe))
  assert int(found.metrics['num_nonfinite']) == 1 and not found.delta.any()


def test_the_fit_is_the_classifier_of_all_entries():
  """Against gradient descent on the classifier itself, in float64."""
  rows, (references, is_unsafe) = _inputs(3)
  ridge = 0.1

  def features(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  center = features(references).mean(axis=0)
  x, y = features(references) - center, np.asarray(is_unsafe, np.float64)
  weight = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
  w, intercept = np.zeros(6), 0.0
  for _ in range(20000):
    gap = weight * (1 / (1 + np.exp(-(x @ w + intercept))) - y)
    w -= 0.05 * (x.T @ gap + ridge * w)
    intercept -= 0.05 * gap.sum()
  want = (features(rows) - center) @ w + intercept
  ours, theirs = _classifier._centered_products(references, rows)
  got = jax.jit(_classifier._fit)(ours, theirs, is_unsafe, ridge)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
