"""The published schemes against products written out in float64."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import lora
from fedjax_safety import lora_aggregators as la

_SPEC = importlib.util.spec_from_file_location(
  'dense', pathlib.Path(__file__).with_name('dense.py')
)
dense = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(dense)

pytestmark = pytest.mark.usefixtures('quick_compiles')

C, R = dense.C, dense.R
WEIGHTS = np.array([1.0, 4.0, 2.0, 0.5, 2.5], np.float32)
# Of sums of products of float32 numbers of size 1, a few dozen at most.
TOLERANCE = 1e-5


@functools.cache
def _jitted(name, **static):
  return jax.jit(functools.partial(getattr(la, name), **static))


def _call(name, *args, weights=WEIGHTS, **static):
  return _jitted(name, **static)(*args, weights=weights)


def _base():
  rng = np.random.default_rng(5)

  def kernel(*shape):
    return {'kernel': jnp.asarray(rng.normal(size=shape), 'float32')}

  return {
    'q_proj': kernel(dense.LAYERS, dense.D_IN, dense.D_OUT),
    'mlp': {'up_proj': kernel(dense.LAYERS, 4, 5)},
  }


def _kernels(params):
  return [
    np.float64(params['q_proj']['kernel']),
    np.float64(params['mlp']['up_proj']['kernel']),
  ]


def test_the_error_of_averaged_factors_is_their_covariance():
  adapters = dense.factors(0, C)
  found = dense.products(_call('fedit', adapters))
  shares = np.float64(WEIGHTS) / WEIGHTS.sum()
  covariance = [0.0, 0.0]
  for k in range(C):
    for l in range(k + 1, C):
      apart = dense.products(
        jax.tree.map(lambda x, k=k, l=l: np.float64(x[k] - x[l]), adapters)
      )
      covariance = [
        total + shares[k] * shares[l] * term
        for total, term in zip(covariance, apart, strict=True)
      ]
  exact = dense.mean(adapters, WEIGHTS)
  missing = [e - f for e, f in zip(exact, found, strict=True)]
  assert all(np.abs(error).max() > 0.5 for error in missing)
  dense.assert_close(missing, covariance)


def test_the_stack_is_the_mean_product():
  adapters = dense.factors(0, C)
  stack = _call('flora', adapters)
  assert stack['q_proj']['a'].shape[-1] == C * R
  exact = dense.mean(adapters, WEIGHTS)
  dense.assert_close(dense.products(stack), exact, TOLERANCE)
  merged = lora.merge(_base(), stack, 0.5)
  expected = [
    base + 0.5 * product
    for base, product in zip(_kernels(_base()), exact, strict=True)
  ]
  dense.assert_close(_kernels(merged), expected, TOLERANCE)


def test_the_residual_makes_averaged_factors_exact():
  adapters = dense.factors(0, C)
  averaged, residual = _call('fedex', adapters)
  base = lora.merge(_base(), residual, 0.5)
  expected = [
    own + 0.5 * product
    for own, product in zip(
      _kernels(_base()), dense.mean(adapters, WEIGHTS), strict=True
    )
  ]
  model = lora.merge(base, averaged, 0.5)
  dense.assert_close(_kernels(model), expected, TOLERANCE)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    averaged,
    _call('fedit', adapters),
  )


@pytest.mark.parametrize(('d_in', 'rank'), [(7, 3), (7, 1), (40, 2), (7, 8)])
def test_the_product_is_cut_to_the_best_of_its_rank(d_in, rank):
  adapters = dense.factors(1, C, d_in=d_in)
  found = _call('flexlora', adapters, rank=rank)
  assert found['q_proj']['a'].shape[-1] == rank
  expected = [dense.best(p, rank) for p in dense.mean(adapters, WEIGHTS)]
  dense.assert_close(dense.products(found), expected, TOLERANCE)


def test_its_first_columns_are_the_best_of_smaller_ranks():
  adapters = dense.factors(1, C)
  ranks = jnp.array([3, 1, 2, 3, 1])
  sent = jax.jit(la.at_ranks)(_call('flexlora', adapters, rank=3), ranks)
  exact = dense.mean(adapters, WEIGHTS)
  for row, rank in enumerate(ranks):
    one = jax.tree.map(lambda leaf, row=row: leaf[row], sent)
    expected = [dense.best(p, int(rank)) for p in exact]
    dense.assert_close(dense.products(one), expected, TOLERANCE)
    assert not np.any(one['q_proj']['a'][..., rank:])


def _with_shared(adapters, server, name):
  """Gives all clients the server's factor of a name."""

  def share(pair, own):
    return pair | {name: jnp.broadcast_to(own[name], pair[name].shape)}

  return {
    'q_proj': share(adapters['q_proj'], server['q_proj']),
    'mlp': {
      'up_proj': share(*(t['mlp']['up_proj'] for t in (adapters, server)))
    },
  }


@pytest.mark.parametrize(
  ('scheme', 'frozen'), [('ffa', 'a'), (0, 'a'), (1, 'b')]
)
def test_with_one_factor_shared_the_mean_is_exact(scheme, frozen):
  """FFA, and RoLoRA in an even and an odd round."""
  server = dense.factors(2)
  adapters = _with_shared(dense.factors(3, C), server, frozen)
  spoiled = jax.tree.map(jnp.array, adapters)
  # What is frozen is the server's, whatever a client claims.
  spoiled['q_proj'][frozen] = spoiled['q_proj'][frozen].at[1].set(jnp.nan)
  if scheme == 'ffa':
    found = _call('ffa', server, spoiled)
  else:
    found = _call('rolora', server, spoiled, jnp.int32(scheme))
  np.testing.assert_array_equal(
    found['q_proj'][frozen], server['q_proj'][frozen]
  )
  expected = dense.mean(adapters, WEIGHTS)
  dense.assert_close(dense.products(found), expected, TOLERANCE)


def test_a_shared_a_and_an_own_b():
  adapters = dense.factors(0, C)
  found, mean = _call('fedsa', adapters), _call('fedit', adapters)
  for row in range(C):
    np.testing.assert_array_equal(
      found['q_proj']['a'][row], mean['q_proj']['a']
    )
  np.testing.assert_array_equal(found['q_proj']['b'], adapters['q_proj']['b'])


def _of_ranks(ranks):
  return [dense.factors(10 + i, rank=rank) for i, rank in enumerate(ranks)]


def test_ranks_may_differ():
  own = _of_ranks((1, 3, 2, 2, 1))
  adapters = la.stack_ranks(own)
  assert adapters['q_proj']['a'].shape == (C, dense.LAYERS, dense.D_IN, 3)
  each = [dense.products(adapter) for adapter in own]
  exact = [np.mean(pair, axis=0) for pair in zip(*each, strict=True)]
  stack = _call('flora', adapters, weights=None)
  dense.assert_close(dense.products(stack), exact, TOLERANCE)


def test_products_weigh_clients_of_different_ranks():
  adapters = la.stack_ranks(_of_ranks((1, 3, 2, 2, 1)))
  rows = [p.reshape(C, -1) for p in dense.products(adapters)]
  norms = np.linalg.norm(np.concatenate(rows, axis=1), axis=1)
  found = jax.jit(la.product_norms)(adapters, scale=-2.0)
  np.testing.assert_allclose(found, 2 * norms, rtol=1e-6)
  weights = norms * WEIGHTS
  expected = jax.tree.map(
    lambda leaf: np.tensordot(weights / weights.sum(), np.float64(leaf), 1),
    adapters,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    _call('hetlora', adapters),
    expected,
  )


def test_scales_of_their_own_are_folded_in():
  adapters, scales = dense.factors(0, C), np.array([2.0, 1.0, 0.5, 4.0, 1.0])
  stack = _call('flora', la.fold_scales(adapters, scales), weights=None)
  expected = [
    np.tensordot(scales / C, product, 1) for product in dense.products(adapters)
  ]
  dense.assert_close(dense.products(stack), expected, TOLERANCE)


@pytest.mark.parametrize(
  ('scheme', 'static'),
  [
    ('fedit', {}),
    ('flora', {}),
    ('fedex', {}),
    ('hetlora', {}),
    ('flexlora', {'rank': R}),
  ],
)
def test_a_row_that_is_not_finite_is_absent(scheme, static):
  adapters = dense.factors(4, C)
  adapters['q_proj']['b'] = adapters['q_proj']['b'].at[1, 0, 0, 0].set(jnp.nan)
  adapters['q_proj']['a'] = adapters['q_proj']['a'].at[3].set(jnp.inf)
  rest = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2, 4])], adapters)
  found = _call(scheme, adapters, **static)
  expected = _call(scheme, rest, weights=WEIGHTS[[0, 2, 4]], **static)
  if scheme != 'fedex':
    found, expected = (found,), (expected,)
  for one, other in zip(found, expected, strict=True):
    dense.assert_close(dense.products(one), dense.products(other))


def test_nobody_left_gives_zero():
  adapters = jax.tree.map(
    lambda leaf: jnp.full_like(leaf, jnp.nan), dense.factors(4, C)
  )
  for found in (_call('fedit', adapters), _call('flexlora', adapters, rank=R)):
    assert all(not product.any() for product in dense.products(found))


@pytest.mark.parametrize(
  ('scheme', 'static'),
  [('fedit', {}), ('flora', {}), ('flexlora', {'rank': R})],
)
def test_bfloat16_is_only_rounded_at_the_end(scheme, static):
  adapters = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16), dense.factors(6, C)
  )
  found = _call(scheme, adapters, **static)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype('bfloat16')}
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
  expected = _call(scheme, wide, **static)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
    found,
    expected,
  )


def test_schemes_run_over_experiments_at_once():
  many = dense.factors(7, 2, C)
  both = jax.jit(jax.vmap(functools.partial(la.flexlora, rank=2)))(many)
  for i in range(2):
    one = _call(
      'flexlora', jax.tree.map(lambda x, i=i: x[i], many), weights=None, rank=2
    )
    dense.assert_close(
      dense.products(jax.tree.map(lambda x, i=i: x[i], both)),
      dense.products(one),
    )


def test_a_rotation_towards_a_target_undoes_signs():
  target = dense.factors(8)
  found = jax.jit(functools.partial(la.refactor, rank=R))(dense.factors(9))
  flipped = jax.tree.map(lambda x: x, found)
  signs = jnp.array([1.0, -1.0, -1.0])
  flipped['q_proj'] = {
    'a': found['q_proj']['a'] * signs,
    'b': found['q_proj']['b'] * signs[:, None],
  }
  align = jax.jit(la.align)
  one, other = align(found, target), align(flipped, target)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), one, other
  )
  dense.assert_close(dense.products(one), dense.products(found))
  distance = [
    np.linalg.norm(x['q_proj']['a'] - target['q_proj']['a'])
    for x in (one, found)
  ]
  assert distance[0] < distance[1]


def test_a_rank_of_zero_is_refused():
  with pytest.raises(ValueError, match='rank=0 must be greater than 0'):
    la.refactor(dense.factors(0), rank=0)
