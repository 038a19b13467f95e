"""Attacks that rewrite the deltas of malicious clients, ignoring the rest."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types

# What `non_finite` can write, and where.
VALUES = {'nan': float('nan'), 'inf': float('inf')}
COORDINATES = ('all', 'one')


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
  noise = jax.tree.map(
    lambda draw: mean + std * draw, draw_rows(key, deltas, jax.random.normal)
  )
  return tree.where_rows(is_malicious, noise, deltas)


def draw_rows(
  key: types.PRNGKey, deltas: types.Deltas, sampler
) -> types.Deltas:
  """Returns draws of the shape of the deltas, whatever the number of rows.

  Args:
    key: folded with each row's number and split over the leaves.
    deltas: stacked tree, leaves [C, ...].
    sampler: `(key, shape) -> draws`.
  """
  leaves, structure = jax.tree.flatten(deltas)

  def draw(row_key):
    keys = jax.random.split(row_key, len(leaves))
    return [
      sampler(leaf_key, leaf.shape[1:])
      for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]

  row_keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(
    jnp.arange(tree.cohort_size(deltas))
  )
  return jax.tree.unflatten(structure, jax.vmap(draw)(row_keys))


def scaling(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  factor: float | None = None,
) -> types.Deltas:
  """Multiplies each malicious delta: model replacement.

  With the default, what a plain mean of the cohort takes from the malicious
  rows is their own mean, undiluted, and a server step of 1 moves the model
  there (plus the honest share). Honest rows are bit-identical.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fedjax_safety import attacks
    >>> deltas = jnp.array([[1.0], [1.0], [2.0]])
    >>> mask = jnp.array([False, False, True])
    >>> print(attacks.scaling(deltas, mask, jax.random.key(0))[:, 0])
    [1. 1. 6.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    factor: greater than 0; None for the number of clients in the cohort for
      each malicious one. A server learning rate other than 1 divides it.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Bagdasaryan, Veit, Hua, Estrin, Shmatikov. How To Backdoor
  Federated Learning. AISTATS 2020.
  """
  del key
  if factor is None:
    malicious = jnp.sum(is_malicious, dtype=jnp.float32)
    factor = is_malicious.size / jnp.maximum(malicious, 1.0)
  scaled = jax.tree.map(lambda x: factor * x.astype(jnp.float32), deltas)
  return tree.where_rows(is_malicious, scaled, deltas)


def non_finite(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  coordinates: str = 'all',
  value: str = 'nan',
) -> types.Deltas:
  """Puts NaN or infinity into malicious rows, which many servers average.

  Honest rows are bit-identical.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    coordinates: `all`, or `one`: only the first coordinate of the first leaf.
    value: `nan` or `inf`.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `coordinates` or `value` is unknown.
  """
  del key
  _validate.one_of(COORDINATES, coordinates=coordinates)
  _validate.one_of(VALUES, value=value)
  filled = jax.tree.map(lambda x: jnp.full_like(x, VALUES[value]), deltas)
  if coordinates == 'one':
    (first, *_), (given, *others) = map(jax.tree.leaves, (filled, deltas))
    at_first = (slice(None), *(0,) * (given.ndim - 1))
    given = given.at[at_first].set(first[at_first])
    filled = jax.tree.unflatten(jax.tree.structure(deltas), [given, *others])
  return tree.where_rows(is_malicious, filled, deltas)
