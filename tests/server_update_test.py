"""Tests of the server's optimizers against a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import server_update

B1, B2, TAU = 0.8, 0.95, 1e-2
_SECOND = {
  'fedadagrad': lambda v, d: v + d**2,
  'fedyogi': lambda v, d: v - (1 - B2) * d**2 * np.sign(v - d**2),
  'fedadam': lambda v, d: B2 * v + (1 - B2) * d**2,
}


def _deltas():
  rng = np.random.default_rng(0)
  return [rng.normal(0, 0.1, 5).astype(np.float32) for _ in range(3)]


def _apply(name, learning_rate, **kwargs):
  """Returns the adapter after three deltas."""
  optimizer = server_update.build(name, learning_rate=learning_rate, **kwargs)
  adapter = {'w': jnp.ones(5)}
  state = optimizer.init(adapter)
  for delta in _deltas():
    adapter, state = jax.jit(server_update.apply, static_argnums=0)(
      optimizer, adapter, {'w': jnp.asarray(delta)}, state
    )
  return np.asarray(adapter['w'])


def test_fedavg_adds_the_delta():
  expected = 1 + 0.5 * np.sum(_deltas(), axis=0)
  np.testing.assert_allclose(_apply('fedavg', 0.5), expected, rtol=1e-6)


def test_fedavgm_adds_a_running_sum():
  x, velocity = np.ones(5), np.zeros(5)
  for delta in _deltas():
    velocity = 0.7 * velocity + delta
    x = x + 0.5 * velocity
  found = _apply('fedavgm', 0.5, momentum=0.7)
  np.testing.assert_allclose(found, x, rtol=1e-6)


@pytest.mark.parametrize('name', _SECOND)
def test_adaptive_ones_follow_algorithm_2(name):
  x, m, v = np.ones(5), np.zeros(5), np.full(5, TAU**2)
  for delta in _deltas():
    m = B1 * m + (1 - B1) * delta
    v = _SECOND[name](v, delta)
    x = x + 0.1 * m / (np.sqrt(v) + TAU)
  found = _apply(name, 0.1, b1=B1, b2=B2, tau=TAU)
  np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'words'),
  [
    ('fedavgg', {}, "did you mean 'fedavg"),
    ('fedavg', {'momentum': 0.9}, "does not take ['momentum']"),
    ('fedadam', {'learning_rate': 0.0}, 'must be greater than 0'),
  ],
)
def test_unknown_names_and_arguments_are_told(name, kwargs, words):
  with pytest.raises(ValueError) as error:
    server_update.build(name, **kwargs)
  assert words in str(error.value)
