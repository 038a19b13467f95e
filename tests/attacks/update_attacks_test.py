"""Update attacks: what they write, and what they must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

KEY = jax.random.key(3)
MASK = jnp.array([False, True, False, False, True])
KWARGS = {
  'gaussian': {'mean': 0.5, 'std': 2.0},
  'non_finite': {'value': 'inf'},
  'none': {},
  'sign_flip': {'scale': 3.0},
}


def _deltas(dtype=jnp.float32) -> dict:
  return {
    'a': jax.random.normal(jax.random.key(0), (5, 3, 4), dtype),
    'b': jax.random.normal(jax.random.key(1), (5, 7), dtype),
  }


def _bits(rows) -> np.ndarray:
  return np.ascontiguousarray(np.asarray(rows)).view(np.uint8)


def test_table_covers_the_registry():
  assert set(KWARGS) == set(attacks.names())


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', KWARGS)
def test_honest_rows_are_bit_identical(name, dtype):
  deltas = _deltas(dtype)
  attacked = jax.jit(attacks.build(name, **KWARGS[name]))(deltas, MASK, KEY)
  for leaf in deltas:
    assert attacked[leaf].dtype == dtype
    assert attacked[leaf].shape == deltas[leaf].shape
    np.testing.assert_array_equal(
      _bits(attacked[leaf][~MASK]), _bits(deltas[leaf][~MASK])
    )


@pytest.mark.parametrize('name', sorted(set(KWARGS) - {'none'}))
def test_malicious_rows_change(name):
  deltas = _deltas()
  attacked = attacks.build(name, **KWARGS[name])(deltas, MASK, KEY)
  for leaf in deltas:
    changed = attacked[leaf][MASK] != deltas[leaf][MASK]
    assert bool(changed.all())


@pytest.mark.parametrize('name', KWARGS)
def test_jit_equals_no_jit(name):
  attack = attacks.build(name, **KWARGS[name])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
    jax.jit(attack)(_deltas(), MASK, KEY),
    attack(_deltas(), MASK, KEY),
  )


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
  ],
)
def test_build_refuses(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    attacks.build(name, **kwargs)
