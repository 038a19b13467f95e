"""The attack that hides in the product of an adapter's factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import attacks

pytestmark = pytest.mark.usefixtures('quick_compiles')

COHORT, LAYERS, WIDTH, RANK = 6, 2, 7, 3
MASK = np.arange(COHORT) >= 4
# Cosines and norms of some ten float32 numbers each, through two products.
CLOSE = {'rtol': 1e-4, 'atol': 1e-5}


def _normal(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture(scope='module')
def case():
  """An adapter, deltas of a common direction, and what the attack makes."""
  rng = np.random.default_rng(0)
  shapes = {'a': (LAYERS, WIDTH, RANK), 'b': (LAYERS, RANK, WIDTH)}
  adapter = {'q': {k: _normal(rng, *shape) for k, shape in shapes.items()}}
  deltas = {
    'q': {
      k: 0.2 * (_normal(rng, *shape) + _normal(rng, COHORT, *shape))
      for k, shape in shapes.items()
    }
  }
  attack = jax.jit(attacks.build('gap'))
  attacked = attack(deltas, MASK, jax.random.key(0), adapter=adapter)
  return attack, adapter, deltas, attacked


def _norms(x):
  return np.sqrt(np.square(np.float64(x)).sum(axis=(-2, -1)))


def _cosines(x, y):
  dots = (np.float64(x) * np.float64(y)).sum(axis=(-2, -1))
  return dots / _norms(x) / _norms(y)


def _moved(adapter, deltas):
  """How the products of all clients moved, [C, layers, D, D]."""
  a, b = (np.float64(adapter['q'][k]) for k in 'ab')
  da, db = (np.float64(deltas['q'][k]) for k in 'ab')
  return (a + da) @ (b + db) - a @ b


def test_honest_rows_are_bit_identical(case):
  _, _, deltas, attacked = case
  for k in 'ab':
    np.testing.assert_array_equal(
      attacked['q'][k][~MASK], deltas['q'][k][~MASK]
    )


def test_every_factor_has_the_norm_and_cosine_of_honest_ones(case):
  _, _, deltas, attacked = case
  for k in 'ab':
    honest = np.asarray(deltas['q'][k])[~MASK]
    mean = honest.mean(axis=0)
    rows = np.asarray(attacked['q'][k])[MASK]
    want = np.broadcast_to(_norms(honest).mean(axis=0), (2, LAYERS))
    np.testing.assert_allclose(_norms(rows), want, **CLOSE)
    lowest = _cosines(honest, mean).min(axis=0)
    np.testing.assert_allclose(
      _cosines(rows, mean), np.broadcast_to(lowest, (2, LAYERS)), **CLOSE
    )


def test_the_product_leans_to_what_was_trained(case):
  _, adapter, deltas, attacked = case
  trained = _moved(adapter, deltas)[MASK]
  sent = _moved(adapter, attacked)[MASK]
  honest = _moved(adapter, deltas)[~MASK].mean(axis=0)
  across = trained - honest
  # More of the poison than any honest client has.
  own = _cosines(_moved(adapter, deltas)[~MASK][:, None] - honest, across)
  assert _cosines(sent - honest, across).min() > max(0.2, own.max())


def test_rows_that_are_not_finite_leave_the_others_alone(case):
  attack, adapter, deltas, attacked = case
  broken = jax.tree.map(lambda x: x.at[5].set(jnp.nan), deltas)
  found = attack(broken, MASK, jax.random.key(0), adapter=adapter)
  for k in 'ab':
    np.testing.assert_array_equal(found['q'][k][4], attacked['q'][k][4])
    mean = np.asarray(deltas['q'][k])[~MASK].mean(axis=0)
    np.testing.assert_allclose(
      _cosines(found['q'][k][5], mean), np.ones(LAYERS), **CLOSE
    )
  nobody = attack(deltas, np.zeros(COHORT, bool), None, adapter=adapter)
  jax.tree.map(np.testing.assert_array_equal, nobody, deltas)


def test_the_first_round_has_a_direction_too(case):
  """There b is 0, so that no change of a moves the product."""
  attack, adapter, deltas, _ = case
  fresh = {'q': adapter['q'] | {'b': jnp.zeros_like(adapter['q']['b'])}}
  rows = attack(deltas, MASK, jax.random.key(0), adapter=fresh)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(rows))
  moved = _moved(fresh, rows)[MASK], _moved(fresh, deltas)[MASK]
  assert _cosines(*moved).min() > 0.3


def test_other_parameters_are_refused():
  deltas = {'w': jnp.ones((COHORT, 3, 3))}
  attack = attacks.build('gap')
  with pytest.raises(ValueError, match='needs an adapter'):
    attack(deltas, MASK, None, adapter={'w': jnp.ones((3, 3))})
