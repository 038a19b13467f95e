"""Maths on stacked trees: every leaf has the C clients on its leading axis.

Nothing here sorts or reduces over that axis as an array axis, which XLA does
one to two orders of magnitude slower than the same work written row by row on
a CPU; and no leaf is ever concatenated to another. Arithmetic is float32
whatever the leaves hold, and results have the dtype of their leaf.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import _networks, _tiles, types

# Most products of a row and a number that are written out one by one, so that
# made rows fuse with what reads them.
_MAX_UNROLLED = 400

# Rows that a CPU adds in one pass; more at once take it twice as long.
_CPU_BLOCK = 10


def cohort_size(deltas: types.Deltas) -> int:
  """Returns C, the length of the leading axis that all leaves share.

  Args:
    deltas: stacked tree, leaves [C, ...].

  Returns:
    C as a Python int.

  Raises:
    ValueError: if there is no leaf, a leaf is a scalar, or lengths differ.
  """
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(deltas)}
  if len(sizes) != 1 or () in sizes:
    found = sorted(size[0] if size else 'scalar' for size in sizes)
    raise ValueError(
      f'deltas with leading axes {found} must have one client axis that all '
      'leaves share; stack the clients of the round first'
    )
  return sizes.pop()[0]


def rows(leaf: jax.Array) -> list[jax.Array]:
  """Returns the C rows of one leaf in float32, as static slices."""
  return [
    lax.index_in_dim(leaf, c, keepdims=False).astype(jnp.float32)
    for c in range(leaf.shape[0])
  ]


def total(terms: Sequence[jax.Array]) -> jax.Array:
  """Returns the sum of arrays of one shape, unrolled so that it fuses."""
  return functools.reduce(operator.add, terms)


def mix(weights: types.Weights, deltas: types.Deltas) -> types.Adapter:
  """Returns `sum_c weights[c] * deltas[c]` for every leaf.

  A row of weight 0 is ignored whatever it holds, NaN included; a weight
  vector with a single 1 returns that row unchanged.

  Args:
    weights: [C] float32 factors; they need not sum to 1.
    deltas: stacked tree, leaves [C, ...].

  Returns:
    A tree of leaves [...], each with the dtype of its leaf.
  """

  def mix_leaf(leaf):
    at_once = functools.partial(_weighted_sum, leaf.shape[0])
    mixed = lax.platform_dependent(
      jnp.asarray(weights),
      jnp.asarray(leaf),
      cpu=_sum_in_blocks,
      default=at_once,
    )
    return mixed.astype(leaf.dtype)

  return jax.tree.map(mix_leaf, deltas)


def _sum_in_blocks(weights: types.Weights, leaf: jax.Array) -> jax.Array:
  """Adds the weighted rows of a leaf, a few in a pass over the columns."""
  num_first = leaf.shape[0] % _CPU_BLOCK or _CPU_BLOCK
  num_blocks = (leaf.shape[0] - num_first) // _CPU_BLOCK
  first = _weighted_sum(num_first, weights, leaf)

  def add_block(i, added):
    start = num_first + i * _CPU_BLOCK
    return added + _weighted_sum(_CPU_BLOCK, weights, leaf, start)

  return lax.fori_loop(0, num_blocks, add_block, first) if num_blocks else first


def _weighted_sum(count: int, weights, leaf, start=0) -> jax.Array:
  """Adds `count` weighted rows, unrolled so that they fuse, in float32."""
  terms = []
  for c in range(count):
    weight, row = weights[start + c], leaf[start + c].astype(jnp.float32)
    # The row is replaced and not the product, whose derivative would be NaN.
    terms.append(weight * jnp.where(weight == 0, 0.0, row))
  return total(terms)


def mix_rows(
  matrix: jax.Array, deltas: types.Deltas, *, fused: bool = False
) -> types.Deltas:
  """Returns `matrix @ deltas` for every leaf.

  A new row that takes anything from a row with a NaN or an infinity is NaN
  where that row is not finite; other rows do not notice.

  Args:
    matrix: [M, C] float32.
    deltas: stacked tree, leaves [C, ...].
    fused: whether something reads the new rows elementwise and once, so that
      few of them need not be written out at all.

  Returns:
    A stacked tree, leaves [M, ...], each with the dtype of its leaf.
  """
  unrolled = functools.partial(_unrolled_mix_rows, matrix)
  few = matrix.size <= _MAX_UNROLLED

  made = unrolled if few and fused else functools.partial(_written_rows, matrix)
  return jax.tree.map(made, deltas)


def where_rows(
  mask: types.RowMask, chosen: types.Deltas, other: types.Deltas
) -> types.Deltas:
  """Returns the rows of `chosen` where `mask` is set, else those of `other`.

  Args:
    mask: [C] bool.
    chosen: stacked tree, leaves [C, ...].
    other: stacked tree of the same structure; its dtypes are kept.

  Returns:
    A stacked tree; rows outside the mask are bit-identical to `other`.
  """

  def choose(a, b):
    spread = jnp.reshape(mask, mask.shape + (1,) * (b.ndim - 1))
    return jnp.where(spread, a.astype(b.dtype), b)

  return jax.tree.map(choose, chosen, other)


def keep_leaves(kept: types.PyTree, values: types.PyTree) -> types.PyTree:
  """Replaces by 0 the leaves that are not kept.

  Args:
    kept: tree of bool scalars, Python's or traced.
    values: tree of the same structure.
  """
  return jax.tree.map(
    lambda keep, leaf: jnp.where(keep, leaf, jnp.zeros_like(leaf)), kept, values
  )


@jax.custom_jvp
def row_norms(deltas: types.Deltas) -> jax.Array:
  """Returns the [C] Euclidean norms of the rows, all leaves together.

  The derivative is 0 for a row of zeros and one whose norm is not finite.

  Args:
    deltas: stacked tree, leaves [C, ...].
  """

  def squared(leaf):
    axes = tuple(range(1, leaf.ndim))
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)

  return safe_sqrt(total([squared(x) for x in jax.tree.leaves(deltas)]))


@row_norms.defjvp
def _row_norms_jvp(primals, tangents):
  """Differentiates the norms of the rows that have one."""
  (deltas,), (changes,) = primals, tangents
  norms = row_norms(deltas)
  usable = jnp.isfinite(norms) & (norms > 0)
  clean = where_rows(usable, deltas, jax.tree.map(jnp.zeros_like, deltas))
  along = row_dots(clean, changes)
  return norms, along / jnp.where(usable, norms, 1.0)


def row_dots(deltas: types.Deltas, others: types.PyTree) -> jax.Array:
  """Returns the [C] inner products of the rows with other rows, or one.

  Args:
    deltas: stacked tree, leaves [C, ...].
    others: tree of the same structure, leaves [C, ...] or [...].
  """

  def dots(leaf, other):
    products = leaf.astype(jnp.float32) * other.astype(jnp.float32)
    return jnp.sum(products, axis=tuple(range(1, leaf.ndim)))

  return total(jax.tree.leaves(jax.tree.map(dots, deltas, others)))


def safe_sqrt(squares: jax.Array) -> jax.Array:
  """Returns the square root, with a derivative of 0 instead of inf at 0.

  Args:
    squares: of any shape, at least 0.
  """
  # NaN is not 0 and stays what it is.
  zero = squares == 0
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def finite_rows(deltas: types.Deltas) -> types.RowMask:
  """Returns [C] bool: the rows without any NaN or infinity.

  Args:
    deltas: stacked tree, leaves [C, ...].
  """

  return jnp.isfinite(total([_probe(x, 1) for x in jax.tree.leaves(deltas)]))


def all_finite(values: types.Adapter) -> jax.Array:
  """Returns a bool scalar: no leaf holds a NaN or an infinity."""
  return jnp.isfinite(total([_probe(x, 0) for x in jax.tree.leaves(values)]))


def _probe(leaf: jax.Array, num_kept: int) -> jax.Array:
  """Sums all but the first axes; the sum is finite where all entries are."""
  # NaN and infinity survive, 2**-64 keeps finite values from overflowing. As
  # a product it is several times faster on a CPU than reducing a mask.
  small = jnp.full(leaf.shape[num_kept:], 2.0**-64, jnp.float32)
  return jnp.tensordot(
    leaf.astype(jnp.float32), small, small.ndim, precision='highest'
  )


def order_statistics(
  values: Sequence[jax.Array], ranks: Sequence[int]
) -> list[jax.Array]:
  """Returns elementwise order statistics of C arrays, without sorting them.

  The arrays pass through a network of minimum and maximum, cut down to the
  comparators that the wanted ranks need: one fused elementwise kernel.
  Infinities sort to their ends; NaN must not occur.

  Args:
    values: C arrays of one shape.
    ranks: static ranks in [0, C), 0 for the smallest.

  Returns:
    One array for each rank, in the order of `ranks`.
  """
  return _networks.order_statistics(values, tuple(ranks))


def median(values: Sequence[jax.Array]) -> jax.Array:
  """Returns the elementwise median; of an even number, the middles' mean."""
  n = len(values)
  low, high = order_statistics(values, ((n - 1) // 2, n // 2))
  return 0.5 * low + 0.5 * high


def nonfinite_last(values: jax.Array) -> jax.Array:
  """Replaces NaN and both infinities by +inf, so that they sort last."""
  return jnp.where(jnp.isfinite(values), values, jnp.inf)


def finite_part(leaf: jax.Array) -> jax.Array:
  """Returns a leaf in float32, entries that are not finite replaced by 0."""
  values = leaf.astype(jnp.float32)
  return jnp.where(jnp.isfinite(values), values, 0.0)


def gram(deltas: types.Deltas) -> jax.Array:
  """Returns the [C, C] inner products of the rows, summed over the leaves.

  Args:
    deltas: stacked tree, leaves [C, ...], finite.
  """

  wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(deltas)]
  return total([_dot(leaf, leaf) for leaf in wide])


def centered_products(
  deltas: types.Deltas, references: Sequence[types.Adapter] = ()
) -> jax.Array:
  """Returns inner products of the rows relative to a center, and of it.

  The center is the coordinate-wise lower median of the rows, 0 where that is
  not finite. Products are summed over the leaves; each leaf is read once for
  its center and once for its products. A row that holds a NaN or an infinity
  spoils its own row and column only.

  The center counts as a constant in derivatives: distances and inner products
  of the rows do not depend on it.

  Args:
    deltas: stacked tree, leaves [C, ...].
    references: E unstacked trees of the same structure, leaves [...].

  Returns:
    [C + E + 1, C + E + 1] float32: rows minus center, references minus
    center, and last the center itself with its sign changed.
  """
  others = [jax.tree.leaves(reference) for reference in references]
  leaves = jax.tree.leaves(deltas)
  return total(
    [
      _leaf_products(leaf, [other[i] for other in others])
      for i, leaf in enumerate(leaves)
    ]
  )


def _leaf_products(leaf: jax.Array, references: list[jax.Array]) -> jax.Array:
  """Returns the products of one leaf."""
  # Fused into the products, the center would be computed for each row.
  center = lax.stop_gradient(lax.optimization_barrier(_median_row(leaf)))
  others = jnp.stack([*references, jnp.zeros_like(center)])
  products, across, outside = _products(leaf, others, center)
  upper = jnp.concatenate([products, across], axis=1)
  lower = jnp.concatenate([across.T, outside], axis=1)
  return jnp.concatenate([upper, lower])


@jax.custom_jvp
def _products(rows, others, center) -> tuple[jax.Array, ...]:
  """Multiplies rows and others minus center, each with each."""
  return lax.platform_dependent(
    rows, others, center, cpu=_tiled_products, default=_whole_products
  )


@_products.defjvp
def _products_jvp(primals, tangents):
  """Differentiates with bad entries as zeros: 0 times NaN would be NaN."""
  clean = [finite_part(x) for x in primals]
  wide = [x.astype(jnp.float32) for x in tangents]
  return _products(*primals), jax.jvp(_whole_products, clean, wide)[1]


def _whole_products(rows, others, center) -> tuple[jax.Array, ...]:
  """Multiplies a leaf at once; keeps any sharding of its parameter axes."""
  rows = rows.astype(jnp.float32) - center
  # Apart from each other: side by side they would have to be copied first.
  others = others.astype(jnp.float32) - center
  return _dot(rows, rows), _dot(rows, others), _dot(others, others)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the inner products of the rows of two stacked arrays."""
  axes = tuple(range(1, a.ndim))
  return jnp.tensordot(a, b, axes=(axes, axes), precision=lax.Precision.HIGHEST)


def _tiled_products(rows, others, center) -> tuple[jax.Array, ...]:
  """Multiplies a leaf in tiles of columns that fit into a CPU's cache."""
  flat = [
    x.reshape(*x.shape[: x.ndim - center.ndim], center.size)
    for x in (rows, others, center)
  ]
  num_tiles = center.size // _tiles.CPU_TILE
  whole = num_tiles * _tiles.CPU_TILE

  def add_tile(i, products):
    start = i * _tiles.CPU_TILE
    tile = _whole_products(
      *(
        lax.dynamic_slice_in_dim(x, start, _tiles.CPU_TILE, axis=-1)
        for x in flat
      )
    )
    return jax.tree.map(operator.add, products, tile)

  rest = _whole_products(*(x[..., whole:] for x in flat))
  return lax.fori_loop(0, num_tiles, add_tile, rest) if num_tiles else rest


@jax.custom_jvp
def _written_rows(matrix, leaf) -> jax.Array:
  """Multiplies a matrix with a leaf, in tiles where that is faster."""
  few = matrix.size <= _MAX_UNROLLED
  whole = _unrolled_mix_rows if few else _mix_whole_rows
  return _tiles.columns(
    functools.partial(_mix_tile, matrix),
    leaf,
    num_column_axes=leaf.ndim - 1,
    whole=functools.partial(whole, matrix),
  )


@_written_rows.defjvp
def _written_rows_jvp(primals, tangents):
  """Differentiates the product with bad entries as zeros."""
  (matrix, leaf), (new_matrix, new_leaf) = primals, tangents
  made = _written_rows(matrix, leaf)
  dot = functools.partial(jnp.tensordot, axes=1, precision='highest')
  change = dot(new_matrix, finite_part(leaf))
  change += dot(matrix, new_leaf.astype(jnp.float32))
  return made, change.astype(made.dtype)


def _unrolled_mix_rows(matrix, leaf) -> jax.Array:
  """Multiplies row by row, in terms that fuse with what reads the result."""
  return jnp.stack([mix(weights, leaf) for weights in matrix])


def _mix_whole_rows(matrix, leaf) -> jax.Array:
  """Multiplies a matrix with a leaf, bad entries apart from the others."""
  bad = ~jnp.isfinite(leaf)
  dot = functools.partial(jnp.tensordot, axes=1, precision='highest')
  made = dot(matrix, finite_part(leaf))
  touched = dot((matrix != 0).astype(jnp.float32), bad.astype(jnp.float32))
  return jnp.where(touched > 0, jnp.nan, made).astype(leaf.dtype)


def _mix_tile(matrix, tile) -> jax.Array:
  """Multiplies a few columns, with that care only where one is bad."""
  # A bad entry spoils its column even where its factor is 0.
  made = jnp.tensordot(
    matrix, tile.astype(jnp.float32), axes=1, precision='highest'
  )
  return lax.cond(
    jnp.isfinite(_probe(made, 0)),
    lambda: made.astype(tile.dtype),
    lambda: _mix_whole_rows(matrix, tile),
  )


def _median_row(leaf: jax.Array) -> jax.Array:
  """Returns the lower median [...] of a leaf; 0 where it is not finite."""
  ordered = [nonfinite_last(row) for row in rows(leaf)]
  (middle,) = order_statistics(ordered, ((len(ordered) - 1) // 2,))
  return jnp.where(jnp.isfinite(middle), middle, 0.0)
