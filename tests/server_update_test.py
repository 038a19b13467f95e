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


def _kwargs(name, variant='paper'):
  """Returns the arguments of an adaptive one: only what it has."""
  kwargs = {'tau': TAU, 'variant': variant}
  if name != 'fedadagrad':
    return kwargs | {'b1': B1, 'b2': B2}
  return kwargs | ({'b1': B1} if variant == 'paper' else {})


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


def test_fedavgm_of_openfedllm_adds_a_running_mean():
  x, mean = np.ones(5), None
  for delta in _deltas():
    mean = delta if mean is None else 0.7 * mean + 0.3 * delta
    x = x + 0.5 * mean
  found = _apply('fedavgm', 0.5, momentum=0.7, variant='openfedllm')
  np.testing.assert_allclose(found, x, rtol=1e-6)


@pytest.mark.parametrize('name', _SECOND)
def test_adaptive_ones_follow_algorithm_2(name):
  x, m, v = np.ones(5), np.zeros(5), np.full(5, TAU**2)
  for delta in _deltas():
    m = B1 * m + (1 - B1) * delta
    v = _SECOND[name](v, delta)
    x = x + 0.1 * m / (np.sqrt(v) + TAU)
  found = _apply(name, 0.1, **_kwargs(name))
  np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize('name', _SECOND)
def test_adaptive_ones_as_in_flower(name):
  b1 = 0.0 if name == 'fedadagrad' else B1
  x, m, v = np.ones(5), np.zeros(5), np.zeros(5)
  for server_round, delta in enumerate(_deltas(), start=1):
    m = b1 * m + (1 - b1) * delta
    v = _SECOND[name](v, delta)
    rate = 0.1
    if name == 'fedadam':
      rate *= np.sqrt(1 - B2 ** (server_round + 1)) / (
        1 - B1 ** (server_round + 1)
      )
    x = x + rate * m / (np.sqrt(v) + TAU)
  found = _apply(name, 0.1, **_kwargs(name, 'flower'))
  np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize('name', _SECOND)
def test_adaptive_ones_as_in_openfedllm(name):
  b1 = 0.0 if name == 'fedadagrad' else B1
  x, m, v = np.ones(5), None, np.full(5, TAU**2)
  for delta in _deltas():
    m = delta if m is None else b1 * m + (1 - b1) * delta
    v = _SECOND[name](v, m)
    x = x + 0.1 * m / (np.sqrt(v) + TAU)
  found = _apply(name, 0.1, **_kwargs(name, 'openfedllm'))
  np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize('name', _SECOND)
def test_variants_differ(name):
  variants = ('paper', 'flower', 'openfedllm')
  found = [_apply(name, 0.1, **_kwargs(name, v)) for v in variants]
  for i in range(3):
    assert np.abs(found[i] - found[i - 1]).max() > 1e-3


@pytest.mark.parametrize(
  ('name', 'kwargs', 'words'),
  [
    ('fedavgg', {}, "did you mean 'fedavg"),
    ('fedavg', {'momentum': 0.9}, "'momentum' is no argument of"),
    ('fedadam', {'taus': 0.9}, "(did you mean 'tau'?)"),
    ('fedadagrad', {'b2': 0.9}, "'b2' is no argument of"),
    ('fedadam', {'learning_rate': 0.0}, 'must be greater than 0'),
    ('fedadam', {'b1': 1.0}, 'b1=1.0 must be at least 0 and below 1'),
    ('fedyogi', {'b2': -0.1}, 'b2=-0.1 must be at least 0 and below 1'),
    ('fedavgm', {'momentum': 1.5}, 'momentum=1.5 must be at least 0'),
    ('fedadam', {'tau': 0.0}, 'tau=0.0 must be greater than 0'),
    ('fedadam', {'variant': 'flowers'}, "did you mean 'flower'"),
    ('fedavgm', {'variant': 'flower'}, 'known: openfedllm, paper'),
    ('fedadagrad', {'variant': 'flower', 'b1': 0.9}, 'b1=0.9 must be 0'),
  ],
)
def test_mistakes_are_told(name, kwargs, words):
  with pytest.raises(ValueError) as error:
    server_update.build(name, **kwargs)
  assert words in str(error.value)
