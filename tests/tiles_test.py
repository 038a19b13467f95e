"""Work in tiles of columns gives what the whole array gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import _tiles


def _counts_and_sums(rows, offset):
  moved = rows + offset
  return {'positive': moved > 0, 'sum': moved}


# One, a part of a tile, tiles alone, and tiles with a rest.
@pytest.mark.parametrize('shape', [(1,), (3, 5), (2, 4_096), (10_000,), (0,)])
def test_sums_over_tiles_are_those_of_all_columns(shape):
  # Multiples of 1/8, whose sums are exact in any order.
  rng = np.random.default_rng(0)
  rows, offset = (
    jnp.float32(rng.integers(-16, 16, size) / 8)
    for size in ((3, *shape), shape)
  )
  got = jax.jit(
    lambda *x: _tiles.row_sums(_counts_and_sums, *x, num_column_axes=len(shape))
  )(rows, offset)
  moved = np.asarray(rows + offset).reshape(3, -1)
  np.testing.assert_array_equal(got['positive'], (moved > 0).sum(axis=1))
  np.testing.assert_array_equal(got['sum'], moved.sum(axis=1))


@pytest.mark.parametrize('shape', [(), (3, 5), (10_000,)])
def test_columns_made_in_tiles_are_those_made_at_once(shape):
  rows = jax.random.normal(jax.random.key(0), (4, *shape))

  def made(rows):
    return jnp.stack([rows[0] * rows[1], rows[2] - rows[3]])

  got = _tiles.columns(made, rows, num_column_axes=len(shape))
  assert got.shape == (2, *shape)
  np.testing.assert_array_equal(got, made(rows))
