"""The largest coordinates of a row, over all leaves, without sorting them."""

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import _tiles, tree


def magnitudes(leaf: jax.Array) -> jax.Array:
  """Returns int32 numbers that are ordered as the magnitudes of the leaf."""
  size = jnp.abs(leaf.astype(jnp.float32))
  return lax.bitcast_convert_type(size, jnp.int32)


def cutoffs(leaves: list[jax.Array], count: int) -> jax.Array:
  """Returns the `count`-th largest magnitude of each row, all leaves together.

  The bits of the number are found from the highest down, each by counting
  the coordinates that are at least as large: 31 reads, no sort, no copy of
  the leaves in one piece.

  Args:
    leaves: [C, ...] each; rows with NaN give a number without meaning.
    count: at least 1 and at most P.

  Returns:
    [C] int32, to be compared with `magnitudes`.
  """

  def num_at_least(bound):
    return tree.total(
      [
        _tiles.row_sums(
          lambda x: magnitudes(x) >= spread(bound, x),
          leaf,
          num_column_axes=leaf.ndim - 1,
        )
        for leaf in leaves
      ]
    )

  def set_bit(step, found):
    trial = found | (1 << (30 - step))
    return jnp.where(num_at_least(trial) >= count, trial, found)

  start = jnp.zeros(leaves[0].shape[0], jnp.int32)
  return lax.fori_loop(0, 31, set_bit, start)


def spread(values: jax.Array, leaf: jax.Array) -> jax.Array:
  """Shapes [C] or [C, layers] values so that they broadcast over a leaf."""
  return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))
