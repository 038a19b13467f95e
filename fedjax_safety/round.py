"""One federated round: broadcast, train, attack, aggregate, apply.

The whole round is one jitted program. A client is a row: every stacked tree
has leading axis C, and where a mesh is set its axis `clients` holds that one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedjax_safety import (
  client_algorithms,
  detection,
  server_update,
  tree,
  types,
)
from fedjax_safety.aggregators import Aggregator

CLIENTS_AXIS = 'clients'

# On a CPU, tokens trained at once: activations of more fall out of its caches.
_CPU_CHUNK_TOKENS = 1024

_FEDAVG = client_algorithms.fedavg()


class RoundState(NamedTuple):
  """All that one round hands to the next.

  Attributes:
    adapter: the server's adapter.
    server_state: state of the server's optimizer.
    aggregator_state: state of the aggregation rule.
    round_index: `int32[]`, the number of rounds done.
    client_state: what the clients' algorithm keeps, of all the population.
  """

  adapter: types.Adapter
  server_state: optax.OptState
  aggregator_state: types.PyTree
  round_index: jax.Array
  client_state: types.PyTree = ()


class Cohort(NamedTuple):
  """This round's clients and their data.

  Attributes:
    tokens: `int32[C, S, B, L]`.
    loss_mask: `[C, S, B, L]`, nonzero on answer tokens.
    client_id: `int32[C]`, who each row is.
    weight: `float32[C]`, the rows' weights in a weighted mean.
    is_malicious: `bool[C]`, the truth; only the attack, metrics and clients
      that need not do as they are told see it.
  """

  tokens: jax.Array
  loss_mask: jax.Array
  client_id: jax.Array
  weight: jax.Array
  is_malicious: jax.Array


def init_state(
  adapter: types.Adapter,
  aggregator: Aggregator,
  optimizer: optax.GradientTransformation,
  algorithm: client_algorithms.ClientAlgorithm = _FEDAVG,
) -> RoundState:
  """Returns the state before the first round."""
  return RoundState(
    adapter,
    optimizer.init(adapter),
    aggregator.init(adapter),
    jnp.zeros((), jnp.int32),
    algorithm.init(adapter),
  )


def _default_chunk(shape: tuple[int, ...], sharded: bool) -> int:
  """Returns how many rows of `tokens[C, S, B, L]` are best trained at once.

  All, except on one CPU: there, the largest divisor of C whose step fits in
  the caches.
  """
  clients, _, batch, length = shape
  if sharded or jax.default_backend() != 'cpu':
    return clients
  most = max(_CPU_CHUNK_TOKENS // (batch * length), 1)
  return max(n for n in range(1, clients + 1) if clients % n == 0 and n <= most)


def _map_clients(train, tokens, loss_mask, own, clients_per_chunk, sharded):
  """Trains every row at once, or in chunks of rows."""
  rows, num_rows = (tokens, loss_mask, own), len(tokens)
  chunk = clients_per_chunk or _default_chunk(tokens.shape, sharded)
  train_all = jax.vmap(train, spmd_axis_name=CLIENTS_AXIS if sharded else None)
  if chunk >= num_rows:
    return train_all(*rows)
  if not sharded:
    # One row at a time needs no client axis in the products.
    return jax.lax.map(
      lambda row: train(*row), rows, batch_size=chunk if chunk > 1 else None
    )
  # Every chunk strides over the cohort, so that each device has rows in it.
  num_chunks = num_rows // chunk
  chunks = jax.tree.map(
    lambda x: x.reshape(chunk, num_chunks, *x.shape[1:]).swapaxes(0, 1), rows
  )
  out = jax.lax.map(lambda rows: train_all(*rows), chunks)
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(num_rows, *x.shape[2:]), out
  )


def _metrics(clients, output, delta, cohort):
  """Returns the round's scalars, and per row who it is and what it got."""
  is_malicious = cohort.is_malicious
  metrics = {
    'client/id_by_row': cohort.client_id,
    'client/is_malicious_by_row': is_malicious,
    'client/loss': jnp.mean(clients.loss),
    'client/loss_by_row': jnp.mean(clients.loss, axis=1),
    'client/delta_norm_by_row': tree.row_norms(clients.delta),
    'defense/delta_norm': optax.global_norm(delta),
  }
  found = detection.from_distances(clients.delta, delta, is_malicious)
  if output.client_weights is not None:
    metrics['defense/client_weights'] = output.client_weights
    metrics['defense/weight_on_malicious'] = jnp.sum(
      jnp.where(is_malicious, output.client_weights, 0.0)
    )
    found |= detection.from_weights(output.client_weights, is_malicious)
  if 'client_scores' in output.metrics:
    # A rule's own scores say more than whom it kept.
    scores = output.metrics['client_scores']
    found['detection_auroc'] = detection.auroc(scores, is_malicious)
  found |= output.metrics
  return metrics | {f'defense/{k}': v for k, v in found.items()}


def _accepted(function, **kwargs):
  """Returns those keyword arguments that a function names as parameters."""
  known = inspect.signature(function).parameters
  return {name: value for name, value in kwargs.items() if name in known}


class _Parts(NamedTuple):
  """What a round is made of; see `make_round`."""

  local_update: Callable
  aggregator: Aggregator
  optimizer: optax.GradientTransformation
  algorithm: client_algorithms.ClientAlgorithm
  attack: Callable | None
  trainable: Callable | None
  probe: Callable | None
  references: Callable | None
  clients_per_chunk: int | None
  sharded: bool


class _Sent(NamedTuple):
  """What the server sends out: its base, its adapter, and how to train it.

  `masks` holds `trainable`, a tree of bool scalars, where not all is trained.
  """

  base_params: types.PyTree
  adapter: types.Adapter
  learning_rate: jax.Array
  masks: dict[str, types.PyTree]

  def trained(self, delta):
    """Returns a delta, or stacked ones, 0 where the round trains nothing."""
    if not self.masks:
      return delta
    return tree.keep_leaves(self.masks['trainable'], delta)


def _broadcast(parts, base_params, state, learning_rate) -> _Sent:
  """Returns what this round's clients start from."""
  masks = {}
  if parts.trainable is not None:
    masks['trainable'] = parts.trainable(state.adapter, state.round_index)
  return _Sent(base_params, state.adapter, learning_rate, masks)


def _train(parts, sent, data, key, correct=None):
  """Trains one client on `data`, its tokens and loss mask."""
  return parts.local_update(
    sent.base_params,
    sent.adapter,
    *data,
    key,
    sent.learning_rate,
    **sent.masks,
    **correct or {},
  )


def _clients(parts, sent, state, cohort, key):
  """Trains the cohort; keys follow the clients, not their rows."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, cohort.client_id)
  received = parts.algorithm.send(state.client_state, cohort.client_id)

  # Whoever is malicious matters where clients may not do as they are told.
  deviates = None if parts.algorithm.aligns is None else cohort.is_malicious

  def train(tokens, loss_mask, own):
    key, *about = own
    correct = client_algorithms.correction(
      parts.algorithm, *about, num_steps=len(tokens)
    )
    return _train(parts, sent, (tokens, loss_mask), key, correct)

  return _map_clients(
    train,
    cohort.tokens,
    cohort.loss_mask,
    (keys, received, deviates),
    parts.clients_per_chunk,
    parts.sharded,
  )


def _offered(parts, sent, key):
  """Returns what a rule may ask of the server: its adapter, pairs and data."""

  def played():
    *data, is_unsafe = parts.references(jax.random.fold_in(key, 1))
    keys = jax.random.split(jax.random.fold_in(key, 2), len(is_unsafe))
    made = jax.lax.map(
      lambda row: _train(parts, sent, row[:-1], row[-1]), (*data, keys)
    )
    return made.delta, is_unsafe

  offered = {'adapter': sent.adapter, 'references': played}
  if parts.probe is None:
    return offered

  def probe(adapter):
    return parts.probe(sent.base_params, adapter)

  def loss_fn(delta):
    return probe(jax.tree.map(jnp.add, sent.adapter, delta))

  return offered | {'probe': probe, 'loss_fn': loss_fn}


def _aggregate(parts, sent, state, cohort, key, deltas):
  """Applies the server's rule to what was trained."""
  update = parts.aggregator.update
  output = update(
    sent.trained(deltas),
    state.aggregator_state,
    weights=cohort.weight,
    key=key,
    **_accepted(update, **_offered(parts, sent, key)),
  )
  # A rule may add noise, which must not move what is frozen.
  return output._replace(delta=sent.trained(output.delta))


def _attacked(parts, sent, aggregate, deltas, cohort, key):
  """Returns the deltas that the server gets."""
  if parts.attack is None:
    return deltas
  seen = _accepted(
    parts.attack,
    adapter=sent.adapter,
    aggregate=lambda deltas: aggregate(deltas).delta,
  )
  return parts.attack(deltas, cohort.is_malicious, key, **seen)


def _round(parts, base_params, state, cohort, key, learning_rate):
  """Broadcasts, trains, attacks, aggregates and applies."""
  round_key = jax.random.fold_in(key, state.round_index)
  client_key, attack_key, rule_key = jax.random.split(round_key, 3)
  sent = _broadcast(parts, base_params, state, learning_rate)
  clients = _clients(parts, sent, state, cohort, client_key)
  aggregate = functools.partial(
    _aggregate, parts, sent, state, cohort, rule_key
  )
  deltas = _attacked(parts, sent, aggregate, clients.delta, cohort, attack_key)
  output = aggregate(deltas)
  adapter, server_state = server_update.apply(
    parts.optimizer, state.adapter, output.delta, state.server_state
  )
  num_local_steps = cohort.tokens.shape[1]
  client_state = parts.algorithm.receive(
    state.client_state,
    cohort.client_id,
    deltas,
    learning_rate * num_local_steps,
  )
  new_state = RoundState(
    adapter, server_state, output.state, state.round_index + 1, client_state
  )
  clients = clients._replace(delta=deltas)
  return new_state, _metrics(clients, output, output.delta, cohort)


def make_round(
  *,
  local_update: Callable,
  aggregator: Aggregator,
  optimizer: optax.GradientTransformation,
  algorithm: client_algorithms.ClientAlgorithm = _FEDAVG,
  attack: Callable | None = None,
  trainable: Callable | None = None,
  probe: Callable | None = None,
  references: Callable | None = None,
  clients_per_chunk: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  state_shardings: RoundState | None = None,
) -> Callable:
  """Returns the jitted round.

  Nothing in it depends on the number of devices, on chunking or on which row
  a client sits in: keys are folded from the round and the client's identity.

  Args:
    local_update: `(base, adapter, tokens, loss_mask, key, learning_rate) ->
      ClientOutput`, one client.
    aggregator: the server's rule. One whose update has a parameter `adapter`
      gets the server's adapter; `probe` or `loss_fn`, see there.
    optimizer: the server's optimizer.
    algorithm: what clients do besides. One that corrects gradients hands
      `local_update` its correction as `correct`.
    attack: `(deltas, is_malicious, key) -> deltas`, or None. One with a
      parameter `aggregate` gets this round's rule as `(deltas) -> delta`,
      down to its state and its key: the strongest that a defense can meet.
      One with a parameter `adapter` gets the server's adapter.
    trainable: `(adapter, round_index) -> tree of bool scalars`, the leaves
      that a round trains; nobody looks at the other leaves' deltas. Then
      `local_update` gets it as `trainable`. None trains all.
    probe: `(base_params, adapter) -> loss` on pairs that the server holds.
      The rule gets it as `probe(adapter)`, and as `loss_fn(delta)` of a delta
      to the server's adapter.
    references: `(key) -> (tokens, loss_mask, is_unsafe)`, data of M clients
      that the server plays itself. A rule that asks for `references()` gets
      their (deltas, is_unsafe).
    clients_per_chunk: clients trained at once, to bound memory; None trains
      all, or on one CPU as many as its caches hold. On a mesh it divides the
      cohort and is a multiple of the axis `clients`.
    mesh: a mesh with axis `clients`; deltas stay sharded along it.
    state_shardings: the layout of the state on the mesh, which every round
      hands on, so that the next one need not be compiled for another.

  Returns:
    `round_fn(base_params, state, cohort, key, learning_rate) -> (state,
    metrics)`.
  """
  sharded = mesh is not None and CLIENTS_AXIS in mesh.axis_names
  parts = _Parts(
    local_update,
    aggregator,
    optimizer,
    algorithm,
    attack,
    trainable,
    probe,
    references,
    clients_per_chunk,
    sharded,
  )

  def round_fn(base_params, state, cohort, key, learning_rate):
    return _round(parts, base_params, state, cohort, key, learning_rate)

  # Shapes do not change within a run, so a second trace would be a defect.
  # Chex counts by name: an earlier run's count must not be held against this.
  chex.clear_trace_counter()
  # Every process of a run can read what is on all devices.
  everywhere = jax.NamedSharding(mesh, jax.P()) if sharded else None
  return jax.jit(
    chex.assert_max_traces(round_fn, n=1),
    out_shardings=(state_shardings, everywhere),
  )
