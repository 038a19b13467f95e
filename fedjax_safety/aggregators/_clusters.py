"""Clusters of clients: C x C algorithms of static size.

All are deterministic. Rows that are not finite are at no distance from
others and in no cluster.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import types
from fedjax_safety.aggregators import _geometry

# Features that differ by less are one; they are shares in [0, 1].
_SLACK = 1e-6
_MAX_SHIFTS = 300


def cosine_dists(geometry: _geometry.Geometry) -> jax.Array:
  """Returns [C, C] cosine distances in [0, 2], +inf for rows not finite.

  A row of zeros is at distance 1 from all others. The diagonal is 0.
  """
  finite = geometry.finite
  dists = 1.0 - _geometry.cosines(geometry.products, finite)
  # Exactly symmetric, so that rows which join are told by equality.
  dists = 0.5 * (dists + dists.T)
  dists = jnp.where(jnp.eye(finite.size, dtype=bool), 0.0, dists)
  return jnp.where(finite[:, None] & finite[None, :], dists, jnp.inf)


def smallest_of_size(
  dists: jax.Array, finite: types.RowMask, size: int
) -> types.RowMask:
  """Marks the tightest single-linkage cluster of at least `size` rows.

  That is what HDBSCAN calls its only cluster where two of the least size
  cannot exist, one cluster is allowed and every row is dense by itself: its
  condensed tree has the root alone, whose members of highest density are the
  rows that are still together when `size` of them last are. With fewer than
  `size` finite rows, they all are marked.

  Args:
    dists: [C, C] distances, symmetric; +inf for rows that are not finite.
    finite: [C] bool.
    size: more than C / 2.
  """

  def through(row, joined):
    return jnp.minimum(joined, jnp.maximum(joined[:, row, None], joined[row]))

  # The longest step on the best path: where single linkage joins two rows.
  joined = lax.fori_loop(0, finite.size, through, dists)
  reach = jnp.sort(joined, axis=1)[:, size - 1]
  return finite & (reach == jnp.min(jnp.where(finite, reach, jnp.inf)))


def larger_of_two(dists: jax.Array, finite: types.RowMask) -> types.RowMask:
  """Marks the larger of two clusters made by average linkage.

  The closest pair of clusters is merged until two are left; equal distances
  merge the lowest rows first. Of two equally large clusters the one with the
  lowest row is marked.

  Args:
    dists: [C, C] distances, symmetric.
    finite: [C] bool.
  """
  size = finite.size
  pairs = finite[:, None] & finite[None, :] & ~jnp.eye(size, dtype=bool)

  def merge(_, carry):
    dists, sizes, cluster = carry
    first, second = jnp.divmod(jnp.argmin(dists), size)
    a, b = sizes[first], sizes[second]
    row = (a * dists[first] + b * dists[second]) / jnp.maximum(a + b, 1.0)
    row = row.at[first].set(jnp.inf).at[second].set(jnp.inf)
    merged = dists.at[first].set(row).at[:, first].set(row)
    merged = merged.at[second].set(jnp.inf).at[:, second].set(jnp.inf)
    new = (
      merged,
      sizes.at[first].add(b).at[second].set(0.0),
      jnp.where(cluster == second, first, cluster),
    )
    left = jnp.sum(sizes > 0)
    return jax.tree.map(lambda x, y: jnp.where(left > 2, x, y), new, carry)

  start = (
    jnp.where(pairs, dists, jnp.inf),
    finite.astype(jnp.float32),
    jnp.arange(size),
  )
  _, sizes, cluster = lax.fori_loop(0, max(size - 2, 0), merge, start)
  largest = jnp.argmax(jnp.where(finite, sizes[cluster], 0.0))
  return finite & (cluster == cluster[largest])


def largest_mode(points: jax.Array, usable: types.RowMask) -> types.RowMask:
  """Marks the largest cluster of mean shift with a flat kernel.

  The bandwidth is the mean distance to the nearest half of the points, each
  point itself included. Every point is a start; modes within a bandwidth of
  one that holds more points are dropped (equal ones keep the lowest row), and
  a point belongs to the nearest mode that is left if it is within a bandwidth.

  Args:
    points: [C, features], each in [0, 1].
    usable: [C] bool; other points take no part.
  """
  bandwidth = _bandwidth(points, usable)

  def near(modes):
    return (_dists(modes, points) <= bandwidth + _SLACK) & usable[None, :]

  def shift(carry):
    modes, _, moving, steps = carry
    within = near(modes)
    held = jnp.sum(within, axis=1)
    new = jnp.matmul(within.astype(jnp.float32), points, precision='highest')
    new = new / jnp.maximum(held, 1)[:, None]
    moved = jnp.sqrt(jnp.sum(jnp.square(new - modes), axis=1))
    modes = jnp.where(moving[:, None], new, modes)
    return modes, held, moving & (moved > 1e-3 * bandwidth), steps + 1

  points = jnp.where(usable[:, None], points, 0.0)
  modes, held, _, _ = lax.while_loop(
    lambda carry: jnp.any(carry[2]) & (carry[3] < _MAX_SHIFTS),
    shift,
    (points, jnp.zeros(usable.size, jnp.int32), usable, 0),
  )
  order = jnp.argsort(jnp.where(usable, -held, 1), stable=True)
  modes = modes[order]
  kept = _distinct(_dists(modes, modes) <= bandwidth + _SLACK, usable[order])
  dists = jnp.where(kept[:, None], _dists(modes, points), jnp.inf)
  nearest = jnp.min(dists, axis=0)
  # The first of those that are as near, which argmin would let rounding pick.
  mine = jnp.argmax(dists <= nearest + _SLACK, axis=0)
  inside = usable & (nearest <= bandwidth + _SLACK)
  members = inside[None, :] & (mine[None, :] == jnp.arange(mine.size)[:, None])
  return members[jnp.argmax(jnp.sum(members, axis=1))]


def _bandwidth(points: jax.Array, usable: types.RowMask) -> jax.Array:
  """Returns the mean distance to the farthest of the nearest half."""
  pairs = usable[:, None] & usable[None, :]
  ordered = jnp.sort(jnp.where(pairs, _dists(points, points), jnp.inf), axis=1)
  count = jnp.sum(usable)
  farthest = ordered[:, jnp.maximum(count // 2, 1) - 1]
  return jnp.sum(jnp.where(usable, farthest, 0.0)) / jnp.maximum(count, 1)


def _dists(points: jax.Array, others: jax.Array) -> jax.Array:
  """Returns all distances between points, exact where they are equal."""
  change = points[:, None, :] - others[None, :, :]
  return jnp.sqrt(jnp.sum(jnp.square(change), axis=2))


def _distinct(close: jax.Array, usable: types.RowMask) -> types.RowMask:
  """Drops modes that are close to an earlier one which is left."""

  def drop(row, kept):
    later = jnp.arange(kept.size) > row
    return kept & ~(kept[row] & close[row] & later)

  return lax.fori_loop(0, usable.size, drop, usable)
