"""Stacked-tree maths: networks against sorting, distances against float64."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_safety import tree

SETTINGS = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
# Small integers make ties; infinities are the values of bad rows.
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, np.inf])


@pytest.mark.parametrize('size', range(1, 13))
def test_network_sorts_every_zero_one_input(size):
  # By the zero-one principle it then sorts everything.
  bits = np.array(list(itertools.product([0, 1], repeat=size))).T
  wires = bits.copy()
  for low, high in tree._pruned_network(size, tuple(range(size))):
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
  everything = len(tree._pruned_network(32, tuple(range(32))))
  assert len(tree._pruned_network(32, (15, 16))) < 0.9 * everything
  assert len(tree._pruned_network(32, (0,))) == 31


def _true_dists(deltas) -> np.ndarray:
  flat = np.concatenate(
    [np.float64(x).reshape(len(x), -1) for x in jax.tree.leaves(deltas)],
    axis=1,
  )
  return np.array([[np.sum((a - b) ** 2) for b in flat] for a in flat])


def _close_rows(size: int = 300) -> dict:
  """Returns 9 rows that differ by 1e-3 around a common row of size 1."""
  rng = np.random.default_rng(0)
  common = rng.standard_normal(size)
  rows = common + 1e-3 * rng.standard_normal((9, size))
  return {
    'a': jnp.asarray(rows[:, : size // 3].reshape(9, 2, -1), jnp.float32),
    'b': jnp.asarray(rows[:, size // 3 :], jnp.float32),
  }


BAD = jnp.array([2, 5])
HONEST = np.ix_([0, 1, 3, 4, 6, 7, 8], [0, 1, 3, 4, 6, 7, 8])


@pytest.mark.parametrize(
  'spoil',
  [
    lambda x: x,
    lambda x: x.at[BAD].multiply(1e3),
    lambda x: x.at[BAD].multiply(1e6),
    lambda x: x.at[BAD].multiply(-1e15),
    lambda x: x.at[BAD].set(jnp.inf),
    lambda x: x.at[BAD].set(jnp.nan),
    lambda x: x.at[2].multiply(1e6).at[5].set(jnp.nan),
  ],
  ids=['clean', '1e3', '1e6', '-1e15', 'inf', 'nan', 'mixed'],
)
def test_honest_distances_survive_outliers(spoil):
  deltas = _close_rows()
  spoiled = jax.tree.map(spoil, deltas)
  got = np.asarray(tree.pairwise_sq_dists(spoiled))
  # Differences are exact to a rounding of the rows, 1e-4 of the spread; the
  # distances add 300 such errors of random sign.
  np.testing.assert_allclose(
    got[HONEST], _true_dists(deltas)[HONEST], rtol=1e-4
  )
  assert (got >= 0).all()
  np.testing.assert_array_equal(got, got.T)
  np.testing.assert_array_equal(np.diagonal(got)[HONEST[0].ravel()], 0.0)


def test_rows_centered_on_the_mean_would_lose_the_honest_distances():
  deltas = jax.tree.map(lambda x: x.at[BAD].multiply(1e6), _close_rows())
  flat = jnp.concatenate(
    [x.reshape(9, -1) for x in jax.tree.leaves(deltas)], axis=1
  )
  centered = flat - flat.mean(axis=0)
  gram = centered @ centered.T
  squares = jnp.diagonal(gram)
  got = np.asarray(squares[:, None] + squares[None, :] - 2 * gram)
  errors = np.abs(got - _true_dists(_close_rows()))[HONEST]
  assert errors.max() > _true_dists(_close_rows())[HONEST].max()


def test_bad_rows_are_infinitely_far():
  deltas = _close_rows()
  deltas['b'] = deltas['b'].at[5, 7].set(jnp.nan)
  got = np.asarray(tree.pairwise_sq_dists(deltas))
  assert np.isinf(got[5]).all()
  assert np.isinf(got[:, 5]).all()
  assert np.isfinite(np.delete(np.delete(got, 5, 0), 5, 1)).all()


def test_rows_whose_distance_overflows_count_as_infinitely_far():
  deltas = jax.tree.map(lambda x: x.at[5].set(1e30), _close_rows())
  got = np.asarray(tree.pairwise_sq_dists(deltas))
  assert np.isinf(got[5]).all()
  assert np.isfinite(np.delete(np.delete(got, 5, 0), 5, 1)).all()


def test_most_rows_bad_gives_no_nan():
  deltas = jax.tree.map(lambda x: x.at[:6].set(jnp.nan), _close_rows())
  got = np.asarray(tree.pairwise_sq_dists(deltas))
  assert not np.isnan(got).any()
  np.testing.assert_allclose(
    got[6:, 6:], _true_dists(_close_rows())[6:, 6:], rtol=0.1, atol=1e-4
  )


@pytest.mark.parametrize('columns', [1, 16_384, 40_000])
def test_tiles_and_whole_leaves_give_the_same_products(columns):
  leaf = jax.random.normal(jax.random.key(0), (4, columns))
  point = jnp.ones(columns)
  want = np.float64(leaf - 1) @ np.float64(leaf - 1).T
  for products in (tree._tiled_products, tree._whole_products):
    np.testing.assert_allclose(
      products(leaf, point), want, rtol=1e-5, atol=1e-5 * columns**0.5
    )


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
