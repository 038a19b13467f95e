"""Attacks that rewrite the deltas of malicious clients, ignoring the rest."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types

# What `non_finite` can write.
VALUES = {'nan': float('nan'), 'inf': float('inf')}


def none(
  deltas: types.Deltas, is_malicious: types.RowMask, key: types.PRNGKey
) -> types.Deltas:
  """Returns the deltas as they are."""
  del is_malicious, key
  return deltas


def sign_flip(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  scale: float = 1.0,
) -> types.Deltas:
  """Replaces each malicious delta by `-scale` times itself.

  Honest rows are bit-identical.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fedjax_safety import attacks
    >>> deltas = jnp.array([[1.0], [2.0]])
    >>> mask = jnp.array([False, True])
    >>> print(attacks.sign_flip(deltas, mask, jax.random.key(0))[:, 0])
    [ 1. -2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    scale: factor, at least 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Li, Xu, Chen, Giannakis, Ling. RSA: Byzantine-Robust Stochastic
  Aggregation Methods. AAAI 2019.
  """
  del key
  flipped = jax.tree.map(lambda x: -scale * x.astype(jnp.float32), deltas)
  return tree.where_rows(is_malicious, flipped, deltas)


def gaussian(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  mean: float = 0.0,
  std: float = 1.0,
) -> types.Deltas:
  """Replaces malicious deltas by independent normal noise.

  Honest rows are bit-identical; a row's noise does not depend on the number
  of rows.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: draws the noise.
    mean: of the noise, in the unit of the deltas.
    std: standard deviation of the noise, in the unit of the deltas.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with
  Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
  """
  leaves, structure = jax.tree.flatten(deltas)

  def draw(row_key):
    keys = jax.random.split(row_key, len(leaves))
    return [
      mean + std * jax.random.normal(leaf_key, leaf.shape[1:])
      for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]

  row_keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(
    jnp.arange(tree.cohort_size(deltas))
  )
  noise = jax.tree.unflatten(structure, jax.vmap(draw)(row_keys))
  return tree.where_rows(is_malicious, noise, deltas)


def non_finite(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  value: str = 'nan',
) -> types.Deltas:
  """Fills malicious rows with NaN or infinity, which many servers average.

  Honest rows are bit-identical.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    value: `nan` or `inf`.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `value` is neither.
  """
  del key
  _validate.one_of(VALUES, value=value)
  filled = jax.tree.map(lambda x: jnp.full_like(x, VALUES[value]), deltas)
  return tree.where_rows(is_malicious, filled, deltas)
