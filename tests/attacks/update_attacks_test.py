"""What the plain update attacks write, and what `build` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

KEY = jax.random.key(3)
MASK = jnp.array([False, True, False, False, True])


def _deltas(dtype=jnp.float32) -> dict:
  return {
    'a': jax.random.normal(jax.random.key(0), (5, 3, 4), dtype),
    'b': jax.random.normal(jax.random.key(1), (5, 7), dtype),
  }


def test_sign_flip_scales():
  deltas = _deltas()
  attacked = attacks.sign_flip(deltas, MASK, KEY, scale=3.0)
  np.testing.assert_array_equal(attacked['b'][MASK], -3 * deltas['b'][MASK])


def test_gaussian_has_its_moments_and_depends_on_key_and_row():
  deltas = jnp.zeros((5, 20_000))
  attack = jax.jit(attacks.build('gaussian', mean=0.5, std=2.0))
  noise = attack(deltas, MASK, KEY)[MASK]
  # Standard errors of 20,000 draws: 0.014 and 0.01.
  np.testing.assert_allclose(noise.mean(axis=1), 0.5, atol=0.07)
  np.testing.assert_allclose(noise.std(axis=1), 2.0, atol=0.05)
  assert abs(np.corrcoef(noise)[0, 1]) < 0.05
  other = attack(deltas, MASK, jax.random.key(4))[MASK]
  assert abs(np.corrcoef(noise[0], other[0])[0, 1]) < 0.05


def test_gaussian_noise_of_a_row_does_not_depend_on_the_cohort():
  attack = jax.jit(attacks.gaussian)
  small = attack(jnp.zeros((2, 9)), jnp.ones(2, bool), KEY)
  large = attack(jnp.zeros((6, 9)), jnp.ones(6, bool), KEY)
  np.testing.assert_array_equal(small, large[:2])


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_non_finite_fills_rows_and_the_median_survives(value):
  attacked = attacks.non_finite(_deltas(), MASK, KEY, value=value)
  check = jnp.isnan if value == 'nan' else jnp.isposinf
  assert bool(check(attacked['a'][MASK]).all())
  delta = jax.jit(aggregators.median)(attacked)
  assert bool(jnp.isfinite(delta['a']).all())


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('signflip', {}, r"did you mean 'sign_flip'\?"),
    ('gaussian', {'sd': 1.0}, r"did you mean 'std'\?.*accepted: mean, std"),
    ('gaussian', {'std': -1.0}, 'std=-1.0'),
    ('sign_flip', {'scale': -2.0}, 'scale=-2.0'),
    ('non_finite', {'value': 'zero'}, 'known: inf, nan'),
    ('non_finite', {'coordinates': 'two'}, 'known: all, one'),
    ('scaling', {'factor': 0.0}, 'factor=0.0 must be greater than 0'),
    ('ipm', {'scale': -1.0}, 'scale=-1.0'),
    ('alie', {'ddof': 2}, 'ddof=2'),
    ('mimic', {'target': 'far'}, 'known: farthest, fixed'),
    ('mimic', {'index': 1.5}, 'index=1.5 must be a whole number'),
    ('min_max', {'perturbation': 'stds'}, r"did you mean 'std'\?"),
    ('fang_trimmed_mean', {'spread': 0.5}, 'spread=0.5'),
    ('fang_krum', {'num_byzantine': -1}, 'num_byzantine=-1'),
    ('optimal_ipm', {'num_evaluations': 0}, 'at least 1'),
    ('optimal_ipm', {'first_step': 0.0}, 'first_step=0.0'),
    # The rule comes with each round, not with the config.
    ('optimal_ipm', {'aggregate': 'mean'}, 'accepted: num_evaluations'),
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    attacks.build(name, **kwargs)


def test_none_asks_for_a_computed_default_and_is_refused_elsewhere():
  attacks.build('scaling', factor=None)
  attacks.build('alie', std_factor=None)
  attacks.build('fang_krum', num_byzantine=None)
  with pytest.raises(TypeError):
    attacks.build('ipm', scale=None)
