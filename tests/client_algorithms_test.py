"""Tests of the clients' algorithms on quadratics, against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import (
  aggregators,
  attacks,
  client_algorithms,
  client_update,
  server_update,
)
from fedjax_safety import round as round_lib

pytestmark = pytest.mark.usefixtures('quick_compiles')

N, C, S, L = 5, 3, 4, 2
RATE, SERVER_RATE, MU = 0.1, 0.8, 0.7
CURVATURE = np.array([0.5, 2.0])
COHORTS = ((0, 2, 4), (1, 2, 3), (0, 2, 3))


def _loss(base, adapter, tokens, loss_mask, key):
  """A quadratic whose minimum is the tokens' mean."""
  del base, loss_mask, key
  off = adapter['w'] - jnp.mean(tokens, axis=0)
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE) * off**2)


@functools.cache
def _data():
  """Returns every client's tokens [N, S, 1, L]: far apart, unequal steps."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 9, (N, S, 1, L)).astype(np.int32)


def _cohort(ids):
  rows = _data()[list(ids)]
  return round_lib.Cohort(
    rows,
    np.ones(rows.shape, bool),
    np.array(ids, np.int32),
    np.ones(C, np.float32),
    np.arange(C) == C - 1,
  )


def _run(name, cohorts=COHORTS, chunk=None, attack=None, **kwargs):
  """Returns the state after a round with each cohort."""
  algorithm = client_algorithms.build(name, population=N, **kwargs)
  aggregator = aggregators.build('mean', cohort_size=C)
  optimizer = server_update.build('fedavg', learning_rate=SERVER_RATE)
  round_fn = round_lib.make_round(
    local_update=functools.partial(
      client_update.local_update, loss_fn=_loss, optimizer=client_update.sgd
    ),
    aggregator=aggregator,
    optimizer=optimizer,
    algorithm=algorithm,
    attack=attack,
    clients_per_chunk=chunk,
  )
  state = round_lib.init_state(
    {'w': jnp.ones(L)}, aggregator, optimizer, algorithm
  )
  for ids in cohorts:
    state, _ = round_fn(
      {}, state, _cohort(ids), jax.random.key(0), jnp.float32(RATE)
    )
  return state


def _gradient(w, client, step):
  return CURVATURE * (w - _data()[client, step, 0])


def _fedprox(mu):
  """Follows each client's gradient and the pull to the server's weights."""
  x = np.ones(L)
  for ids in COHORTS:
    deltas = []
    for client in ids:
      w = x.copy()
      for step in range(S):
        w = w - RATE * (_gradient(w, client, step) + mu * (w - x))
      deltas.append(w - x)
    x = x + SERVER_RATE * np.mean(deltas, axis=0)
  return x


def _scaffold(participation=C / N):
  """Algorithm 1 of Karimireddy et al. with option II."""
  x, c, own = np.ones(L), np.zeros(L), np.zeros((N, L))
  for ids in COHORTS:
    deltas, changes = [], []
    for client in ids:
      y = x.copy()
      for step in range(S):
        y = y - RATE * (_gradient(y, client, step) - own[client] + c)
      new = own[client] - c + (x - y) / (S * RATE)
      deltas.append(y - x)
      changes.append(new - own[client])
      own[client] = new
    x = x + SERVER_RATE * np.mean(deltas, axis=0)
    c = c + participation * np.mean(changes, axis=0)
  return x, c, own


# Numbers are below 16 and rounded some tens of times in float32.
_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-5)


def test_fedprox_equals_its_definition():
  _close(_run('fedprox', mu=MU).adapter['w'], _fedprox(MU))
  assert np.abs(_fedprox(MU) - _fedprox(0.0)).max() > 0.1


def test_fedavg_is_fedprox_without_a_pull():
  state = _run('fedavg')
  _close(state.adapter['w'], _fedprox(0.0))
  assert state.client_state == ()


def _lisa(mu, alignment_steps, own_steps):
  """Follows honest clients from one switch of data to the next."""
  x = np.ones(L)
  for ids in COHORTS:
    deltas = []
    for row, client in enumerate(ids):
      w, since = x.copy(), x.copy()
      for step in range(S):
        if step and step % (alignment_steps + own_steps) in (
          0,
          alignment_steps,
        ):
          since = w.copy()
        # The last row is malicious.
        pull = mu * (w - since) if row < C - 1 else 0
        w = w - RATE * (_gradient(w, client, step) + pull)
      deltas.append(w - x)
    x = x + SERVER_RATE * np.mean(deltas, axis=0)
  return x


@pytest.mark.parametrize('chunk', [None, 1])
@pytest.mark.parametrize('turns', [(1, 2), (2, 1), (1, 9)])
def test_lisa_equals_its_definition(turns, chunk):
  kwargs = {'mu': 3.0, 'alignment_steps': turns[0], 'own_steps': turns[1]}
  state = _run('lisa', chunk=chunk, **kwargs)
  _close(state.adapter['w'], _lisa(3.0, *turns))
  assert np.abs(_lisa(3.0, *turns) - _fedprox(3.0)).max() > 0.1
  aligns = client_algorithms.lisa(**kwargs).aligns(S)
  assert list(aligns) == [i % sum(turns) < turns[0] for i in range(S)]


def test_scaffold_equals_its_definition():
  state = _run('scaffold')
  x, c, own = _scaffold()
  _close(state.adapter['w'], x)
  _close(state.client_state.server['w'], c)
  _close(state.client_state.clients['w'], own)
  # With the share of the cohort left out it would be another algorithm.
  wrong, _, _ = _scaffold(participation=1.0)
  assert np.abs(wrong - x).max() > 0.1


def test_the_servers_variate_is_the_mean_of_all_clients():
  kept = _run('scaffold').client_state
  _close(kept.server['w'], np.mean(kept.clients['w'], axis=0))


@pytest.mark.parametrize('chunk', [1, 2])
def test_chunks_change_nothing(chunk):
  whole, parts = _run('scaffold'), _run('scaffold', chunk=chunk)
  jax.tree.map(_close, parts, whole)


def test_rows_may_be_permuted():
  permuted = tuple(ids[::-1] for ids in COHORTS)
  jax.tree.map(_close, _run('scaffold', permuted), _run('scaffold'))


def test_non_finite_rows_leave_the_variates_alone():
  attack = attacks.build('non_finite')
  kept = _run('scaffold', COHORTS[:1], attack=attack).client_state
  honest = _run('scaffold', COHORTS[:1]).client_state
  malicious = COHORTS[0][-1]
  assert not kept.clients['w'][malicious].any()
  assert honest.clients['w'][malicious].any()
  others = np.array(COHORTS[0][:-1])
  _close(kept.clients['w'][others], honest.clients['w'][others])
  _close(kept.server['w'], np.sum(kept.clients['w'], axis=0) / N)


def test_what_a_malicious_client_sends_is_its_variate():
  attack = attacks.build('sign_flip')
  kept = _run('scaffold', COHORTS[:1], attack=attack).client_state
  honest = _run('scaffold', COHORTS[:1]).client_state
  malicious = COHORTS[0][-1]
  _close(kept.clients['w'][malicious], -honest.clients['w'][malicious])


@pytest.mark.parametrize(
  ('name', 'kwargs', 'words'),
  [
    ('fedproxx', {}, "did you mean 'fedprox'"),
    ('fedprox', {'mu': 0.0}, 'mu=0.0 must be greater than 0'),
    ('fedprox', {'mus': 1.0}, "(did you mean 'mu'?)"),
    ('fedavg', {'mu': 1.0}, "'mu' is no argument of client algorithm 'fedavg'"),
    ('scaffold', {'mu': 1.0}, 'accepted: none'),
  ],
)
def test_mistakes_are_told(name, kwargs, words):
  with pytest.raises(ValueError) as error:
    client_algorithms.build(name, population=N, **kwargs)
  assert words in str(error.value)


def test_sgd_decays_weights_as_a_loss_would():
  transform = client_update.sgd(0.1, weight_decay=0.5)
  w, g = jnp.array([2.0]), jnp.array([3.0])
  updates, _ = transform.update(g, transform.init(w), w)
  np.testing.assert_allclose(updates, [-0.1 * (3 + 0.5 * 2)], rtol=1e-6)
