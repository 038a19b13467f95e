"""Tests of the private means: clipping, noise, and the norm that adapts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators

C = 4


def _deltas(size=6):
  rng = np.random.default_rng(0)
  return {
    'a': jnp.asarray(rng.normal(0, 1, (C, size)), jnp.float32),
    'b': jnp.asarray(rng.normal(0, 1, (C, 2, size)), jnp.float32),
  }


def _flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).reshape(C, -1) for x in tree.values()], axis=1
  )


def _clipped_mean(rows, clip_norm):
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return np.mean(rows * np.minimum(1, clip_norm / norms), axis=0)


def _one(delta):
  return np.concatenate([np.ravel(x) for x in delta.values()])


@pytest.mark.parametrize('clip_norm', [0.5, 4.0, 100.0])
def test_without_noise_it_is_the_mean_of_clipped_rows(clip_norm):
  got = aggregators.dp_mean(
    _deltas(),
    key=jax.random.key(0),
    clip_norm=clip_norm,
    noise_multiplier=0.0,
  )
  expected = _clipped_mean(_flat(_deltas()), clip_norm)
  np.testing.assert_allclose(_one(got), expected, rtol=0, atol=1e-6)


def test_one_row_moves_the_delta_by_the_norm_over_c():
  deltas = _deltas()
  moved = jax.tree.map(lambda x: x.at[1].set(-1e6 * x[1]), deltas)
  kwargs = {'clip_norm': 0.5, 'noise_multiplier': 0.0, 'key': jax.random.key(0)}
  change = _one(aggregators.dp_mean(deltas, **kwargs)) - _one(
    aggregators.dp_mean(moved, **kwargs)
  )
  # To the opposite end of the ball: twice the norm.
  assert np.linalg.norm(change) == pytest.approx(2 * 0.5 / C, rel=1e-5)


def test_bad_rows_count_as_zero_in_a_mean_over_all():
  deltas = jnp.array([[3.0], [jnp.nan], [1.0], [jnp.inf]])
  got = aggregators.dp_mean(
    deltas, key=jax.random.key(0), clip_norm=2.0, noise_multiplier=0.0
  )
  np.testing.assert_allclose(got, [(2.0 + 1.0) / 4], rtol=1e-6)


def test_noise_has_its_standard_deviation():
  size = 20_000
  deltas = {'a': jnp.zeros((C, size)), 'b': jnp.zeros((C, 2, size))}
  kwargs = {'clip_norm': 0.5, 'noise_multiplier': 1.5}
  noise = aggregators.dp_mean(deltas, key=jax.random.key(0), **kwargs)
  values = _one(noise)
  deviation = 1.5 * 0.5 / C
  # Of 60 000 draws: both within five standard errors.
  error = 1 / np.sqrt(values.size)
  assert abs(values.mean()) < 5 * error * deviation
  assert values.std() == pytest.approx(deviation, rel=5 * error / np.sqrt(2))
  # Leaves are drawn apart, and a key decides all draws.
  correlation = np.corrcoef(noise['a'], noise['b'][0])[0, 1]
  assert abs(correlation) < 5 / np.sqrt(size)
  again = aggregators.dp_mean(deltas, key=jax.random.key(0), **kwargs)
  np.testing.assert_array_equal(_one(again), values)
  other = aggregators.dp_mean(deltas, key=jax.random.key(1), **kwargs)
  assert not np.any(_one(other) == values)


def test_norm_follows_the_quantile():
  """Three rounds without noise, as Andrew et al. write them."""
  rows = _flat(_deltas())
  aggregator = aggregators.build(
    'dp_mean_adaptive',
    cohort_size=C,
    noise_multiplier=0.0,
    initial_clip_norm=2.0,
    target_quantile=0.7,
    learning_rate=0.9,
  )
  state = aggregator.init(jax.tree.map(lambda x: x[0], _deltas()))
  clip_norm, seen = 2.0, set()
  for round_index in range(4):
    output = aggregator.update(
      _deltas(), state, weights=None, key=jax.random.key(round_index)
    )
    state = output.state
    within = np.mean(np.linalg.norm(rows, axis=1) <= clip_norm)
    seen.add(within)
    np.testing.assert_allclose(output.metrics['clip_norm'], clip_norm, 1e-5)
    np.testing.assert_allclose(
      _one(output.delta), _clipped_mean(rows, clip_norm), rtol=0, atol=1e-6
    )
    clip_norm *= np.exp(-0.9 * (within - 0.7))
  assert len(seen) > 1


def test_sum_and_count_together_spend_one_noise_multiplier():
  size, multiplier, count_noise = 30_000, 1.0, 0.8
  aggregator = aggregators.build(
    'dp_mean_adaptive',
    cohort_size=C,
    noise_multiplier=multiplier,
    initial_clip_norm=0.5,
    count_noise=count_noise,
    learning_rate=1.0,
    target_quantile=1.0,
  )
  update = jax.jit(
    lambda deltas, key: aggregator.update(
      deltas, aggregator.init(None), weights=None, key=key
    )
  )
  noise = update(jnp.zeros((C, size)), jax.random.key(0)).delta
  on_sum = np.std(noise) * C / 0.5
  assert on_sum == pytest.approx(
    (multiplier**-2 - (2 * count_noise) ** -2) ** -0.5,
    rel=5 / np.sqrt(2 * size),
  )
  # All rows are within, so that the norm moves by the count's noise alone.
  keys = jax.random.split(jax.random.key(1), 2_000)
  norms = jax.vmap(lambda key: update(jnp.zeros((C, 1)), key).state)(keys)
  counts = -np.log(np.asarray(norms, np.float64) / 0.5) * C
  assert counts.std() == pytest.approx(count_noise, rel=5 / np.sqrt(2 * 2_000))
  assert abs(counts.mean()) < 5 * count_noise / np.sqrt(2_000)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'words'),
  [
    ('dp_mean', {'clip_norm': 0.0}, 'clip_norm=0.0 must be greater than 0'),
    ('dp_mean', {'noise_multiplier': -1.0}, 'noise_multiplier=-1.0 must be'),
    ('dp_mean_adaptive', {'target_quantile': 1.5}, 'must lie in [0, 1]'),
    ('dp_mean_adaptive', {'initial_clip_norm': 0.0}, 'must be greater than 0'),
    ('dp_mean_adaptive', {'count_noise': 0.5}, 'needs count_noise above half'),
    ('dp_mean_adaptive', {}, 'got 0.2'),
  ],
)
def test_mistakes_are_told(name, kwargs, words):
  with pytest.raises(ValueError) as error:
    aggregators.build(name, cohort_size=C, **kwargs)
  assert words in str(error.value)


@pytest.mark.parametrize('name', ['dp_mean', 'dp_mean_adaptive'])
def test_a_missing_key_is_told(name):
  kwargs = {'noise_multiplier': 0.0}
  with pytest.raises(ValueError, match=f"{name} needs 'key'"):
    getattr(aggregators, name)(jnp.ones((C, 2)), **kwargs)
