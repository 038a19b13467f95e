"""SignGuard and AlignIns against slow definitions written from their papers."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators
from fedjax_safety.aggregators import _clusters, _top

KEY = jax.random.key(5)
# Sums of a dozen float32 numbers of size 1.
TOLERANCE = 5e-6
# What the rule takes for rounding between features.
SLACK = 1e-6
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
seeds = strategies.integers(0, 999)
KINDS = ('honest', 'flipped', 'huge', 'tiny', 'nonfinite', 'sparse')


def make_rows(seed, kind='honest', cohort_size=9, scale=1.0):
  """Returns [C, 40] float32 rows of some kind."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 40)) + 0.4
  if kind == 'flipped':
    rows[:3] = -2 - rng.random((3, 40))
  if kind == 'huge':
    rows[1] *= 1e4
  if kind == 'tiny':
    rows[2] *= 1e-3
  if kind == 'nonfinite':
    rows[[0, 4], 2] = np.nan, np.inf
  if kind == 'sparse':
    rows[np.abs(rows) < 0.8] = 0
  return (scale * rows).astype(np.float32)


def finite_only(rows):
  rows = np.asarray(rows, np.float64)
  return rows[np.isfinite(rows).all(axis=1)]


def clipped_mean(rows, kept, bound):
  clipped = [rows[i] * min(1.0, bound / np.linalg.norm(rows[i])) for i in kept]
  return np.mean(clipped, axis=0)


def slow_mean_shift(points):
  """Returns the largest cluster: flat kernel, every point a start."""
  n = len(points)
  dists = np.linalg.norm(points[:, None] - points[None], axis=2)
  bandwidth = np.mean([sorted(row)[max(n // 2, 1) - 1] for row in dists])
  modes = []
  for start in points:
    mode = start
    for _ in range(300):
      near = np.linalg.norm(points - mode, axis=1) <= bandwidth + SLACK
      old, mode = mode, points[near].mean(axis=0)
      if np.linalg.norm(mode - old) <= 1e-3 * bandwidth:
        break
    modes.append((near.sum(), mode))
  distinct = []
  for _, mode in sorted(modes, key=lambda m: -m[0]):
    gaps = [np.linalg.norm(mode - other) for other in distinct]
    if not gaps or min(gaps) > bandwidth + SLACK:
      distinct.append(mode)
  clusters = [[] for _ in distinct]
  for i, point in enumerate(points):
    gaps = [np.linalg.norm(point - mode) for mode in distinct]
    if min(gaps) <= bandwidth + SLACK:
      clusters[int(np.argmax(gaps <= min(gaps) + SLACK))].append(i)
  return max(clusters, key=len)


def slow_signguard(rows):
  """The rule with all coordinates in the sample."""
  rows = finite_only(rows)
  norms = np.linalg.norm(rows, axis=1)
  middle = np.median(norms)
  common = [i for i, n in enumerate(norms) if 0.1 * middle < n < 3 * middle]
  shares = np.array(
    [[np.mean(r > 0), np.mean(r == 0), np.mean(r < 0)] for r in rows]
  )
  alike = slow_mean_shift(shares / (shares.max(axis=0) + 1e-8))
  both = [i for i in common if i in alike]
  return clipped_mean(rows, both or common, middle)


def _median_scores(values):
  values = np.array(values)
  spread = max(values.std(), 1e-6)
  return np.abs(values - np.median(values)) / spread


def slow_alignins(rows, model, most):
  rows = finite_only(rows)
  majority = np.sign(np.sign(rows).sum(axis=0))
  count = int(0.3 * rows.shape[1])
  angles, shares = [], []
  for row in rows:
    length = np.linalg.norm(row) * np.linalg.norm(model)
    angles.append(row @ model / length if length else 0.0)
    top = np.argsort(-np.abs(row), kind='stable')[:count]
    shares.append(np.mean(np.sign(row[top]) == majority[top]))
  scores = np.maximum(_median_scores(angles), _median_scores(shares))
  kept = np.flatnonzero(scores < most)
  if not len(kept):
    return np.zeros(rows.shape[1])
  norms = sorted(np.linalg.norm(rows[kept], axis=1))
  return clipped_mean(rows, kept, norms[(len(kept) - 1) // 2])


@jax.jit
def _largest_mode(points):
  return _clusters.largest_mode(points, jnp.ones(len(points), bool))


@few
@hypothesis.given(seed=seeds, size=strategies.sampled_from([1, 2, 7, 10]))
def test_mean_shift_matches_its_definition(seed, size):
  rng = np.random.default_rng(seed)
  points = rng.random((size, 3)).astype(np.float32)
  points[: size // 3] = points[-1]
  got = _largest_mode(points)
  want = slow_mean_shift(points.astype(np.float64))
  assert list(np.flatnonzero(got)) == want


@jax.jit
def _signguard(rows):
  return aggregators.signguard(rows, sample_fraction=1.0, key=KEY)


@few
@hypothesis.given(
  seed=seeds,
  kind=strategies.sampled_from(KINDS),
  cohort_size=strategies.sampled_from([8, 9]),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
)
# A row as near to one cluster as to another.
@hypothesis.example(seed=145, kind='honest', cohort_size=8, scale=1.0)
def test_signguard_matches_its_definition(seed, kind, cohort_size, scale):
  rows = make_rows(seed, kind, cohort_size, scale)
  got = _signguard(rows)
  want = slow_signguard(rows)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * scale)


def test_signguard_samples_a_run_of_coordinates_across_leaves():
  rows = np.ones((5, 10), np.float32)
  rows[:2, 5:] = -1
  leaves = {'a': rows[:, :4].reshape(5, 2, 2), 'b': rows[:, 4:]}
  rule = aggregators.build('signguard', cohort_size=5, sample_fraction=0.2)
  update = jax.jit(rule.update)
  kept = {
    tuple(
      np.asarray(
        update(
          leaves, (), weights=None, key=jax.random.key(seed)
        ).client_weights
        > 0
      )
    )
    for seed in range(20)
  }
  # A run of two among the first five tells nobody apart; others tell two.
  assert kept == {(True,) * 5, (False, False, True, True, True)}


def test_largest_magnitudes_are_found_exactly():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((4, 30)).astype(np.float32)
  rows[1] = np.round(rows[1])
  rows[2] = 0
  rows[3] *= 1e-42  # subnormal
  leaves = [jnp.asarray(rows[:, :18]), jnp.asarray(rows[:, 18:])]
  leaves[0] = leaves[0].reshape(4, 3, 6)
  for count in (1, 7, 30):
    want = np.sort(np.abs(rows), axis=1)[:, ::-1][:, count - 1]
    got = np.asarray(_top.cutoffs(leaves, count)).view(np.float32)
    np.testing.assert_array_equal(got[:3], want[:3])
    # Subnormal numbers may be flushed to 0, as everywhere in XLA.
    assert got[3] in (0, want[3])


@jax.jit
def _alignins(rows, model, most):
  rule = aggregators.build(
    'alignins',
    cohort_size=len(rows),
    max_angle_score=most,
    max_sign_score=most,
    variant='paper',
  )
  return rule.update(rows, rule.init(model), weights=None, key=None).delta


@few
@hypothesis.given(
  seed=seeds,
  kind=strategies.sampled_from(KINDS),
  cohort_size=strategies.sampled_from([8, 9]),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  most=strategies.sampled_from([0.7, 1.0, 1.7, 3.0]),
)
def test_alignins_matches_its_definition(seed, kind, cohort_size, scale, most):
  rows = make_rows(seed, kind, cohort_size, scale)
  model = np.random.default_rng(seed + 1).standard_normal(40) + 0.2
  got = _alignins(rows, jnp.asarray(model, jnp.float32), most)
  np.testing.assert_allclose(
    got, slow_alignins(rows, model, most), rtol=0, atol=TOLERANCE * scale
  )


@pytest.mark.parametrize('variant', ['movement', 'paper'])
def test_alignins_follows_the_model(variant):
  rule = aggregators.build('alignins', cohort_size=9, variant=variant)
  start = np.random.default_rng(9).standard_normal(40).astype(np.float32)
  model = start.astype(np.float64) if variant == 'paper' else np.zeros(40)
  state, update = rule.init(jnp.asarray(start)), jax.jit(rule.update)
  for seed in range(4):
    rows = make_rows(seed)
    output = update(rows, state, weights=None, key=None)
    want = slow_alignins(rows, model, 1.0)
    np.testing.assert_allclose(output.delta, want, rtol=0, atol=TOLERANCE)
    state, model = output.state, model + want


def test_tied_coordinates_count_in_part():
  # Twelve of forty are the largest; all tie, and half of a row's agree.
  rows = np.ones((5, 40), np.float32)
  rows[0, ::2] = -1
  leaves = [jnp.asarray(rows)]
  shares = aggregators._signs._majority_shares(leaves, jnp.ones(5, bool), 0.3)
  np.testing.assert_allclose(shares, [0.5, 1, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('signguard', {'sample_fraction': 0.0}, 'sample_fraction=0.0'),
    ('signguard', {'min_norm': 1.5}, 'min_norm=1.5'),
    ('signguard', {'max_norm': 0.5}, 'max_norm=0.5'),
    ('alignins', {'top_fraction': 1.5}, 'top_fraction=1.5'),
    ('alignins', {'max_sign_score': 0.0}, 'max_sign_score=0.0'),
    ('alignins', {'variant': 'mean'}, 'known: movement, paper'),
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    aggregators.build(name, cohort_size=5, **kwargs)
  with pytest.raises(ValueError, match='cohort_size=2'):
    aggregators.build('alignins', cohort_size=2)
