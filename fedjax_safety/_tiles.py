"""Work on the columns of stacked arrays, tile by tile where that is faster.

An array is axes of rows, as many as it likes, and then axes of columns, which
all arrays of a call share. What is done must treat columns apart. A CPU does
it on a few columns at a time, which stay in its cache and need no copy of the
array; other platforms take all at once, which keeps any sharding of columns.
"""

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Columns that a CPU works on at a time, so that they stay in its cache.
CPU_TILE = 4_096


def row_sums(function: Callable, *arrays: jax.Array, num_column_axes: int):
  """Returns `function(*arrays)`, summed over the columns.

  Args:
    function: returns a tree of arrays [rows..., columns...], of numbers or, to
      be counted, bool.
    *arrays: [rows..., columns...] each.
    num_column_axes: how many of the last axes are columns.

  Returns:
    The tree, arrays [rows...].
  """

  def whole(*arrays, num_axes=num_column_axes):
    return jax.tree.map(lambda x: _summed(x, num_axes), function(*arrays))

  def tiled(*arrays):
    flat, width = _flattened(arrays, num_column_axes)
    if width <= CPU_TILE:
      return whole(*flat, num_axes=1)

    def add_tile(i, sums):
      start, tiles = _cut(flat, i, width)
      # The last tile begins within the one before it.
      new = start + jnp.arange(CPU_TILE) >= i * CPU_TILE
      made = jax.tree.map(
        lambda x: jnp.where(new, x, jnp.zeros_like(x)), function(*tiles)
      )
      added = jax.tree.map(lambda x: _summed(x, 1), made)
      return jax.tree.map(operator.add, sums, added)

    shapes = jax.eval_shape(whole, *arrays)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.fori_loop(0, -(-width // CPU_TILE), add_tile, sums)

  return lax.platform_dependent(*arrays, cpu=tiled, default=whole)


def columns(
  function: Callable,
  *arrays: jax.Array,
  num_column_axes: int,
  whole: Callable | None = None,
) -> jax.Array:
  """Returns `function(*arrays)`, made tile by tile on a CPU.

  Args:
    function: returns one array [rows..., columns...].
    *arrays: [rows..., columns...] each.
    num_column_axes: how many of the last axes are columns.
    whole: what other platforms use instead of `function`.
  """

  def tiled(*arrays):
    flat, width = _flattened(arrays, num_column_axes)
    shape = jax.eval_shape(function, *arrays)
    if width <= CPU_TILE:
      return function(*flat).reshape(shape.shape)

    def put_tile(i, made):
      start, tiles = _cut(flat, i, width)
      tile = function(*tiles)
      return lax.dynamic_update_slice_in_dim(made, tile, start, axis=-1)

    num_rows = shape.shape[: len(shape.shape) - num_column_axes]
    made = jnp.zeros((*num_rows, width), shape.dtype)
    made = lax.fori_loop(0, -(-width // CPU_TILE), put_tile, made)
    return made.reshape(shape.shape)

  return lax.platform_dependent(*arrays, cpu=tiled, default=whole or function)


def _summed(values: jax.Array, num_axes: int) -> jax.Array:
  """Sums over the last axes; counts where values are bool."""
  axes = tuple(range(values.ndim - num_axes, values.ndim))
  dtype = jnp.int32 if values.dtype == bool else values.dtype
  return jnp.sum(values, axis=axes, dtype=dtype)


def _flattened(arrays, num_axes: int) -> tuple[list[jax.Array], int]:
  """Returns the arrays with one axis of columns, and their number."""
  rows = [x.shape[: x.ndim - num_axes] for x in arrays]
  width = math.prod(arrays[0].shape[arrays[0].ndim - num_axes :])
  flat = [
    x.reshape(*shape, width) for x, shape in zip(arrays, rows, strict=True)
  ]
  return flat, width


def _cut(flat, index, width: int) -> tuple[jax.Array, list[jax.Array]]:
  """Returns where a tile starts, so that it ends with the array, and it."""
  start = jnp.minimum(index * CPU_TILE, width - CPU_TILE)
  return start, [
    lax.dynamic_slice_in_dim(x, start, CPU_TILE, axis=-1) for x in flat
  ]
