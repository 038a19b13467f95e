"""All that affine rules need to know about the rows, whatever they do with it.

A rule that returns `sum_c coefficient[c] * row[c]` decides on distances, norms
and angles alone. They follow from one matrix of inner products, here called
the basis: of the rows relative to a center, and of the center itself. Rows
made from rows by a matrix (mixed, clipped, averaged in buckets) have theirs
from the same basis, so that a chain of such steps reads the deltas no more
often than a single one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types


class Geometry(NamedTuple):
  """Distances and inner products of M rows, clients first, references last.

  Attributes:
    sq_dists: [M, M] squared Euclidean distances, at least 0, symmetric. The
      diagonal is 0 for a finite row; a row that is not finite is at distance
      +inf from every row and itself.
    products: [M, M] inner products; 0 for rows that are not finite.
    finite: [M] bool, rows without NaN or infinity whose squared distance from
      the center does not overflow either.
    basis: [K, K] inner products of the vectors that the rows are made of.
    coordinates: [M, K] the rows in those vectors.
  """

  sq_dists: jax.Array
  products: jax.Array
  finite: types.RowMask
  basis: jax.Array
  coordinates: jax.Array


def measure(
  deltas: types.Deltas, references: Sequence[types.Adapter] = ()
) -> Geometry:
  """Returns the geometry of the rows, reading the deltas twice.

  Once for the center and once for the products. The center is the median of
  every coordinate, which a minority of rows of any size cannot move out of the
  range of the others, so that distances among those keep float32 accuracy.

  Args:
    deltas: stacked tree, leaves [C, ...].
    references: unstacked trees of the same structure, appended as rows
      C, C + 1, ...; they do not move the center.
  """
  return of_products(tree.centered_products(deltas, references))


def of_products(basis: jax.Array) -> Geometry:
  """Returns the geometry of M rows from products relative to a center.

  Args:
    basis: [M + 1, M + 1] inner products of rows minus center, and last of
      minus the center. NaN or an infinity on the diagonal marks a row that is
      not finite.
  """
  rows = basis.shape[0] - 1
  # The last vector of the basis is minus the center.
  finite = jnp.isfinite(jnp.diagonal(basis))
  usable = finite[:, None] & finite[None, :]
  basis = jnp.where(usable, basis, 0.0)
  coordinates = jnp.concatenate([jnp.eye(rows), -jnp.ones((rows, 1))], axis=1)
  return _geometry(basis, coordinates, finite[:rows])


def transform(
  geometry: Geometry, matrix: jax.Array, num_clients: int
) -> Geometry:
  """Returns the geometry of `matrix @ rows`; references stay.

  Args:
    geometry: of `num_clients` rows and any references.
    matrix: [M, C] float32. A new row that takes anything from a row that is
      not finite is not finite.
    num_clients: C.
  """
  clients = matrix @ geometry.coordinates[:num_clients]
  spoiled = jnp.any((matrix != 0) & ~geometry.finite[None, :num_clients], 1)
  return _geometry(
    geometry.basis,
    jnp.concatenate([clients, geometry.coordinates[num_clients:]]),
    jnp.concatenate([~spoiled, geometry.finite[num_clients:]]),
  )


def norms(geometry: Geometry) -> jax.Array:
  """Returns the [M] Euclidean norms, +inf for a row that is not finite."""
  squares = jnp.maximum(jnp.diagonal(geometry.products), 0.0)
  return jnp.where(geometry.finite, tree.safe_sqrt(squares), jnp.inf)


def cosines(products: jax.Array, finite: types.RowMask) -> jax.Array:
  """Returns [M, M] cosines of rows, in [-1, 1].

  They are 0 for a row that is not finite or holds nothing but zeros.

  Args:
    products: [M, M] inner products.
    finite: rows that count.
  """
  squares = jnp.diagonal(products)
  usable = finite & (squares > 0)
  lengths = jnp.sqrt(jnp.where(usable, squares, 1.0))
  pairs = usable[:, None] & usable[None, :]
  found = jnp.where(pairs, products, 0.0) / lengths[:, None] / lengths[None, :]
  return jnp.clip(found, -1.0, 1.0)


def _geometry(basis, coordinates, finite) -> Geometry:
  """Completes a geometry from what its rows are made of."""
  coordinates = jnp.where(finite[:, None], coordinates, 0.0)
  projected = jnp.matmul(coordinates, basis, precision='highest')
  products = jnp.matmul(projected, coordinates.T, precision='highest')

  def sq_dists_of_row(row):
    # Of differences, so that what two rows share cancels before rounding.
    change = row - coordinates
    return jnp.sum(jnp.matmul(change, basis, precision='highest') * change, 1)

  dists = jax.lax.map(sq_dists_of_row, coordinates)
  dists = jnp.maximum(0.5 * (dists + dists.T), 0.0)
  pairs = finite[:, None] & finite[None, :]
  return Geometry(
    jnp.where(pairs, dists, jnp.inf), products, finite, basis, coordinates
  )
