"""Preaggregators against slow definitions, and what a chain makes of them."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_safety import aggregators, tree

# Norms of a few float32 numbers of size 1, and one product.
TOLERANCE = 3e-6
few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)


def _rows(seed, cohort_size, scale=1.0, bad=0):
  """Returns [C, 6] float32 rows, one of them far, the first ones spoiled."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((cohort_size, 6)) + 0.4
  rows[4] = rows[3]
  rows[5] = -1e5
  rows *= scale
  rows[:bad, 3] = [np.nan, np.inf][:bad]
  return rows.astype(np.float32)


def slow_mixing(rows, num_byzantine):
  rows = np.asarray(rows, np.float64)
  finite = np.isfinite(rows).all(axis=1)
  mixed = rows.copy()
  for i in np.flatnonzero(finite):
    dists = np.sum((rows - rows[i]) ** 2, axis=1)
    dists[~finite], dists[i] = np.inf, -1.0
    nearest = np.argsort(dists, kind='stable')[: len(rows) - num_byzantine]
    mixed[i] = rows[[j for j in nearest if finite[j]]].mean(axis=0)
  return mixed


def slow_static_clipping(rows, max_norm):
  clipped = []
  for row in np.asarray(rows, np.float64):
    norm = np.sqrt(np.sum(row**2))
    is_long = np.isfinite(norm) and norm > max_norm
    clipped.append(row * (max_norm / norm) if is_long else row)
  return np.array(clipped)


def slow_adaptive_clipping(rows, num_byzantine):
  rows = np.asarray(rows, np.float64)
  n, f = len(rows), num_byzantine
  norms = np.sqrt(np.sum(rows**2, axis=1))
  norms = np.where(np.isfinite(norms), norms, np.inf)
  count = int(np.floor(2 * (f / n) * (n - f) + 1e-9))
  return slow_static_clipping(rows, np.sort(norms)[::-1][count])


@jax.jit
def _static(rows, max_norm):
  return aggregators.static_clipping(rows, max_norm=max_norm)


@functools.partial(jax.jit, static_argnames='num_byzantine')
def _adaptive(rows, num_byzantine):
  return aggregators.adaptive_clipping(rows, num_byzantine=num_byzantine)


@functools.partial(jax.jit, static_argnames='num_byzantine')
def _mixed(rows, num_byzantine):
  return aggregators.nearest_neighbor_mixing(rows, num_byzantine=num_byzantine)


def _check_rows(got, want, rows, scale):
  """Compares rows; those that are not finite must be so still."""
  finite = np.isfinite(rows).all(axis=1)
  assert not np.isfinite(np.asarray(got)[~finite]).all(axis=1).any()
  np.testing.assert_allclose(
    np.asarray(got)[finite],
    want[finite],
    rtol=TOLERANCE,
    atol=TOLERANCE * scale,
  )


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  num_byzantine=strategies.sampled_from([0, 2, 3]),
  scale=strategies.sampled_from([2.0**-26, 1.0, 2.0**26]),
  bad=strategies.integers(0, 2),
  ties=strategies.booleans(),
)
def test_mixing_matches_its_definition(seed, num_byzantine, scale, bad, ties):
  rows = _rows(seed, 8, bad=min(bad, num_byzantine))
  # The neighbors of a row at 1e5 are all as far, to float32.
  rows[5] *= np.float32(1e-4)
  # Distances of small whole numbers are exact, and many of them equal.
  rows = scale * (np.round(rows) if ties else rows)
  want = slow_mixing(rows, num_byzantine)
  _check_rows(_mixed(rows, num_byzantine), want, rows, scale)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
  max_norm=strategies.sampled_from([1e-2, 2.0, 1e3]),
)
def test_static_clipping_matches_its_definition(seed, scale, bad, max_norm):
  rows, max_norm = _rows(seed, 8, scale, bad), max_norm * scale
  want = slow_static_clipping(rows, max_norm)
  _check_rows(_static(rows, max_norm), want, rows, scale)


@few
@hypothesis.given(
  seed=strategies.integers(0, 999),
  num_byzantine=strategies.sampled_from([0, 2, 3]),
  scale=strategies.sampled_from([1e-8, 1.0, 1e8]),
  bad=strategies.integers(0, 2),
)
def test_adaptive_clipping_matches_its_definition(
  seed, num_byzantine, scale, bad
):
  rows = _rows(seed, 8, scale, min(bad, num_byzantine))
  want = slow_adaptive_clipping(rows, num_byzantine)
  _check_rows(_adaptive(rows, num_byzantine), want, rows, scale)


def test_short_rows_stay_bit_by_bit_and_the_callers_array_stays_whole():
  rows = _rows(0, 8)
  before = rows.copy()
  for clipped in (_static(rows, 4.0), _adaptive(rows, 2)):
    same = (np.asarray(clipped) == before).all(axis=1)
    assert not same[5]
    assert same.sum() >= 4
    np.testing.assert_array_equal(rows, before)


def test_clipping_keeps_zeros_and_a_bound_that_is_met_exactly():
  rows = np.zeros((5, 6), np.float32)
  rows[2, 1] = 2.0
  np.testing.assert_array_equal(_static(rows, 2.0), rows)
  np.testing.assert_array_equal(_adaptive(rows, 2), 0 * rows)


@pytest.mark.parametrize(
  ('cohort_size', 'bucket_size'), [(8, 3), (9, 3), (7, 7)]
)
def test_buckets_hold_every_row_once(cohort_size, bucket_size):
  # Row c is the unit vector c: a mean shows who is in its bucket.
  means = aggregators.bucketing(
    jnp.eye(cohort_size), bucket_size=bucket_size, key=jax.random.key(1)
  )
  sizes = [int((row > 0).sum()) for row in means]
  short = cohort_size % bucket_size or bucket_size
  full = -(-cohort_size // bucket_size) - 1
  assert sizes == [bucket_size] * full + [short]
  np.testing.assert_array_equal((means > 0).sum(axis=0), 1)
  np.testing.assert_allclose(means.sum(axis=1), 1.0, rtol=1e-6)


def test_buckets_are_drawn_by_the_key():
  @jax.jit
  def members(seed):
    return aggregators.bucketing(
      jnp.eye(8), bucket_size=2, key=jax.random.key(seed)
    )

  np.testing.assert_array_equal(members(0), members(0))
  # Some programs never shuffle: the same neighbors under every key.
  assert len({np.asarray(members(seed)).tobytes() for seed in range(5)}) == 5
  with pytest.raises(ValueError, match="bucketing needs 'key'"):
    aggregators.bucketing(jnp.eye(8), bucket_size=2)


def test_rows_in_buckets_of_s_are_s_times_closer():
  rows = np.random.default_rng(0).standard_normal((12, 30))

  def mean_square(rows):
    return jnp.mean(jnp.sum((rows - rows.mean(axis=0)) ** 2, axis=1))

  @jax.jit
  @jax.vmap
  def after(seed):
    key = jax.random.key(seed)
    return mean_square(
      aggregators.bucketing(jnp.float32(rows), bucket_size=3, key=key)
    )

  # Drawn without replacement, means of s of C are a little closer still.
  ratios = np.asarray(after(jnp.arange(600))) / float(mean_square(rows))
  expected = (12 - 3) / (12 - 1) / 3
  error = ratios.std() / np.sqrt(ratios.size)
  assert abs(ratios.mean() - expected) < 5 * error < 0.01
  assert expected < 1 / 3


def test_a_bad_row_spoils_its_bucket_and_no_other():
  rows = _rows(0, 8, bad=1)
  means = np.asarray(
    aggregators.bucketing(rows, bucket_size=2, key=jax.random.key(3))
  )
  assert np.isfinite(means).all(axis=1).sum() == 3


def test_one_row_buckets_only_permute():
  rows = _rows(0, 8)
  got = aggregators.bucketing(rows, bucket_size=1, key=jax.random.key(0))
  np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(rows, axis=0))


def test_the_rule_after_buckets_must_bear_their_number():
  steps = [{'name': 'bucketing', 'bucket_size': 3}]
  with pytest.raises(ValueError, match='got 4'):
    aggregators.build(
      'krum', cohort_size=12, num_byzantine=1, preaggregators=steps
    )
  aggregator = aggregators.build(
    'krum', cohort_size=15, num_byzantine=1, preaggregators=steps
  )
  output = jax.jit(aggregator.update)(
    _rows(0, 15), (), weights=None, key=jax.random.key(0)
  )
  np.testing.assert_allclose(
    np.sort(output.client_weights)[-4:], [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-6
  )


@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [
    ('caf', {'num_byzantine': 2}),
    ('bulyan', {'num_byzantine': 1}),
    ('centered_clipping', {'clip_norm': 2.0}),
    ('geometric_median', {}),
  ],
)
@pytest.mark.parametrize('bad', [0, 1])
def test_a_chain_equals_one_step_after_the_other(name, kwargs, bad):
  rows = jnp.asarray(_rows(2, 9, bad=bad))
  clip = aggregators.adaptive_clipping(num_byzantine=2)
  mix = aggregators.nearest_neighbor_mixing(num_byzantine=2)
  rule = functools.partial(getattr(aggregators, name), **kwargs)
  clipped = aggregators.adaptive_clipping(rows, num_byzantine=2)
  mixed = aggregators.nearest_neighbor_mixing(clipped, num_byzantine=2)
  np.testing.assert_allclose(
    jax.jit(aggregators.chain(clip, mix, rule))(rows),
    jax.jit(rule)(mixed),
    rtol=0,
    # Weiszfeld's points and eigenvectors move a little with each rounding.
    atol=2e-5,
  )


@pytest.mark.parametrize(
  ('rule', 'combined'),
  [
    (aggregators.krum(num_byzantine=1), 'mix'),
    (aggregators.median(), 'mix_rows'),
  ],
)
def test_a_chain_of_any_length_reads_the_rows_twice(
  monkeypatch, rule, combined
):
  calls = {'centered_products': 0, 'mix': 0, 'mix_rows': 0}
  for name in calls:

    def count(*args, name=name, function=getattr(tree, name), **kwargs):
      calls[name] += 1
      return function(*args, **kwargs)

    monkeypatch.setattr(tree, name, count)
  steps = [
    aggregators.static_clipping(max_norm=3.0),
    aggregators.adaptive_clipping(num_byzantine=1),
    aggregators.bucketing(bucket_size=2),
    aggregators.nearest_neighbor_mixing(num_byzantine=1),
  ]
  # Traced, not run: on 16 rows, eight buckets.
  jax.eval_shape(
    lambda rows, key: aggregators.chain(*steps, rule)(rows, key=key),
    jax.ShapeDtypeStruct((16, 6), jnp.float32),
    jax.random.key(0),
  )
  assert calls['centered_products'] == calls[combined] == 1
  # Rows are made only for a rule that looks at their coordinates.
  assert calls['mix_rows'] == (combined == 'mix_rows')


def test_rows_equal_after_mixing_have_distance_zero():
  # Seven equal rows and two far ones: all means of seven are that row.
  rows = np.full((9, 6), 0.1, np.float32)
  rows[[2, 6]] = 1e6
  for name in ('mda', 'smea', 'caf', 'krum', 'geometric_median'):
    kwargs = {} if name == 'geometric_median' else {'num_byzantine': 2}
    rule = aggregators.chain(
      aggregators.nearest_neighbor_mixing(num_byzantine=2),
      functools.partial(getattr(aggregators, name), **kwargs),
    )
    got = jax.jit(rule)(rows)
    # As far as the smoothing of the geometric median, 1e-6, lets rows pull.
    np.testing.assert_allclose(got, 0.1, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    ({'name': 'static_clipping', 'max_norm': 0.0}, 'max_norm=0.0'),
    ({'name': 'adaptive_clipping', 'num_byzantine': 4}, r'2\*f\+1 = 9'),
    ({'name': 'bucketing', 'bucket_size': 9}, r'must lie in \[1, 8\]'),
    ({'name': 'bucketng', 'bucket_size': 2}, "did you mean 'bucketing'"),
  ],
)
def test_build_refuses(step, message):
  with pytest.raises(ValueError, match=message):
    aggregators.build('mean', cohort_size=8, preaggregators=[step])
