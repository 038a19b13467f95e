"""Rules that treat every coordinate on its own: median and trimmed mean.

A value that is NaN or infinite counts as one Byzantine value of its
coordinate: it sorts to the upper end. Coordinates with more of them than the
rule can bear are 0 in the result.
"""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base


def median(deltas: types.Deltas) -> types.Adapter:
  """Returns the median of the clients in every coordinate.

  For an even number of clients it is the mean of the two middle values. As
  long as fewer than half of a coordinate's values are Byzantine (NaN and
  infinity included), it lies within the range of the honest ones.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> print(aggregators.median(jnp.array([[1.0], [jnp.nan], [2.0]])))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].

  Returns:
    The delta, leaves [...].

  Reference: Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates. ICML 2018.
  """
  tree.cohort_size(deltas)
  return jax.tree.map(_median_leaf, deltas)


def trimmed_mean(deltas: types.Deltas, *, num_byzantine: int) -> types.Adapter:
  """Returns, in every coordinate, the mean without the extremes.

  The `num_byzantine` lowest and as many highest values are left out. With at
  most `num_byzantine` Byzantine values in a coordinate (NaN and infinity
  included) the result lies within the range of the honest ones; 0 gives the
  mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [1e9], [2.0]])
    >>> print(aggregators.trimmed_mean(deltas, num_byzantine=1))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: values to leave out at either end; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if nothing would be left.

  Reference: Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates. ICML 2018.
  """
  _check_trimmed_mean(tree.cohort_size(deltas), num_byzantine)
  return jax.tree.map(lambda x: _trimmed_leaf(x, num_byzantine), deltas)


def build_median(cohort_size: int) -> _base.Aggregator:
  """Builds the coordinate-wise median."""
  return _coordinatewise(median, cohort_size)


def build_trimmed_mean(
  cohort_size: int, *, num_byzantine: int
) -> _base.Aggregator:
  """Builds the coordinate-wise trimmed mean."""
  _check_trimmed_mean(cohort_size, num_byzantine)
  return _coordinatewise(
    lambda deltas: trimmed_mean(deltas, num_byzantine=num_byzantine),
    cohort_size,
  )


def _coordinatewise(function, cohort_size) -> _base.Aggregator:
  """Wraps `deltas -> delta`, without shares of the clients."""

  def rule(deltas, weights, key):
    del weights, key
    return _base.RuleOutput(function(deltas), None, tree.finite_rows(deltas))

  return _base.stateless(rule, cohort_size=cohort_size)


def _check_trimmed_mean(cohort_size: int, num_byzantine: int) -> None:
  _validate.byzantine_bound('trimmed_mean', num_byzantine, cohort_size, 2, 1)


def _median_leaf(leaf: jax.Array) -> jax.Array:
  """Returns the median of the rows of one leaf."""
  middle = tree.median([tree.nonfinite_last(row) for row in tree.rows(leaf)])
  return _finite_or_zero(middle).astype(leaf.dtype)


def _trimmed_leaf(leaf: jax.Array, num_byzantine: int) -> jax.Array:
  """Returns the trimmed mean of the rows of one leaf.

  Two cut-off ranks are enough: values below the lower one count as it, and so
  do those above the upper one, whose surplus is then taken off. Relative to
  the lower cut-off, equal rows give exactly that row.
  """
  f, values = num_byzantine, tree.rows(leaf)
  finite = [jnp.isfinite(value) for value in values]
  values = [tree.nonfinite_last(value) for value in values]
  low, high = tree.order_statistics(values, (f, len(values) - 1 - f))
  num_finite = tree.total(
    [is_finite.astype(jnp.float32) for is_finite in finite]
  )
  # Values that are not finite stand at the upper end and are trimmed first.
  surplus = jnp.maximum(f - (len(values) - num_finite), 0.0)
  excess = tree.total(
    [
      jnp.where(is_finite, jnp.clip(value, low, high) - low, 0.0)
      for value, is_finite in zip(values, finite, strict=True)
    ]
  )
  excess -= jnp.where(surplus > 0, surplus * (high - low), 0.0)
  kept = num_finite - f - surplus
  result = jnp.where(kept > 0, low + excess / jnp.maximum(kept, 1.0), 0.0)
  return _finite_or_zero(result).astype(leaf.dtype)


def _finite_or_zero(values: jax.Array) -> jax.Array:
  """Replaces what is not finite by 0, which leaves the model as it is."""
  return jnp.where(jnp.isfinite(values), values, 0.0)
