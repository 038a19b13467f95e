"""Momentum per client before any rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators

COHORT = 5


def _rounds(num_rounds):
  rng = np.random.default_rng(0)
  return [
    {
      'a': rng.standard_normal((COHORT, 2, 3)).astype(np.float32),
      'b': rng.standard_normal((COHORT, 4)).astype(np.float32),
    }
    for _ in range(num_rounds)
  ]


def _aggregator(name='median', beta=0.9, **kwargs):
  inner = aggregators.build(name, cohort_size=COHORT, **kwargs)
  return aggregators.client_momentum(inner, cohort_size=COHORT, beta=beta)


def _start(aggregator):
  return aggregator.init({'a': jnp.zeros((2, 3)), 'b': jnp.zeros(4)})


@pytest.mark.parametrize('beta', [0.0, 0.5, 0.9])
def test_matches_the_recursion_over_rounds(beta):
  aggregator = _aggregator(beta=beta)
  state, update = _start(aggregator), jax.jit(aggregator.update)
  slow = {'a': np.zeros((COHORT, 2, 3)), 'b': np.zeros((COHORT, 4))}
  for deltas in _rounds(3):
    output = update(deltas, state, weights=None, key=None)
    state = output.state
    for name, momentum in slow.items():
      slow[name] = beta * momentum + (1 - beta) * deltas[name]
      np.testing.assert_allclose(
        output.delta[name], np.median(slow[name], axis=0), rtol=0, atol=1e-6
      )


def test_a_bad_row_counts_and_does_not_stay():
  aggregator = _aggregator('krum', num_byzantine=1)
  state, update = _start(aggregator), jax.jit(aggregator.update)
  first, bad, last = _rounds(3)
  bad['a'][2, 1, 1] = np.nan
  for deltas, num_bad in ((first, 0), (bad, 1), (last, 0)):
    before = state
    output = update(deltas, state, weights=None, key=None)
    state = output.state
    assert int(output.metrics['num_nonfinite']) == num_bad
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(output.delta))
    if num_bad:
      assert output.client_weights[2] == 0
      np.testing.assert_array_equal(
        state.momentum['b'][2], before.momentum['b'][2]
      )
      assert (state.momentum['b'][3] != before.momentum['b'][3]).all()


def test_the_state_of_the_rule_goes_on_inside():
  aggregator = _aggregator('centered_clipping', clip_norm=0.1)
  state, update = _start(aggregator), jax.jit(aggregator.update)
  (deltas,) = _rounds(1)
  for _ in range(2):
    output = update(deltas, state, weights=None, key=None)
    state = output.state
  np.testing.assert_array_equal(state.inner['b'], output.delta['b'])
  assert state.inner['b'].any()


def test_momentum_is_float32_and_the_delta_is_not():
  aggregator = _aggregator()
  (deltas,) = _rounds(1)
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), deltas)
  state = aggregator.init(jax.tree.map(lambda x: x[0], narrow))
  output = jax.jit(aggregator.update)(narrow, state, weights=None, key=None)
  assert output.delta['a'].dtype == jnp.bfloat16
  assert output.state.momentum['a'].dtype == jnp.float32


def test_beta_may_be_traced():
  (deltas,) = _rounds(1)

  def first_delta(beta):
    aggregator = _aggregator('mean', beta=beta)
    update = aggregator.update(
      deltas, _start(aggregator), weights=None, key=None
    )
    return update.delta['b']

  got = jax.jit(jax.vmap(first_delta))(jnp.array([0.0, 0.5]))
  np.testing.assert_allclose(got[1], 0.5 * got[0], rtol=1e-6)


def test_refusals():
  for beta in (1.0, -0.1):
    with pytest.raises(ValueError, match=r'must lie in \[0, 1\)'):
      _aggregator(beta=beta)
  aggregator = _aggregator()
  deltas = {'a': jnp.zeros((4, 2, 3)), 'b': jnp.zeros((4, 4))}
  with pytest.raises(ValueError, match='differs from the 4 rows'):
    aggregator.update(deltas, _start(aggregator), weights=None, key=None)
