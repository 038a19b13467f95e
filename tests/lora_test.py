"""Tests of adapters as trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import lora

TARGETS = ('q_proj', 'down_proj')


def _base(dtype=jnp.float32):
  """Returns a two-layer base with two projections, a bias and a norm."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  return {
    'embed_tokens': draw(7, 4),
    'layers': {
      'q_proj': {'kernel': draw(2, 4, 6), 'bias': draw(2, 6)},
      'down_proj': {'kernel': draw(2, 5, 4)},
      'input_layernorm': {'scale': draw(2, 4)},
    },
  }


def _trained(rank=3):
  """Returns an adapter of the base whose product is not zero."""
  adapter = lora.init(
    jax.random.key(0), _base(), rank=rank, target_modules=TARGETS
  )
  return jax.tree.map(lambda leaf: leaf + 0.1, adapter)


def _assert_trees_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_init_pairs_the_targeted_kernels_only():
  adapter = lora.init(
    jax.random.key(0), _base(), rank=3, target_modules=TARGETS
  )
  shapes = jax.tree.map(lambda leaf: leaf.shape, adapter)
  assert shapes == {
    'layers': {
      'q_proj': {'a': (2, 4, 3), 'b': (2, 3, 6)},
      'down_proj': {'a': (2, 5, 3), 'b': (2, 3, 4)},
    }
  }
  assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {
    jnp.dtype('float32')
  }


def test_init_has_a_zero_product_and_bounded_factors():
  base = {'q_proj': {'kernel': jnp.zeros((2, 16, 400))}}
  pair = lora.init(jax.random.key(1), base, rank=64, target_modules=['q_proj'])[
    'q_proj'
  ]
  assert not pair['b'].any()
  assert np.abs(pair['a']).max() <= 0.25
  # The variance of a uniform distribution on [-1/4, 1/4] is 1/48; of 2,048
  # draws the sample's is within 8 % (five standard errors).
  np.testing.assert_allclose(np.var(pair['a']), 1 / 48, rtol=0.08)


def test_init_depends_on_the_key_and_the_projection_only():
  key, other = jax.random.key(0), jax.random.key(1)
  base = _base()
  both = lora.init(key, base, rank=3, target_modules=TARGETS)['layers']
  one = lora.init(key, base, rank=3, target_modules=TARGETS[:1])['layers']
  _assert_trees_equal(both['q_proj'], one['q_proj'])
  square = {n: {'kernel': jnp.zeros((1, 4, 4))} for n in TARGETS}
  same_shape = lora.init(key, square, rank=3, target_modules=TARGETS)
  assert np.any(same_shape['q_proj']['a'] != same_shape['down_proj']['a'])
  again = lora.init(other, base, rank=3, target_modules=TARGETS)['layers']
  assert np.any(again['q_proj']['a'] != both['q_proj']['a'])


def test_init_accepts_shapes():
  shapes = jax.eval_shape(_base)
  key = jax.random.key(0)
  _assert_trees_equal(
    lora.init(key, shapes, rank=2, target_modules=TARGETS),
    lora.init(key, _base(), rank=2, target_modules=TARGETS),
  )


def test_init_names_what_is_wrong():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='the model has no k_proj'):
    lora.init(key, _base(), rank=2, target_modules=['q_proj', 'k_proj'])
  with pytest.raises(ValueError, match='rank=0 must be greater than 0'):
    lora.init(key, _base(), rank=0, target_modules=TARGETS)
  # A norm has no kernel, so it is no projection.
  with pytest.raises(ValueError, match='has no input_layernorm'):
    lora.init(key, _base(), rank=2, target_modules=['input_layernorm'])


def test_effective_delta_is_the_scaled_product():
  adapter = _trained()
  delta = lora.effective_delta(adapter, 0.5)
  pair = adapter['layers']['q_proj']
  for layer in range(2):
    expected = 0.5 * np.float64(pair['a'][layer]) @ np.float64(pair['b'][layer])
    found = delta['layers']['q_proj'][layer]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_merge_adds_the_effective_delta_and_nothing_else():
  base, adapter = _base(), _trained()
  merged = lora.merge(base, adapter, 0.5)
  delta = lora.effective_delta(adapter, 0.5)['layers']
  for target in TARGETS:
    kernel = base['layers'][target]['kernel']
    np.testing.assert_array_equal(
      merged['layers'][target]['kernel'], kernel + delta[target]
    )
    merged['layers'][target] = base['layers'][target] | {'kernel': kernel}
  assert merged['layers']['q_proj']['bias'] is base['layers']['q_proj']['bias']
  _assert_trees_equal(merged, base)


def test_merge_adds_in_float32_and_keeps_the_dtype():
  base, adapter = _base(jnp.bfloat16), _trained()
  merged = lora.merge(base, adapter, 0.5)['layers']['q_proj']['kernel']
  wide = lora.merge(jax.tree.map(jnp.float32, base), adapter, 0.5)
  expected = wide['layers']['q_proj']['kernel'].astype(jnp.bfloat16)
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, expected)


def test_merge_refuses_an_adapter_of_another_model():
  adapter = _trained()
  adapter['layers']['k_proj'] = adapter['layers']['q_proj']
  with pytest.raises(ValueError, match='adapts k_proj'):
    lora.merge(_base(), adapter, 1.0)


def test_padding_keeps_the_product():
  adapter = _trained(rank=2)
  padded = lora.pad_rank(adapter, 5)
  assert padded['layers']['q_proj']['a'].shape == (2, 4, 5)
  jax.tree.map(
    lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6),
    lora.effective_delta(padded, 0.5),
    lora.effective_delta(adapter, 0.5),
  )
  _assert_trees_equal(lora.pad_rank(adapter, 2), adapter)
  with pytest.raises(ValueError, match='rank=1 is below rank 2'):
    lora.pad_rank(adapter, 1)


def test_adapters_side_by_side_keep_their_products():
  keys = jax.random.split(jax.random.key(0), 4)
  one = {
    'layers': {'q': _random_pair(keys[0], 2), 'v': _random_pair(keys[1], 2)}
  }
  two = {'layers': {'q': _random_pair(keys[2], 3)}}
  joined = lora.side_by_side([one, {}, two])['layers']
  for number, adapter in enumerate((one['layers'], {}, two['layers'])):
    for name, pairs in joined.items():
      own = jax.tree.map(lambda x, i=number: x[:, i], pairs)
      if name not in adapter:
        assert not own['a'].any() and not own['b'].any()
        continue
      expected = lora.pad_rank(adapter[name], 3 if name == 'q' else 2)
      jax.tree.map(np.testing.assert_array_equal, own, expected)


def test_an_adapter_that_is_not_finite_shares_no_batch():
  good, bad = (
    _random_pair(jax.random.key(0), 2),
    _random_pair(jax.random.key(1), 2),
  )
  bad['b'] = bad['b'].at[0, 0, 0].set(np.nan)
  with pytest.raises(ValueError, match='adapter 1 holds numbers that are not'):
    lora.side_by_side([{'q': good}, {'q': bad}])


def _random_pair(key, rank):
  """Draws the factors of three layers."""
  a_key, b_key = jax.random.split(key)
  return {
    'a': jax.random.normal(a_key, (3, 8, rank)),
    'b': jax.random.normal(b_key, (3, rank, 6)),
  }
