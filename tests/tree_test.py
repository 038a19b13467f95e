"""Stacked-tree maths: networks against sorting, products against float64."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_safety import _networks, tree

SETTINGS = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
# Small integers make ties; infinities are the values of bad rows.
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, np.inf])


@pytest.mark.parametrize('size', range(1, 13))
def test_network_sorts_every_zero_one_input(size):
  # By the zero-one principle it then sorts everything.
  bits = np.array(list(itertools.product([0, 1], repeat=size))).T
  wires = bits.copy()
  for low, high in _networks.pruned(size, tuple(range(size))):
    a, b = wires[low].copy(), wires[high].copy()
    wires[low], wires[high] = np.minimum(a, b), np.maximum(a, b)
  np.testing.assert_array_equal(wires, np.sort(bits, axis=0))


@SETTINGS
@hypothesis.given(data=st.data())
def test_order_statistics_equal_sorting(data):
  size = data.draw(st.integers(1, 40))
  ranks = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
  values = data.draw(hnp.arrays(np.float32, (size, 3), elements=VALUES))
  got = tree.order_statistics(list(values), ranks)
  np.testing.assert_array_equal(
    np.stack(got), np.sort(values, axis=0)[list(ranks)]
  )


@SETTINGS
@hypothesis.given(
  values=hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.just(3)),
    elements=st.floats(-8, 8, width=16),
  )
)
def test_median_equals_numpy(values):
  np.testing.assert_allclose(
    tree.median([jnp.asarray(row) for row in values]),
    np.median(values, axis=0),
    rtol=1e-6,
  )


def test_pruning_drops_comparators():
  everything = len(_networks.pruned(32, tuple(range(32))))
  assert len(_networks.pruned(32, (15, 16))) < 0.9 * everything
  assert len(_networks.pruned(32, (0,))) == 31


def test_gram_of_a_tree_is_that_of_its_vector():
  deltas = {
    'scalars': jnp.arange(4.0),
    'matrix': jax.random.normal(jax.random.key(1), (4, 2, 3)),
  }
  flat = np.concatenate(
    [np.asarray(x).reshape(4, -1) for x in jax.tree.leaves(deltas)], axis=1
  )
  np.testing.assert_allclose(tree.gram(deltas), flat @ flat.T, rtol=1e-5)
  np.testing.assert_allclose(
    tree.row_norms(deltas), np.linalg.norm(flat, axis=1), rtol=1e-6
  )


def test_mix_ignores_rows_of_weight_zero_and_returns_single_rows_exactly():
  leaf = jnp.array([[1.1, 2.2], [jnp.nan, jnp.inf], [3.3, 4.4]])
  np.testing.assert_array_equal(
    tree.mix(jnp.array([0.0, 0.0, 1.0]), leaf), leaf[2]
  )


# Up to a block of rows, blocks of them, and blocks with a rest.
@pytest.mark.parametrize('num_rows', [1, 9, 10, 11, 20, 43])
def test_mix_is_a_product_and_has_its_derivatives(num_rows):
  rng = np.random.default_rng(num_rows)
  rows = rng.standard_normal((num_rows, 2, 3)).astype(np.float32)
  weights = rng.uniform(-1, 1, num_rows).astype(np.float32)
  spoiled, left_out = rows.copy(), weights.copy()
  spoiled[num_rows // 2], left_out[num_rows // 2] = np.nan, 0.0
  want = np.tensordot(np.float64(left_out), rows, axes=1)
  np.testing.assert_allclose(tree.mix(left_out, spoiled), want, atol=1e-5)
  gradients = jax.grad(lambda *args: tree.mix(*args).sum(), argnums=(0, 1))
  by_weight, by_row = gradients(weights, rows)
  np.testing.assert_allclose(by_weight, rows.sum((1, 2)), atol=1e-5)
  by_row = np.asarray(by_row)
  np.testing.assert_array_equal(
    by_row, np.broadcast_to(weights[:, None, None], rows.shape)
  )


def test_finite_rows_sees_every_kind_of_bad_entry_and_no_large_one():
  leaf = jnp.zeros((6, 5)).at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
  leaf = leaf.at[2, 4].set(-jnp.inf).at[3].set(3e38).at[4].set(1e-44)
  got = tree.finite_rows({'a': leaf, 'b': jnp.ones((6, 2), jnp.bfloat16)})
  np.testing.assert_array_equal(got, [False, False, False, True, True, True])


def test_where_rows_keeps_the_other_rows_bit_by_bit():
  other = jnp.array([[jnp.nan, -0.0], [1.0, 2.0]], jnp.bfloat16)
  got = tree.where_rows(jnp.array([False, True]), jnp.full((2, 2), 7.0), other)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(got[0]).view(np.uint16), np.asarray(other[0]).view(np.uint16)
  )
  np.testing.assert_array_equal(got[1].astype(jnp.float32), 7.0)


def _rows_of_four_kinds(columns: int) -> np.ndarray:
  """Returns 25 rows, a NaN in row 3, an infinity in row 7."""
  rows = np.random.default_rng(2).standard_normal((25, columns))
  rows[3, columns // 2] = np.nan
  rows[7, columns - 1] = -np.inf
  return rows.astype(np.float32)


# One row in one column, less than a tile, and tiles with a rest.
@pytest.mark.parametrize('columns', [1, 50, 10_000])
@pytest.mark.parametrize('num_rows', [1, 10, 25])
def test_mix_rows_equals_a_product_and_spoils_what_it_must(num_rows, columns):
  rows = _rows_of_four_kinds(columns)
  matrix = np.random.default_rng(3).uniform(-1, 1, (num_rows, 25))
  matrix = matrix.astype(np.float32)
  matrix[:, 3] = np.arange(num_rows) % 2
  matrix[:, 7] = np.arange(num_rows) % 3 == 1
  got = np.asarray(jax.jit(tree.mix_rows)(matrix, jnp.asarray(rows)))
  bad = ~np.isfinite(rows)
  want = np.float64(matrix) @ np.where(bad, 0.0, rows)
  spoiled = (matrix != 0).astype(int) @ bad.astype(int) > 0
  np.testing.assert_array_equal(~np.isfinite(got), spoiled)
  np.testing.assert_allclose(got[~spoiled], want[~spoiled], rtol=0, atol=1e-5)


def test_mix_rows_keeps_shapes_and_dtypes():
  leaf = jnp.ones((25, 2, 3), jnp.bfloat16)
  for num_rows in (2, 25):
    got = tree.mix_rows(jnp.full((num_rows, 25), 0.04), leaf)
    assert got.shape == (num_rows, 2, 3)
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize('value', [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite_sees_one_bad_entry_and_no_large_one(value):
  large = {'a': jnp.full((3, 4), 3e38), 'b': jnp.full(5, -3e38)}
  assert tree.all_finite(large)
  assert not tree.all_finite(large | {'c': jnp.zeros(()).at[()].set(value)})
  assert not tree.all_finite(large | {'a': large['a'].at[2, 3].set(value)})


def test_both_ways_to_order_a_pair_agree():
  values = [jnp.array(row) for row in itertools.permutations([1.0, -2.0, 3.0])]
  for order in (_networks._order, _networks._order_by_select):
    got = _networks._run((0, 3, 5), order, *values)
    want = np.sort(np.stack(values), axis=0)[[0, 3, 5]]
    np.testing.assert_array_equal(np.stack(got), want)


def test_order_statistics_have_the_derivative_of_the_chosen_value():
  values = jnp.array([3.0, 1.0, 2.0])
  got = jax.grad(lambda x: tree.order_statistics(list(x), (1,))[0])(values)
  np.testing.assert_array_equal(got, [0.0, 0.0, 1.0])
