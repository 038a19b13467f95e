"""Rounds that know what factors stand for: frozen, alternating, products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_safety import (
  client_update,
  config,
  lora_aggregators,
  losses,
  server_update,
)
from fedjax_safety import round as round_lib

pytestmark = pytest.mark.usefixtures('quick_compiles')

C, S, B, L = 5, 2, 1, 4
WIDTH, VOCAB, RANK, SCALE = 8, 12, 2, 0.5
KEY, RATE = jax.random.key(3), 0.5


def _loss(base, adapter, tokens, loss_mask, key):
  """A one-layer language model with an adapter."""
  del key
  x = base['embed'][tokens]
  pair = adapter['dense']
  x = x @ base['dense']['kernel'] + SCALE * (x @ pair['a']) @ pair['b']
  return losses.next_token_loss(x @ base['embed'].T, tokens, loss_mask)


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)

  base = {
    'embed': normal(VOCAB, WIDTH),
    'dense': {'kernel': normal(WIDTH, WIDTH)},
  }
  adapter = {'dense': {'a': normal(WIDTH, RANK), 'b': normal(RANK, WIDTH)}}
  cohort = round_lib.Cohort(
    rng.integers(0, VOCAB, (C, S, B, L), np.int32),
    np.ones((C, S, B, L), bool),
    np.arange(C, dtype=np.int32),
    np.arange(1, C + 1, dtype=np.float32),
    np.arange(C) >= C - 1,
  )
  return base, adapter, cohort


def _decaying(rate):
  """SGD with decoupled decay, which moves a leaf without any gradient."""
  return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))


_local = functools.partial(
  client_update.local_update, loss_fn=_loss, optimizer=_decaying
)


@functools.cache
def _run(name, rule='mean', rounds=1, attack=None, server='fedavg', **kwargs):
  """Returns the adapters before and after each round, and the metrics."""
  base, adapter, cohort = _inputs()
  scheme = lora_aggregators.build(
    name, rule, cohort_size=C, scale=SCALE, rule_kwargs=kwargs
  )
  optimizer = server_update.build(server)
  round_fn = round_lib.make_round(
    local_update=_local,
    aggregator=scheme.aggregator,
    optimizer=optimizer,
    attack=attack,
    trainable=scheme.trainable,
  )
  state = round_lib.init_state(adapter, scheme.aggregator, optimizer)
  adapters = [adapter]
  for _ in range(rounds):
    state, metrics = round_fn(base, state, cohort, KEY, jnp.float32(RATE))
    adapters.append(state.adapter)
  assert round_fn._cache_size() == 1
  return adapters, metrics


def _product(adapter):
  pair = jax.tree.map(np.float64, adapter['dense'])
  return pair['a'] @ pair['b']


@functools.cache
def _clients(only_b=False):
  """Returns the products that the clients of the first round reach."""
  base, adapter, cohort = _inputs()
  kwargs = {'trainable': {'dense': {'a': False, 'b': True}}} if only_b else {}
  train = jax.jit(
    lambda tokens, mask: (
      _local(base, adapter, tokens, mask, KEY, RATE, **kwargs).delta
    )
  )
  products = []
  for row in range(C):
    delta = train(cohort.tokens[row], cohort.loss_mask[row])
    products.append(_product(jax.tree.map(jnp.add, adapter, delta)))
  return np.stack(products)


def _weighted(products):
  weights = np.arange(1, C + 1) / np.arange(1, C + 1).sum()
  return np.tensordot(weights, products, 1)


def _best(product):
  u, values, v = np.linalg.svd(product)
  return (u[:, :RANK] * values[:RANK]) @ v[:RANK]


# Entries below 4, rounded some ten times in a round.
_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-6)


@pytest.mark.parametrize('name', ['ffa', 'ffa_product'])
@pytest.mark.parametrize('server', ['fedavg', 'fedadam'])
def test_a_frozen_factor_keeps_its_bits(name, server):
  adapters, _ = _run(name, rounds=3, server=server)
  for adapter in adapters[1:]:
    np.testing.assert_array_equal(
      adapter['dense']['a'], adapters[0]['dense']['a']
    )
  change = adapters[-1]['dense']['b'] - adapters[0]['dense']['b']
  assert np.abs(change).min() > 0


@pytest.mark.parametrize('name', ['ffa', 'ffa_product', 'rolora'])
def test_with_one_factor_shared_a_round_gives_the_mean_product(name):
  (_, adapter), _ = _run(name)
  _close(_product(adapter), _weighted(_clients(only_b=True)))


@pytest.mark.parametrize('name', ['rolora', 'rolora_product'])
def test_factors_are_trained_in_turn(name):
  adapters, _ = _run(name, rounds=3)
  for index, moved in enumerate('bab'):
    before, after = (adapters[i]['dense'] for i in (index, index + 1))
    still = 'a' if moved == 'b' else 'b'
    np.testing.assert_array_equal(after[still], before[still])
    assert np.any(after[moved] != before[moved])


def test_averaged_products_are_cut_to_the_rank():
  clients = _clients()
  (_, adapter), _ = _run('product_svd')
  exact = _weighted(clients)
  _close(_product(adapter), _best(exact))
  # Which averaging the factors does not give.
  (_, averaged), _ = _run('factors')
  errors = [np.linalg.norm(_product(x) - exact) for x in (adapter, averaged)]
  assert errors[0] < 0.9 * errors[1]


def test_the_median_of_products_is_cut_to_the_rank():
  (_, adapter), metrics = _run('product_svd', 'median')
  start = _product(_inputs()[1])
  exact = start + np.median(_clients() - start, axis=0)
  _close(_product(adapter), _best(exact))
  assert 'defense/client_weights' not in metrics


def _spoil(name, value):
  """Makes an attack on one factor alone."""

  def attack(deltas, is_malicious, key):
    del key
    pair = dict(deltas['dense'])
    pair[name] = jnp.where(is_malicious[:, None, None], value, pair[name])
    return {'dense': pair}

  return attack


@pytest.mark.parametrize('name', ['ffa', 'ffa_product', 'rolora'])
def test_nobody_looks_at_what_is_sent_of_a_frozen_factor(name):
  (_, clean), _ = _run(name)
  (_, adapter), metrics = _run(name, attack=_spoil('a', jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, adapter, clean)
  assert int(metrics['defense/num_nonfinite']) == 0


@pytest.mark.parametrize('name', ['product_svd', 'ffa_product'])
@pytest.mark.parametrize('value', [jnp.nan, 50.0])
def test_krum_on_products_leaves_out_the_attacker(name, value):
  (_, adapter), metrics = _run(
    name, 'krum', attack=_spoil('b', value), num_byzantine=1
  )
  assert float(metrics['defense/weight_on_malicious']) == 0
  assert int(metrics['defense/num_nonfinite']) == int(np.isnan(value))
  clients = _clients(only_b=name == 'ffa_product')
  chosen = int(np.argmax(metrics['defense/client_weights']))
  _close(_product(adapter), clients[chosen])


def test_an_attack_may_know_the_rule_on_products():
  def probing(deltas, is_malicious, key, aggregate):
    del key
    aim = jax.tree.map(jnp.negative, aggregate(deltas))
    return jax.tree.map(
      lambda rows, bad: jnp.where(is_malicious[:, None, None], bad, rows),
      deltas,
      aim,
    )

  (_, adapter), metrics = _run('product_svd', attack=probing)
  assert np.isfinite(_product(adapter)).all()
  assert float(metrics['defense/weight_on_malicious']) == pytest.approx(1 / 3)


def _resolve(**changes):
  tree = config.default()
  for key, value in changes.items():
    *groups, leaf = key.split('__')
    group = tree
    for name in groups:
      group = getattr(group, name)
    setattr(group, leaf, value)
  return config.resolve(tree)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'defense__lora_aggregation': 'rolor'}, "did you mean 'rolora'"),
    (
      {'defense__lora_aggregation': 'rolora', 'server__optimizer': 'fedadam'},
      "'rolora' needs the server optimizer fedavg",
    ),
    (
      {
        'defense__lora_aggregation': 'product_svd',
        'server__learning_rate': 0.5,
      },
      "needs the server's learning rate 1",
    ),
    (
      {
        'defense__lora_aggregation': 'ffa_product',
        'defense__aggregator': 'median',
      },
      'median needs the rows themselves',
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
  with pytest.raises(ValueError) as error:
    _resolve(**changes)
  assert words in str(error.value)


def test_settings_that_can_work_are_taken():
  for name in lora_aggregators.names():
    (made,) = _resolve(defense__lora_aggregation=name).values()
    assert made.defense.lora_aggregation == name
