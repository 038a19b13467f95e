"""FLAME, clipped clustering and their clusters against slow definitions."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators
from fedjax_safety.aggregators import _clusters

KEY = jax.random.key(3)
# Sums of a dozen float32 numbers of size 1.
TOLERANCE = 5e-6
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
seeds = strategies.integers(0, 999)


def make_rows(seed, kind='honest', cohort_size=9, scale=1.0):
  """Returns [C, 13] float32 rows of some kind."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 13)) + 0.7
  if kind == 'opposed':
    rows[:3] = -5 + 0.1 * rng.standard_normal((3, 13))
  if kind == 'huge':
    rows[1] *= 1e6
  if kind == 'nonfinite':
    rows[[0, 4], 2] = np.nan, np.inf
  if kind == 'duplicates':
    rows[[2, 3, 4]] = rows[1]
  return (scale * rows).astype(np.float32)


KINDS = ('honest', 'opposed', 'huge', 'nonfinite', 'duplicates')


def finite_only(rows):
  rows = np.asarray(rows, np.float64)
  return rows[np.isfinite(rows).all(axis=1)]


def cosine_dists(rows):
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  dists = 1 - unit @ unit.T
  np.fill_diagonal(dists, 0.0)
  return np.maximum(dists, 0.0)


def clip(row, bound):
  return row * min(1.0, bound / np.linalg.norm(row))


def _dendrogram(dists):
  """Returns single linkage's merges as nested (distance, left, right)."""
  n = len(dists)
  trees = {i: (0.0, i) for i in range(n)}
  members = {i: {i} for i in range(n)}
  edges = sorted((dists[i, j], i, j) for i in range(n) for j in range(i))
  for dist, i, j in edges:
    a = next(k for k, m in members.items() if i in m)
    b = next(k for k, m in members.items() if j in m)
    if a != b:
      trees[a] = (dist, trees[a], trees[b])
      members[a] |= members.pop(b)
      trees.pop(b)
  (tree,) = trees.values()
  return tree


def _points(tree):
  if len(tree) == 2:
    return [tree[1]]
  return _points(tree[1]) + _points(tree[2])


def slow_hdbscan(dists, least):
  """Labels of HDBSCAN where the root is the only cluster there can be.

  Walks down the dendrogram and notes the density at which each point falls
  out of the root; those of the greatest are the cluster.
  """
  densities = {}

  def fall(tree, density):
    for point in _points(tree):
      densities[point] = density

  def walk(tree):
    dist, left, right = tree
    density = np.inf if dist == 0 else 1 / dist
    large = [t for t in (left, right) if len(_points(t)) >= least]
    for child in (left, right):
      if child not in large:
        fall(child, density)
    for child in large:
      if len(child) == 2:
        fall(child, density)
      else:
        walk(child)

  walk(_dendrogram(dists))
  top = max(densities.values())
  return sorted(point for point, d in densities.items() if d >= top)


def slow_two_clusters(dists):
  """Average linkage from its definition: means over all pairs."""
  clusters = [[i] for i in range(len(dists))]
  while len(clusters) > 2:
    pairs = [
      (np.mean([dists[i, j] for i in a for j in b]), a, b)
      for n, a in enumerate(clusters)
      for b in clusters[n + 1 :]
    ]
    _, a, b = min(pairs, key=lambda pair: pair[0])
    clusters = [c for c in clusters if c not in (a, b)] + [sorted(a + b)]
    clusters.sort()
  return max(clusters, key=len)


def slow_flame(rows):
  least = len(rows) // 2 + 1
  rows = finite_only(rows)
  kept = slow_hdbscan(cosine_dists(rows), least)
  bound = np.median(np.linalg.norm(rows, axis=1))
  return np.mean([clip(rows[i], bound) for i in kept], axis=0)


def slow_clipped_clustering(rounds):
  """Returns the delta of every round; all norms are remembered."""
  norms, deltas = [], []
  for rows in rounds:
    rows = finite_only(rows)
    norms.extend(np.linalg.norm(rows, axis=1))
    kept = slow_two_clusters(cosine_dists(rows))
    bound = np.median(norms)
    deltas.append(np.mean([clip(rows[i], bound) for i in kept], axis=0))
  return deltas


def _integer_dists(seed, size, most):
  rng = np.random.default_rng(seed)
  dists = np.triu(rng.integers(0, most, (size, size)), 1)
  return (dists + dists.T).astype(np.float32)


@functools.cache
def _compiled(name, **static):
  """Compiles a clustering once for each shape."""
  return jax.jit(functools.partial(getattr(_clusters, name), **static))


@few
@hypothesis.given(seed=seeds, size=strategies.sampled_from([2, 5, 8]))
def test_the_tightest_majority_is_what_hdbscan_finds(seed, size):
  dists = _integer_dists(seed, size, most=6)  # many ties, and zeros
  least = size // 2 + 1
  cluster = _compiled('smallest_of_size', size=least)
  got = cluster(jnp.asarray(dists), jnp.ones(size, bool))
  assert list(np.flatnonzero(got)) == slow_hdbscan(dists, least)


def test_too_few_finite_rows_are_all_kept():
  dists = np.full((5, 5), np.inf, np.float32)
  dists[:2, :2] = [[0, 1], [1, 0]]
  finite = np.arange(5) < 2
  got = _clusters.smallest_of_size(jnp.asarray(dists), jnp.asarray(finite), 3)
  np.testing.assert_array_equal(got, finite)


@few
@hypothesis.given(seed=seeds, size=strategies.sampled_from([3, 6, 9]))
def test_average_linkage_matches_its_definition(seed, size):
  rng = np.random.default_rng(seed)
  dists = np.triu(rng.random((size, size)), 1).astype(np.float32)
  dists += dists.T
  got = _compiled('larger_of_two')(jnp.asarray(dists), jnp.ones(size, bool))
  assert list(np.flatnonzero(got)) == slow_two_clusters(dists)


def test_average_linkage_breaks_ties_by_the_lowest_row():
  dists = jnp.asarray(1.0 - np.eye(4, dtype=np.float32))
  got = _compiled('larger_of_two')(dists, jnp.ones(4, bool))
  # 0 and 1 merge, then 2 joins them.
  np.testing.assert_array_equal(got, [True, True, True, False])
  apart = jnp.asarray([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]])
  got = _compiled('larger_of_two')(apart.astype(jnp.float32), jnp.ones(4, bool))
  np.testing.assert_array_equal(got, [True, True, False, False])


@functools.cache
def _flame(cohort_size, noise):
  rule = functools.partial(aggregators.flame, noise_multiplier=noise)
  return jax.jit(lambda rows, key=KEY: rule(rows, key=key))


@few
@hypothesis.given(
  seed=seeds,
  kind=strategies.sampled_from(KINDS),
  cohort_size=strategies.sampled_from([8, 9]),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
)
def test_flame_matches_its_definition(seed, kind, cohort_size, scale):
  rows = make_rows(seed, kind, cohort_size, scale)
  np.testing.assert_allclose(
    _flame(cohort_size, 0.0)(rows),
    slow_flame(rows),
    rtol=0,
    atol=TOLERANCE * scale,
  )


def test_flame_clips_to_the_median_of_all_norms():
  rows = make_rows(0, 'opposed')
  want = slow_flame(rows)
  np.testing.assert_allclose(_flame(9, 0.0)(rows), want, atol=TOLERANCE)
  # The known defect: the median of the rows kept alone.
  kept = slow_hdbscan(cosine_dists(rows), 5)
  assert set(kept) <= set(range(3, 9))
  bound = np.median(np.linalg.norm(rows[kept], axis=1))
  defective = np.mean([clip(rows[i], bound) for i in kept], axis=0)
  assert np.abs(defective - want).max() > 100 * TOLERANCE


def test_flame_adds_noise_of_the_promised_size():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((5, 20_000)).astype(np.float32) + 1
  clean, noisy = _flame(5, 0.0)(rows), _flame(5, 0.01)(rows)
  deviation = 0.01 * np.median(np.linalg.norm(rows, axis=1))
  noise = np.asarray(noisy - clean) / deviation
  # The standard errors of 20,000 samples are 0.7 % and 0.5 %.
  assert abs(noise.mean()) < 0.03
  assert abs(noise.std() - 1) < 0.02
  again = _flame(5, 0.01)(rows, jax.random.key(4))
  assert np.abs(again - noisy).max() > deviation


def test_flame_accepts_a_traced_noise_multiplier():
  rows = make_rows(0)
  swept = jax.jit(
    lambda x: aggregators.flame(rows, key=KEY, noise_multiplier=x)
  )
  np.testing.assert_allclose(swept(0.0), _flame(9, 0.0)(rows), atol=TOLERANCE)


@pytest.mark.parametrize('kind', KINDS)
def test_clipped_clustering_matches_its_definition(kind):
  rounds = [make_rows(seed, kind, scale=1 + seed) for seed in range(5)]
  rule = aggregators.build('clipped_clustering', cohort_size=9)
  state, update = rule.init(jnp.zeros(13)), jax.jit(rule.update)
  for rows, want in zip(rounds, slow_clipped_clustering(rounds), strict=True):
    output = update(rows, state, weights=None, key=None)
    state = output.state
    np.testing.assert_allclose(output.delta, want, rtol=0, atol=5 * TOLERANCE)
  assert int(state.num_rounds) == 5


def test_clipped_clustering_forgets_old_rounds():
  rule = aggregators.build('clipped_clustering', cohort_size=9, num_rounds=2)
  state, update = rule.init(jnp.zeros(13)), jax.jit(rule.update)
  rounds = [make_rows(seed, scale=10.0 - seed) for seed in range(4)]
  for rows in rounds:
    output = update(rows, state, weights=None, key=None)
    state = output.state
  late = slow_clipped_clustering(rounds[2:])[-1]
  np.testing.assert_allclose(output.delta, late, rtol=0, atol=10 * TOLERANCE)
  early = slow_clipped_clustering(rounds)[-1]
  assert np.abs(output.delta - early).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('flame', {'noise_multiplier': -1.0}, 'noise_multiplier=-1.0'),
    ('clipped_clustering', {'num_rounds': 0}, 'num_rounds=0'),
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    aggregators.build(name, cohort_size=5, **kwargs)
  with pytest.raises(ValueError, match='cohort_size=2'):
    aggregators.build('clipped_clustering', cohort_size=2)
