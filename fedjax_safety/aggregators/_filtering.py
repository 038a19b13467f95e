"""A rule that weighs rows down along the direction of largest spread: CAF."""

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety.aggregators import _base, _geometry, _rule


@_rule.affine(
  check=_rule.at_least('caf', 2, 1),
  paper='Allouah, Guerraoui, Stephan, ICML 2025',
  guarantee='(f, κ) in the top eigenvalue, κ = O(f/n)',
  needs='n ≥ 2f + 1',
)
def caf(geometry: _geometry.Geometry, *, num_byzantine: int) -> jax.Array:
  """Returns the weighted mean that spreads least, of those a filter passes.

  All rows start with weight 1. While more than C - 2 f of it is left, rows
  lose weight in proportion to their squared distance from the weighted mean
  along the direction of largest weighted spread; the farthest that has any
  weight loses all of it, so that there are at most C iterations. Of the
  means on the way, the one whose largest spread is least is returned.
  Directions are exact eigenvectors: the result is the same every time.

  With `num_byzantine` 0 it is the mean. A row with a NaN or an infinity has
  weight 0 from the start. It has no derivative in reverse mode.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [3.0], [1e6], [2.0], [2.0]])
    >>> print(aggregators.caf(deltas, num_byzantine=1).round(3))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 2 f + 1.

  Reference: Allouah, Guerraoui, Stephan. Towards Trustworthy Federated
  Learning with Untrusted Participants. ICML 2025.
  """
  enough = geometry.finite.size - 2 * num_byzantine

  def is_unfinished(state):
    weights, _, _ = state
    return jnp.sum(weights) > enough

  def filter_rows(state):
    weights, best, least = state
    shares = _base.normalized(weights)
    spread, sq_distances = _top_spread(geometry, shares)
    best = jnp.where(spread < least, shares, best)
    # Only rows that still have weight: a far row without any would keep the
    # others from losing theirs.
    sq_distances = jnp.where(weights > 0, sq_distances, 0.0)
    farthest = jnp.max(sq_distances)
    left = 1.0 - sq_distances / jnp.where(farthest > 0, farthest, 1.0)
    # Written as 0: a compiler may round x / x to something else than 1. Rows
    # without any spread need no further filter and all count as farthest.
    left = jnp.where(sq_distances >= farthest, 0.0, jnp.maximum(left, 0.0))
    weights = weights * left
    return weights, best, jnp.minimum(spread, least)

  weights = geometry.finite.astype(jnp.float32)
  first = (weights, _base.normalized(weights), jnp.inf)
  return lax.while_loop(is_unfinished, filter_rows, first)[1]


def _top_spread(
  geometry: _geometry.Geometry, shares: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the top eigenvalue of the weighted covariance, and a direction's.

  The second result [C] is proportional to the rows' squared distances from
  the weighted mean along the top eigenvector; of rows with a share only.
  """
  used = shares > 0
  vectors = geometry.coordinates - geometry.coordinates[jnp.argmax(used)]
  vectors = vectors - jnp.matmul(shares, vectors, precision='highest')
  vectors = jnp.where(used[:, None], vectors, 0.0)
  # Of size 1, whatever the size of the rows that have a share: neither huge
  # nor tiny ones leave the range of float32.
  taken = jnp.any(vectors != 0, axis=0)
  scale = jnp.max(jnp.where(taken, jnp.diagonal(geometry.basis), 0.0))
  scale = jnp.where(scale > 0, scale, 1.0)
  basis = jnp.where(taken[:, None] & taken[None, :], geometry.basis, 0.0)
  products = jnp.matmul(vectors, basis / scale, precision='highest')
  products = jnp.matmul(products, vectors.T, precision='highest')
  root = jnp.sqrt(shares)
  values, directions = jnp.linalg.eigh(products * root[:, None] * root[None, :])
  along = jnp.matmul(products, root * directions[:, -1], precision='highest')
  return values[-1] * scale, jnp.square(along)
