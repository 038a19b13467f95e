"""One federated round: broadcast, train, attack, aggregate, apply.

The whole round is one jitted program. A client is a row: every stacked tree
has leading axis C, and where a mesh is set its axis `clients` holds that one.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedjax_safety import server_update, tree, types
from fedjax_safety.aggregators import Aggregator

CLIENTS_AXIS = 'clients'

# On a CPU, tokens trained at once: activations of more fall out of its caches.
_CPU_CHUNK_TOKENS = 1024


class RoundState(NamedTuple):
  """All that one round hands to the next.

  Attributes:
    adapter: the server's adapter.
    server_state: state of the server's optimizer.
    aggregator_state: state of the aggregation rule.
    round_index: `int32[]`, the number of rounds done.
  """

  adapter: types.Adapter
  server_state: optax.OptState
  aggregator_state: types.PyTree
  round_index: jax.Array


class Cohort(NamedTuple):
  """This round's clients and their data.

  Attributes:
    tokens: `int32[C, S, B, L]`.
    loss_mask: `[C, S, B, L]`, nonzero on answer tokens.
    client_id: `int32[C]`, who each row is.
    weight: `float32[C]`, the rows' weights in a weighted mean.
    is_malicious: `bool[C]`, the truth; only the attack and metrics see it.
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
) -> RoundState:
  """Returns the state before the first round."""
  return RoundState(
    adapter,
    optimizer.init(adapter),
    aggregator.init(adapter),
    jnp.zeros((), jnp.int32),
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


def _map_clients(train, tokens, loss_mask, keys, clients_per_chunk, sharded):
  """Trains every row at once, or in chunks of rows."""
  rows = (tokens, loss_mask, keys)
  chunk = clients_per_chunk or _default_chunk(tokens.shape, sharded)
  if chunk < len(tokens):
    # One row at a time needs no client axis in the products.
    return jax.lax.map(
      lambda row: train(*row), rows, batch_size=chunk if chunk > 1 else None
    )
  axis = CLIENTS_AXIS if sharded else None
  return jax.vmap(train, spmd_axis_name=axis)(*rows)


def _metrics(clients, output, delta, is_malicious):
  """Returns the round's scalars, and per-row losses and weights."""
  metrics = {
    'client/loss': jnp.mean(clients.loss),
    'client/loss_by_row': jnp.mean(clients.loss, axis=1),
    'client/delta_norm_by_row': tree.row_norms(clients.delta),
    'defense/delta_norm': optax.global_norm(delta),
  }
  metrics |= {f'defense/{k}': v for k, v in output.metrics.items()}
  if output.client_weights is not None:
    metrics['defense/client_weights'] = output.client_weights
    metrics['defense/weight_on_malicious'] = jnp.sum(
      jnp.where(is_malicious, output.client_weights, 0.0)
    )
  return metrics


def make_round(
  *,
  local_update: Callable,
  aggregator: Aggregator,
  optimizer: optax.GradientTransformation,
  attack: Callable | None = None,
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
    aggregator: the server's rule.
    optimizer: the server's optimizer.
    attack: `(deltas, is_malicious, key) -> deltas`, or None.
    clients_per_chunk: clients trained at once, to bound memory; None trains
      all, or on one CPU as many as its caches hold.
    mesh: a mesh with axis `clients`; deltas stay sharded along it.
    state_shardings: the layout of the state on the mesh, which every round
      hands on, so that the next one need not be compiled for another.

  Returns:
    `round_fn(base_params, state, cohort, key, learning_rate) -> (state,
    metrics)`.
  """
  sharded = mesh is not None and CLIENTS_AXIS in mesh.axis_names

  def round_fn(base_params, state, cohort, key, learning_rate):
    round_key = jax.random.fold_in(key, state.round_index)
    client_key, attack_key, rule_key = jax.random.split(round_key, 3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(client_key, cohort.client_id)

    def train(tokens, loss_mask, key):
      return local_update(
        base_params, state.adapter, tokens, loss_mask, key, learning_rate
      )

    clients = _map_clients(
      train, cohort.tokens, cohort.loss_mask, keys, clients_per_chunk, sharded
    )
    deltas = clients.delta
    if attack is not None:
      deltas = attack(deltas, cohort.is_malicious, attack_key)
      clients = clients._replace(delta=deltas)
    output = aggregator.update(
      deltas, state.aggregator_state, weights=cohort.weight, key=rule_key
    )
    adapter, server_state = server_update.apply(
      optimizer, state.adapter, output.delta, state.server_state
    )
    new_state = RoundState(
      adapter, server_state, output.state, state.round_index + 1
    )
    return new_state, _metrics(
      clients, output, output.delta, cohort.is_malicious
    )

  # Shapes do not change within a run, so a second trace would be a defect.
  # Chex counts by name: an earlier run's count must not be held against this.
  chex.clear_trace_counter()
  return jax.jit(
    chex.assert_max_traces(round_fn, n=1), out_shardings=(state_shardings, None)
  )
