"""Tests of a round: devices, chunks and rows change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_safety import (
  aggregators,
  attacks,
  client_update,
  losses,
  server_update,
)
from fedjax_safety import round as round_lib

pytestmark = pytest.mark.usefixtures('quick_compiles')

C, S, B, L = 6, 2, 2, 4
WIDTH, VOCAB = 8, 12


def _loss(base, adapter, tokens, loss_mask, key):
  """A one-layer language model with an adapter; noise stands for dropout."""
  x = base['embed'][tokens]
  pair = adapter['dense']
  noise = 1 + 0.1 * jax.random.normal(key, x.shape)
  x = x @ base['dense']['kernel'] + (x * noise) @ pair['a'] @ pair['b']
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
  adapter = {'dense': {'a': normal(WIDTH, 2), 'b': normal(2, WIDTH)}}
  cohort = round_lib.Cohort(
    rng.integers(0, VOCAB, (C, S, B, L), np.int32),
    rng.random((C, S, B, L)) < 0.7,
    np.arange(10, 10 + C, dtype=np.int32),
    np.arange(1, C + 1, dtype=np.float32),
    np.arange(C) >= C - 2,
  )
  return base, adapter, cohort


def _run(cohort, rule='mean', rounds=2, chunk=None, attack=None, **kwargs):
  """Returns the adapter and the metrics after a few rounds of SGD."""
  base, adapter, _ = _inputs()
  aggregator = aggregators.build(rule, cohort_size=C, **kwargs)
  optimizer = server_update.build('fedavgm', learning_rate=0.5)
  round_fn = round_lib.make_round(
    local_update=functools.partial(
      client_update.local_update, loss_fn=_loss, optimizer=optax.sgd
    ),
    aggregator=aggregator,
    optimizer=optimizer,
    attack=attack,
    clients_per_chunk=chunk,
  )
  state = round_lib.init_state(adapter, aggregator, optimizer)
  for _ in range(rounds):
    state, metrics = round_fn(
      base, state, cohort, jax.random.key(3), jnp.float32(0.1)
    )
  return state, metrics, round_fn


def _close(left, right):
  """Equal up to the rounding of sums over clients taken in another order.

  Deltas are about 0.1 and sums have at most 50 terms of float32, so errors
  stay below 50 * 6e-8 * 0.1, and two rounds at most double them.
  """
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    left,
    right,
  )


def test_equals_the_algorithm_written_out():
  """Broadcast, train each client, average, step: in a plain loop."""
  base, adapter, cohort = _inputs()
  state, metrics, _ = _run(cohort, rounds=1)
  key = jax.random.fold_in(jax.random.key(3), 0)
  client_key = jax.random.split(key, 3)[0]
  deltas, first_losses = [], []
  for row in range(C):
    own = jax.random.fold_in(client_key, cohort.client_id[row])
    trained, values = adapter, []
    for step in range(S):
      value, grads = jax.value_and_grad(_loss, argnums=1)(
        base,
        trained,
        cohort.tokens[row, step],
        cohort.loss_mask[row, step],
        jax.random.fold_in(own, step),
      )
      trained = jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads)
      values.append(value)
    deltas.append(jax.tree.map(jnp.subtract, trained, adapter))
    first_losses.append(np.mean(values))
  shares = cohort.weight / cohort.weight.sum()
  mean = jax.tree.map(
    lambda *rows: sum(w * r for w, r in zip(shares, rows, strict=True)),
    *deltas,
  )
  expected = jax.tree.map(lambda p, d: p + 0.5 * d, adapter, mean)
  _close(state.adapter, expected)
  np.testing.assert_allclose(
    metrics['client/loss_by_row'], first_losses, rtol=1e-5
  )
  assert int(state.round_index) == 1


@pytest.mark.parametrize('chunk', [1, 4])
def test_chunks_change_nothing(chunk):
  _, _, cohort = _inputs()
  _close(_run(cohort, chunk=chunk)[0], _run(cohort)[0])


@pytest.mark.parametrize(
  ('rule', 'kwargs'),
  [('mean', {}), ('median', {}), ('krum', {'num_byzantine': 1})],
)
def test_rows_may_be_permuted(rule, kwargs):
  _, _, cohort = _inputs()
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted = round_lib.Cohort(*(field[order] for field in cohort))
  state, metrics, _ = _run(cohort, rule, **kwargs)
  other, other_metrics, _ = _run(permuted, rule, **kwargs)
  _close(state, other)
  np.testing.assert_allclose(
    other_metrics['client/loss_by_row'],
    metrics['client/loss_by_row'][order],
    rtol=1e-5,
  )


def test_is_compiled_once():
  _, _, cohort = _inputs()
  *_, round_fn = _run(cohort, rounds=3)
  assert round_fn._cache_size() == 1


def test_a_second_shape_is_refused():
  _, _, cohort = _inputs()
  state, _, round_fn = _run(cohort, rounds=1)
  longer = cohort._replace(
    tokens=np.zeros((C, S, B, L + 1), np.int32),
    loss_mask=np.ones((C, S, B, L + 1), bool),
  )
  with pytest.raises(AssertionError, match='traced'):
    round_fn(_inputs()[0], state, longer, jax.random.key(0), jnp.float32(0.1))


def test_weight_on_malicious_is_counted():
  _, _, cohort = _inputs()
  _, metrics, _ = _run(cohort)
  np.testing.assert_allclose(
    metrics['defense/weight_on_malicious'], 11 / 21, rtol=1e-6
  )


def test_non_finite_rows_are_counted_and_harmless():
  _, _, cohort = _inputs()
  state, metrics, _ = _run(cohort, attack=attacks.build('non_finite'))
  assert int(metrics['defense/num_nonfinite']) == 2
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.adapter))
  honest = cohort._replace(weight=cohort.weight * ~cohort.is_malicious)
  _close(state.adapter, _run(honest)[0].adapter)


def test_detection_is_measured():
  _, _, cohort = _inputs()
  attack = attacks.build('gaussian', std=100.0)
  _, metrics, _ = _run(cohort, 'multi_krum', attack=attack, num_byzantine=1)
  # Two malicious clients, of whom the rule may leave out only some.
  weights = np.asarray(metrics['defense/client_weights'])
  rejected = weights == 0
  caught = rejected & cohort.is_malicious
  assert caught.any()
  for name, value in (
    ('detection_precision', caught.sum() / rejected.sum()),
    ('detection_recall', caught.sum() / 2),
    ('false_positive_rate', (rejected & ~caught).sum() / (C - 2)),
  ):
    np.testing.assert_allclose(metrics[f'defense/{name}'], value, rtol=1e-6)
  assert 0.5 < float(metrics['defense/detection_auroc']) <= 1
  # Noise of that size stands out whatever the rule looks at.
  distances = np.asarray(metrics['defense/distance_by_row'])
  malicious = np.asarray(metrics['client/is_malicious_by_row'])
  assert distances[malicious].min() > distances[~malicious].max()
  assert float(metrics['defense/distance_auroc']) == 1
  np.testing.assert_array_equal(malicious, cohort.is_malicious)
  np.testing.assert_array_equal(metrics['client/id_by_row'], cohort.client_id)


def test_rules_without_weights_have_no_detection():
  _, _, cohort = _inputs()
  _, metrics, _ = _run(cohort, 'median')
  assert not any('detection' in name for name in metrics)


def test_an_adaptive_attack_gets_the_rule_of_the_run():
  """Its state and the clients' weights too: what it sees is what happens.

  So it gets the server's adapter.
  """
  _, _, cohort = _inputs()
  seen = []

  def attack(deltas, is_malicious, key, *, adapter, aggregate):
    del is_malicious, key
    seen.append(jax.tree.map(jnp.shape, adapter))
    # What the server would have done, from all clients alike.
    delta = aggregate(deltas)
    return jax.tree.map(
      lambda x, d: jnp.broadcast_to(d[None], x.shape), deltas, delta
    )

  state, _, round_fn = _run(cohort, attack=attack)
  _close(state.adapter, _run(cohort)[0].adapter)
  assert len(seen) == 1 and round_fn._cache_size() == 1
  assert seen == [jax.tree.map(jnp.shape, state.adapter)]


@pytest.mark.parametrize('name', ['optimal_ipm', 'optimal_alie'])
def test_optimal_attacks_run_in_the_round(name):
  _, _, cohort = _inputs()
  attack = attacks.build(name, num_evaluations=4)
  state, metrics, _ = _run(cohort, 'median', attack=attack)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.adapter))
  plain = _run(cohort, 'median')[0].adapter
  changes = jax.tree.map(
    lambda a, b: jnp.abs(a - b).max(), state.adapter, plain
  )
  assert max(jax.tree.leaves(changes)) > 1e-3
