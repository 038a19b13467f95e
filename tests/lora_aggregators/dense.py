"""Adapters at random, and their products written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np

# Of clients, layers, kernel and factors.
C, LAYERS, D_IN, D_OUT, R = 5, 2, 7, 6, 3


def factors(seed, *leading, d_in=D_IN, rank=R):
  """Returns a random tree of two pairs, leaves [*leading, LAYERS, ...]."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=(*leading, LAYERS, *shape)), 'float32')

  return {
    'q_proj': {'a': draw(d_in, rank), 'b': draw(rank, D_OUT)},
    'mlp': {'up_proj': {'a': draw(4, rank), 'b': draw(rank, 5)}},
  }


def products(adapter):
  """Returns the list of products `a @ b` in float64."""
  wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapter)
  pairs = (wide['q_proj'], wide['mlp']['up_proj'])
  return [pair['a'] @ pair['b'] for pair in pairs]


def mean(adapters, weights):
  """Returns the weighted mean of the clients' products."""
  shares = np.asarray(weights, np.float64) / np.sum(weights)
  return [np.tensordot(shares, p, 1) for p in products(adapters)]


def best(product, rank):
  """Returns the nearest matrices of a rank."""
  u, values, v = np.linalg.svd(product, full_matrices=False)
  return (u[..., :rank] * values[..., None, :rank]) @ v[..., :rank, :]


def changes(server, deltas):
  """Returns [C, P] changes of the products, float64, pairs in a row."""
  wide = jax.tree.map(
    lambda own, rows: np.asarray(own, np.float64) + np.float64(rows),
    server,
    deltas,
  )
  moved = [
    new - old for new, old in zip(products(wide), products(server), strict=True)
  ]
  return np.concatenate([m.reshape(len(m), -1) for m in moved], axis=1)


def regauge(server, deltas, seed=9):
  """Returns the deltas of other factors with the same products.

  Every client's factors are turned by its own invertible matrix.
  """
  rng = np.random.default_rng(seed)
  adapters = jax.tree.map(
    lambda own, rows: np.float64(own) + np.float64(rows), server, deltas
  )

  def turn(pair):
    rank = pair['a'].shape[-1]
    orthogonal = np.linalg.qr(rng.normal(size=(C, 1, rank, rank)))[0]
    q = orthogonal * rng.uniform(0.5, 2.0, (C, 1, 1, rank))
    return {'a': pair['a'] @ q, 'b': np.linalg.inv(q) @ pair['b']}

  turned = {
    'q_proj': turn(adapters['q_proj']),
    'mlp': {'up_proj': turn(adapters['mlp']['up_proj'])},
  }
  return jax.tree.map(
    lambda new, own: jnp.asarray(new - np.float64(own), 'float32'),
    turned,
    server,
  )


def assert_close(found, expected, tolerance=1e-5):
  """Asserts that lists of arrays differ by little of their largest entry."""
  for one, other in zip(found, expected, strict=True):
    limit = tolerance * np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=limit)
