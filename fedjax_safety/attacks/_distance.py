"""Attacks that go as far as the distances among honest rows allow."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.attacks import _honest

# The directions of min-max and min-sum.
PERTURBATIONS = ('unit', 'sign', 'std')


def min_max(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  perturbation: str = 'std',
) -> types.Deltas:
  """Moves from the honest mean until as far from a row as two honest rows are.

  The row is `mean - gamma * p` with the largest gamma for which no honest row
  is farther from it than the two honest rows that are farthest apart. Gamma
  is the root of a quadratic, solved instead of searched for. Honest rows are
  bit-identical; honest rows that are not finite are ignored, and if all are,
  nothing changes.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fedjax_safety import attacks
    >>> deltas = jnp.array([[1.0], [3.0], [9.0]])
    >>> mask = jnp.array([False, False, True])
    >>> print(attacks.min_max(deltas, mask, jax.random.key(0))[:, 0])
    [1. 3. 1.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    perturbation: p: `unit`, along the mean; `sign`, the signs of the mean;
      `std`, the standard deviation of each coordinate.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `perturbation` is unknown.

  Reference: Shejwalkar, Houmansadr. Manipulating the Byzantine: Optimizing
  Model Poisoning Attacks and Defenses for Federated Learning. NDSS 2021.
  """
  del key

  def reach(squares, sq_dists, along, honest):
    room = jnp.max(sq_dists) - squares
    # Room is at least 0: the mean is no farther from a row than its farthest.
    root = tree.safe_sqrt(jnp.square(along) + jnp.maximum(room, 0.0))
    return jnp.min(jnp.where(honest.usable, along + root, jnp.inf))

  return _as_far_as(deltas, is_malicious, perturbation, reach)


def min_sum(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  perturbation: str = 'std',
) -> types.Deltas:
  """Moves from the honest mean as far as the sum of squared distances allows.

  As `min_max`, with the largest gamma for which the squared distances to all
  honest rows add up to no more than those of the honest row for which they
  add up to most: stealthier than `min_max`. Honest rows are bit-identical;
  honest rows that are not finite are ignored, and if all are, nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    perturbation: as in `min_max`.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `perturbation` is unknown.

  Reference: Shejwalkar, Houmansadr. Manipulating the Byzantine: Optimizing
  Model Poisoning Attacks and Defenses for Federated Learning. NDSS 2021.
  """
  del key

  def reach(squares, sq_dists, along, honest):
    del along  # Deviations from the mean add up to 0.
    room = jnp.max(jnp.sum(sq_dists, axis=1)) - jnp.sum(squares)
    return tree.safe_sqrt(
      jnp.maximum(room, 0.0) / jnp.maximum(honest.count, 1.0)
    )

  return _as_far_as(deltas, is_malicious, perturbation, reach)


def _as_far_as(deltas, is_malicious, perturbation, reach):
  """Writes the mean plus `reach` times the direction of norm 1.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    perturbation: one of PERTURBATIONS.
    reach: `(squares [C], sq_dists [C, C], along [C], honest) -> gamma` from
      the squared deviations of the honest rows from their mean, their squared
      distances, and their deviations along the direction; 0 in other rows.
  """
  _validate.one_of(PERTURBATIONS, perturbation=perturbation)
  honest = _honest.measure(deltas, is_malicious)
  direction = _direction(deltas, honest, perturbation)
  away = _honest.deviations(deltas, honest)
  products = tree.gram(away)
  squares = jnp.diagonal(products)
  sq_dists = squares[:, None] + squares[None, :] - 2 * products
  pairs = honest.usable[:, None] & honest.usable[None, :]
  sq_dists = jnp.where(pairs, jnp.maximum(sq_dists, 0.0), 0.0)
  gamma = reach(squares, sq_dists, tree.row_dots(away, direction), honest)
  row = jax.tree.map(lambda m, p: m + gamma * p, honest.mean, direction)
  return _honest.write(deltas, is_malicious, honest, row)


def _direction(deltas, honest, perturbation) -> types.Adapter:
  """Returns the direction away from the mean, of norm 1 or 0."""
  if perturbation == 'std':
    along = _honest.std(deltas, honest, 0)
  elif perturbation == 'sign':
    along = jax.tree.map(jnp.sign, honest.mean)
  else:
    along = honest.mean
  return jax.tree.map(jnp.negative, _honest.unit(along))
