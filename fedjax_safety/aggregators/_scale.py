"""Location and spread of one number per client, over the finite rows."""

import jax
import jax.numpy as jnp

from fedjax_safety import types


def median(values: jax.Array, usable: types.RowMask) -> jax.Array:
  """Returns the median of the usable values [C]; of none, 0.

  Of an even number it is the mean of the two middle ones.
  """
  ordered, count = _ordered(values, usable)
  low, high = ordered[(count - 1) // 2], ordered[count // 2]
  return jnp.where(count > 0, 0.5 * low + 0.5 * high, 0.0)


def lower_median(values: jax.Array, usable: types.RowMask) -> jax.Array:
  """Returns the median, of an even number the lower middle one; of none, 0."""
  ordered, count = _ordered(values, usable)
  return jnp.where(count > 0, ordered[(count - 1) // 2], 0.0)


def median_scores(
  values: jax.Array, usable: types.RowMask, resolution: jax.Array | float
) -> jax.Array:
  """Returns [C] distances from the median, in standard deviations.

  Args:
    values: [C].
    usable: [C] bool, what median and deviation are taken of.
    resolution: the least deviation that is told from rounding; smaller ones
      count as it, so that equal values score next to 0.
  """
  values = jnp.where(usable, values, 0.0)
  count = jnp.maximum(jnp.sum(usable), 1)
  mean = jnp.sum(values) / count
  squares = jnp.where(usable, jnp.square(values - mean), 0.0)
  spread = jnp.maximum(jnp.sqrt(jnp.sum(squares) / count), resolution)
  distance = jnp.abs(values - median(values, usable))
  return distance / jnp.where(spread > 0, spread, 1.0)


def clip_factors(norms: jax.Array, bound: jax.Array) -> jax.Array:
  """Returns what rows of these norms [C] are scaled by to be within a bound."""
  longer = norms > bound
  return jnp.where(longer, bound / jnp.where(longer, norms, 1.0), 1.0)


def _ordered(values, usable) -> tuple[jax.Array, jax.Array]:
  """Returns the values in ascending order, usable ones first, and how many."""
  ordered = jnp.sort(jnp.where(usable, values, jnp.inf))
  return ordered, jnp.sum(usable)
