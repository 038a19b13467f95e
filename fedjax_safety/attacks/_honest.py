"""What an attacker who sees the round knows of the honest clients.

Only honest rows of finite norm count, so that one broken client leaves the
statistics of the others alone. How many rows are malicious is traced, hence
masks instead of slices. All statistics are float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types


class Honest(NamedTuple):
  """The honest clients of a round, as far as their deltas can be used.

  Attributes:
    usable: [C] bool, honest rows whose squared norm is finite.
    count: float32 scalar, the number of usable rows.
    mean: their mean, leaves [...]; 0 if there is none.
  """

  usable: types.RowMask
  count: jax.Array
  mean: types.Adapter


def measure(deltas: types.Deltas, is_malicious: types.RowMask) -> Honest:
  """Returns the usable honest rows and their mean."""
  usable = ~is_malicious & jnp.isfinite(tree.row_norms(deltas))
  count = jnp.sum(usable, dtype=jnp.float32)
  shares = usable.astype(jnp.float32) / jnp.maximum(count, 1.0)
  return Honest(usable, count, tree.mix(shares, _float32(deltas)))


def deviations(deltas: types.Deltas, honest: Honest) -> types.Deltas:
  """Returns the usable rows minus their mean; the other rows are 0."""
  away = jax.tree.map(jnp.subtract, _float32(deltas), honest.mean)
  return tree.where_rows(
    honest.usable, away, jax.tree.map(jnp.zeros_like, away)
  )


def std(deltas: types.Deltas, honest: Honest, ddof: int) -> types.Adapter:
  """Returns the standard deviation of the usable rows in each coordinate."""
  rows = jnp.maximum(honest.count - ddof, 1.0)
  shares = honest.usable.astype(jnp.float32) / rows
  squares = jax.tree.map(jnp.square, deviations(deltas, honest))
  return jax.tree.map(tree.safe_sqrt, tree.mix(shares, squares))


def bounds(
  deltas: types.Deltas, honest: Honest
) -> tuple[types.Adapter, types.Adapter]:
  """Returns the smallest and the largest usable value of each coordinate."""

  def lowest(leaf):
    values = [
      jnp.where(honest.usable[c], row, jnp.inf)
      for c, row in enumerate(tree.rows(leaf))
    ]
    return functools.reduce(jnp.minimum, values)

  highest = jax.tree.map(lambda leaf: -lowest(-leaf), deltas)
  return jax.tree.map(lowest, deltas), highest


def norm(row: types.Adapter) -> jax.Array:
  """Returns the Euclidean norm of one row."""
  squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(row)]
  return tree.safe_sqrt(tree.total(squares))


def unit(row: types.Adapter) -> types.Adapter:
  """Scales a row to norm 1; a row of zeros stays."""
  size = norm(row)
  factor = 1 / jnp.where(size > 0, size, 1.0)
  return jax.tree.map(lambda leaf: factor * leaf, row)


def write(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  honest: Honest,
  row: types.Adapter,
) -> types.Deltas:
  """Gives all malicious clients one row; none where no honest row is usable."""
  return write_rows(
    deltas, is_malicious, honest, jax.tree.map(lambda leaf: leaf[None], row)
  )


def write_rows(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  honest: Honest,
  rows: types.Deltas,
) -> types.Deltas:
  """Gives each malicious client its row, as `write` gives all of them one."""
  return tree.where_rows(is_malicious & (honest.count > 0), rows, deltas)


def _float32(deltas: types.Deltas) -> types.Deltas:
  """Returns the deltas in float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), deltas)
