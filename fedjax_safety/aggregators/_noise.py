"""Noise on a delta, for rules that hide or blur what a client sent."""

import jax

from fedjax_safety import types


def add(
  delta: types.Adapter, deviation: jax.Array | float, key: types.PRNGKey
) -> types.Adapter:
  """Adds Gaussian noise of one standard deviation to every coordinate."""
  leaves, structure = jax.tree.flatten(delta)
  keys = jax.random.split(key, len(leaves))
  noisy = [
    (leaf + deviation * jax.random.normal(k, leaf.shape)).astype(leaf.dtype)
    for leaf, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(structure, noisy)
