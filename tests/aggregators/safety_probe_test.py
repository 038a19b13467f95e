"""The safety probe: who is weighed down, by how much, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators

SAFE = jnp.array([4.0, 0.0, 0.0])
START = jnp.zeros(3)


def _loss(adapter):
  """Falls from a plateau to another one at the safe end of an axis."""
  return 7 * jax.nn.sigmoid(4 - 4 * adapter[0]) + 0.1


@functools.cache
def _update(**kwargs):
  rule = aggregators.build('safety_probe', cohort_size=10, **kwargs)

  @jax.jit
  def update(deltas, start):
    return rule.update(
      deltas, (), weights=None, key=None, adapter=start, probe=_loss
    )

  return update


def _rows(num_malicious, seed=0):
  """Three rows that make it safer, rows that erode a little, and attackers."""
  rng = np.random.default_rng(seed)
  push = np.full(10, -0.05)
  push[:3] = 0.6
  push[10 - num_malicious :] = -0.5
  noise = rng.normal(0, 0.1, (10, 3)) * [0.1, 1, 1]
  return jnp.asarray(np.stack([push, *np.zeros((2, 10))], 1) + noise)


def slow(deltas, start, limit):
  """The rule, row by row, in double precision."""
  rows = np.asarray(deltas, np.float64)
  mean = rows.mean(axis=0)

  def loss(adapter):
    return 7 / (1 + np.exp(4 * adapter[0] - 4)) + 0.1

  here = loss(start + mean)
  harm = np.array(
    [loss(start + mean + (row - mean) / len(rows)) - here for row in rows]
  )
  harm -= harm.mean()
  unit = max(np.sqrt((harm**2).mean()), 1e-3 * here)
  counts = np.clip(1 - harm / unit / limit, 0, 1)
  return counts / counts.sum()


@pytest.mark.parametrize('at', [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize('limit', [0.5, 0.8])
def test_it_is_its_definition(at, limit):
  deltas, start = _rows(3), START.at[0].set(at)
  found = _update(limit=limit, num_passes=1)(deltas, start)
  want = slow(deltas, np.asarray(start), limit)
  # Harms are differences of losses up to 7 in float32, down to 1e-3 in size.
  np.testing.assert_allclose(found.client_weights, want, atol=2e-3)
  np.testing.assert_allclose(found.delta, want @ deltas, atol=2e-3)


@pytest.mark.parametrize('at', [-0.5, 0.5, 1.0, 2.0])
@pytest.mark.parametrize('num_malicious', [1, 3, 5])
def test_attackers_have_hardly_a_part_whatever_their_number(num_malicious, at):
  deltas = _rows(num_malicious)
  shares = _update()(deltas, START.at[0].set(at)).client_weights
  # Of equal shares each would have 0.1.
  assert float(shares[10 - num_malicious :].max()) < 0.04
  assert (shares[:3] > 0.15).all()


def test_a_reward_prefers_rows_that_make_it_safer():
  plain, rewarded = (
    _update(reward=reward, num_passes=1)(_rows(3), START).client_weights
    for reward in (0.0, 1.0)
  )
  assert (rewarded[:3] > plain[:3]).all()


def test_rows_that_do_equal_harm_count_alike():
  # Around the least loss every row does harm, and none more than others.
  deltas = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
  found = aggregators.build('safety_probe', cohort_size=4).update(
    deltas,
    (),
    weights=None,
    key=None,
    adapter=jnp.zeros(1),
    probe=lambda adapter: jnp.sum(adapter**2),
  )
  np.testing.assert_allclose(found.client_weights, 0.25, atol=1e-6)


def test_what_one_pass_leaves_out_stays_out():
  deltas, start = _rows(5), START.at[0].set(2.0)
  once, twice = (
    _update(num_passes=n)(deltas, start).client_weights for n in (1, 2)
  )
  assert (once == 0).any()
  assert not twice[once == 0].any()


def test_a_known_number_of_attackers_is_left_out():
  deltas, start = _rows(0), START.at[0].set(1.0)
  shares = _update(limit=100.0, num_dropped=4)(deltas, start).client_weights
  assert int((shares == 0).sum()) == 4
  assert (shares[:3] > 0).all()


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, 1e20])
def test_a_row_out_of_all_proportion_stops_nothing(bad):
  deltas = _rows(3).at[9].set(bad)
  found = _update()(deltas, START)
  assert float(found.client_weights[9]) == 0
  assert (found.client_weights[:3] > 0).all()
  assert not found.client_weights[7:9].any()
  assert np.isfinite(found.delta).all()


@pytest.mark.parametrize(
  ('then', 'kwargs'), [('median', None), ('krum', {'num_byzantine': 3})]
)
def test_another_rule_combines_what_is_kept(then, kwargs):
  deltas = _rows(4)
  found = _update(then=then, then_kwargs=_frozen(kwargs))(deltas, START)
  kept = _update()(deltas, START)
  # Attackers pull to -0.5, the mean of what is kept lies above 0.
  assert float(found.delta[0]) > -0.1
  filled = jnp.where(kept.client_weights[:, None] > 0, deltas, kept.delta)
  want = getattr(aggregators, then)(filled, **kwargs or {})
  np.testing.assert_allclose(found.delta, want, atol=1e-6)
  if found.client_weights is not None:
    assert not found.client_weights[6:].any()


class _frozen(dict):
  """Arguments that can be the key of a cache."""

  def __init__(self, values):
    super().__init__(values or {})

  def __hash__(self):
    return hash(tuple(self.items()))


def test_it_follows_preaggregators():
  rule = aggregators.build(
    'safety_probe',
    cohort_size=10,
    preaggregators=[{'name': 'static_clipping', 'max_norm': 0.3}],
  )
  found = rule.update(
    _rows(3), (), weights=None, key=None, adapter=START, probe=_loss
  )
  assert float(jnp.linalg.norm(found.delta)) <= 0.3
  assert not found.client_weights[7:].any()


def test_a_pass_asks_the_probe_of_all_rows_at_once():
  calls = []

  def counted(adapter):
    calls.append(adapter.shape)
    return _loss(adapter)

  aggregators.safety_probe(_rows(3), adapter=START, probe=counted)
  assert len(calls) == 4
