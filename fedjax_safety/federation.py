"""The rounds of one arm: from the first broadcast to the last adapter.

Resumes from the newest checkpoint. All that a round draws is folded from the
seed, the round and the client, so a resumed run equals an uninterrupted one
bit for bit.
"""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from fedjax_safety import (
  assembly,
  attacks,
  client_algorithms,
  client_data,
  client_update,
  detection,
  distributed,
  interrupt,
  lora,
  lora_aggregators,
  privacy,
  probe,
  safe_lora,
  server_update,
  types,
)
from fedjax_safety import checkpoint as checkpoint_lib
from fedjax_safety import config as config_lib
from fedjax_safety import metrics as metrics_lib
from fedjax_safety import round as round_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import batching, cohort, templates
from fedjax_safety.models import sharding

_DETECTION = frozenset(
  f'defense/{name}' for name in (*detection.NAMES, 'distance_auroc')
)

# Keeps draws of what the server sends apart from those of a client's own data.
_SENT_SEED = 3_000_017

EncodedClients = Mapping[int, templates.EncodedExamples]


def learning_rate(config: settings_lib.ClientConfig, round_index: int) -> float:
  """Returns a round's learning rate: cosine from the first to the last."""
  progress = round_index / max(config.num_rounds - 1, 1)
  span = config.learning_rate - config.final_learning_rate
  factor = (1 + math.cos(math.pi * progress)) / 2
  return config.final_learning_rate + span * factor


class Parts(NamedTuple):
  """What an arm's settings choose for its rounds."""

  scheme: lora_aggregators.Scheme
  optimizer: optax.GradientTransformation
  algorithm: client_algorithms.ClientAlgorithm
  attack: Callable | None

  def init_state(self, adapter: types.Adapter) -> round_lib.RoundState:
    """Returns the state before the first round."""
    return round_lib.init_state(
      adapter, self.scheme.aggregator, self.optimizer, self.algorithm
    )


def choose_parts(config: settings_lib.ExperimentConfig) -> Parts:
  """Returns the rules and optimizers that the settings name."""
  threat, server, client = config.threat_model, config.server, config.client
  scheme = lora_aggregators.build(
    config.defense.lora_aggregation,
    config.defense.aggregator,
    cohort_size=config.client.cohort_size,
    scale=config.lora.scale,
    rule_kwargs=config.defense.aggregator_kwargs,
  )
  optimizer = server_update.build(
    server.optimizer, learning_rate=server.learning_rate, **server.kwargs
  )
  algorithm = client_algorithms.build(
    client.algorithm, population=client.population, **client.algorithm_kwargs
  )
  attack = None
  if threat.update_attack != 'none':
    attack = attacks.build(threat.update_attack, **threat.update_attack_kwargs)
  return Parts(scheme, optimizer, algorithm, attack)


def start(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  mesh: jax.sharding.Mesh | None,
) -> tuple[Any, round_lib.RoundState]:
  """Returns the jitted round and the state before the first one."""
  parts = choose_parts(config)
  state = parts.init_state(fresh_adapter(config, language_model, mesh))
  shardings = mesh and sharding.like_adapter(state, state.adapter, mesh)
  if mesh is not None:
    state = distributed.place(state, shardings)
  held = probe.held(config, language_model)
  round_fn = make_round(config, language_model, parts, mesh, shardings, held)
  return round_fn, state


def make_round(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  parts: Parts,
  mesh: jax.sharding.Mesh | None,
  state_shardings: round_lib.RoundState | None,
  held: probe.Held = probe.Held(),
) -> Callable:
  """Returns the jitted round; of the model only its config is looked at."""
  client, tests, references = config.client, None, None
  if held.tested is not None:
    tests = probe.make(config, language_model, held.tested, mesh)
  if held.trained is not None:
    references = probe.make_references(config, held.trained)
  return round_lib.make_round(
    local_update=functools.partial(
      client_update.local_update,
      loss_fn=assembly.make_loss(
        assembly.make_decoder(language_model, config, mesh),
        config.performance.loss_chunk,
      ),
      optimizer=functools.partial(
        client_update.OPTIMIZERS[client.optimizer],
        weight_decay=client.weight_decay,
      ),
    ),
    aggregator=parts.scheme.aggregator,
    optimizer=parts.optimizer,
    algorithm=parts.algorithm,
    attack=parts.attack,
    trainable=parts.scheme.trainable,
    probe=tests,
    references=references,
    clients_per_chunk=config.performance.clients_per_chunk or None,
    mesh=mesh,
    state_shardings=state_shardings,
  )


def cohort_specs() -> round_lib.Cohort:
  """Returns the partition of every array of a cohort."""
  clients_axis, fsdp_axis, _ = sharding.AXES
  data, row = jax.P(clients_axis, None, fsdp_axis), jax.P(clients_axis)
  return round_lib.Cohort(data, data, row, row, row)


def make_cohort(
  config: settings_lib.ExperimentConfig,
  clients: EncodedClients,
  round_index: int,
  mesh: jax.sharding.Mesh | None,
  sent: templates.EncodedExamples | None = None,
) -> round_lib.Cohort:
  """Samples a round's clients and draws their batches.

  Args:
    config: the arm's settings.
    clients: tokenized data by client id.
    round_index: the round, from 0.
    mesh: where the arrays go, None for one device.
    sent: aligned pairs that the server sends, where the clients' algorithm
      has honest clients train on some; see `probe.sent`.
  """
  client = config.client
  rows = cohort.sample_cohort(
    client.population,
    client.cohort_size,
    round_index=round_index,
    seed=config.seed,
    schedule=client.schedule,
  )
  everyone = [*clients.values(), *([] if sent is None else [sent])]
  draw = functools.partial(
    batching.round_batches,
    cohort=rows,
    round_index=round_index,
    num_local_steps=client.num_local_steps,
    batch_size=client.batch_size,
    schedule=client.schedule,
    length=batching.common_length(everyone),
  )
  own = draw(clients, seed=config.seed)
  tokens, loss_mask = own.tokens, own.loss_mask
  is_malicious = np.isin(rows, client_data.malicious_ids(config))
  if sent is not None:
    aligns = choose_parts(config).algorithm.aligns(client.num_local_steps)
    taken = (~is_malicious[:, None] & aligns)[..., None, None]
    given = draw(dict.fromkeys(rows, sent), seed=config.seed + _SENT_SEED)
    tokens = np.where(taken, given.tokens, tokens)
    loss_mask = np.where(taken, given.loss_mask, loss_mask)
  made = round_lib.Cohort(
    tokens,
    loss_mask,
    np.asarray(rows, np.int32),
    np.asarray(own.num_examples, np.float32),
    is_malicious,
  )
  if mesh is None:
    return made
  return sharding.place(made, mesh, cohort_specs())


def fresh_adapter(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  mesh: jax.sharding.Mesh | None,
) -> types.Adapter:
  """Returns the adapter of round 0, the same on any mesh."""
  adapter = lora.init(
    jax.random.fold_in(jax.random.key(config.seed), 1),
    language_model.base_params,
    rank=config.lora.rank,
    target_modules=config.lora.target_modules,
  )
  if mesh is None:
    return adapter
  return sharding.place(adapter, mesh, sharding.adapter_specs(adapter))


def traffic(
  parts: Parts, state: round_lib.RoundState, round_index: int
) -> dict[str, int]:
  """Returns the bytes that one client sends and gets in a round.

  It gets the adapter and what the algorithm sends besides, and sends what the
  round trains of it.
  """
  leaves, trained = jax.tree.leaves(state.adapter), parts.scheme.trainable
  sent = leaves
  if trained is not None:
    kept = jax.tree.leaves(trained(state.adapter, round_index))
    sent = [x for x, keep in zip(leaves, kept, strict=True) if keep]
  own = jax.eval_shape(
    parts.algorithm.send, state.client_state, jnp.zeros(1, jnp.int32)
  )
  got = [*leaves, *jax.tree.leaves(own)]
  return {
    f'communication/{name}_bytes': sum(
      math.prod(x.shape) * x.dtype.itemsize for x in arrays
    )
    for name, arrays in (('upload', sent), ('download', got))
  }


def _record(config, arm, round_index, metrics, seconds) -> dict[str, Any]:
  """Returns a round's line in metrics.jsonl, from arrays.

  What was not measured is left out: its time, or a detection rate of nobody,
  which says nothing of whether training diverged. Privacy is told of the
  whole run.
  """
  values = {
    k: np.asarray(v).tolist()
    for k, v in metrics.items()
    if not (k in _DETECTION and np.isnan(v))
  }
  last = round_index + 1 == config.client.num_rounds
  if last and config.defense.privacy_delta:
    values['privacy/epsilon'] = privacy.of_run(config)
  return {
    'kind': 'round',
    'arm': arm,
    'seed': config.seed,
    'round': round_index,
    'client/learning_rate': learning_rate(config.client, round_index),
    **values,
    **({} if seconds is None else {'time/round_s': round(seconds, 4)}),
  }


def _rounds(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  clients: EncodedClients,
  checkpointer: checkpoint_lib.Checkpointer,
) -> Iterator[tuple[int, round_lib.RoundState, dict[str, jax.Array]]]:
  """Yields (round, state, metrics) of every round that is not done yet.

  If all are done, yields the last state once, with no metrics.
  """
  mesh = assembly.mesh_of(config.performance)
  round_fn, state = start(config, language_model, mesh)
  done = 0
  if checkpointer.rounds():
    state, meta = checkpointer.restore(state)
    done = meta['round']
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  if done >= config.client.num_rounds:
    yield done - 1, state, {}
    return
  project = safe_lora.make(config, mesh)
  sent = probe.sent(config, language_model)
  for index in range(done, config.client.num_rounds):
    state, metrics = round_fn(
      language_model.base_params,
      state,
      make_cohort(config, clients, index, mesh, sent),
      key,
      jnp.float32(learning_rate(config.client, index)),
    )
    adapter, projected = project(state.adapter)
    state = state._replace(adapter=adapter)
    yield index, state, metrics | projected


def _no_measure(round_index: int, adapter: types.Adapter) -> dict[str, Any]:
  """Measures nothing."""
  del round_index, adapter
  return {}


def federate(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  clients: EncodedClients,
  *,
  arm: str,
  directory: pathlib.Path,
  writer: metrics_lib.MetricsWriter,
  stop: interrupt.StopRequest,
  measure: Callable[[int, types.Adapter], dict[str, Any]] = _no_measure,
) -> types.Adapter:
  """Runs or resumes the rounds and returns the last adapter.

  A round's checkpoint and metrics are taken while the next one computes.

  Args:
    config: the arm's settings.
    language_model: the model that is tuned.
    clients: tokenized data by client id.
    arm: the arm's name.
    directory: where checkpoints go.
    writer: of metrics.jsonl.
    stop: looked at after every round.
    measure: `(round, adapter) -> values` for the line of a finished round.

  Raises:
    interrupt.Interrupted: asked to stop; the round in flight is saved.
    checkpoint.CheckpointError: a checkpoint could not be written or read.
  """
  checkpointer = checkpoint_lib.Checkpointer(
    directory, max_to_keep=config.checkpoint.max_to_keep
  )
  digest, parts = config_lib.digest(config), choose_parts(config)
  clock = time.monotonic()

  def keep(index, state, metrics):
    """Saves a finished round; waits for its arrays."""
    nonlocal clock
    if metrics:
      jax.block_until_ready(metrics)
      now = time.monotonic()
      seconds, clock = None if clock is None else now - clock, now
      measured = measure(index, state.adapter)
      if measured:
        # The next round, already running, gets no time of its own.
        clock = None
      values = metrics | measured
      # Metrics first: a run killed in between writes them again, while a
      # round that is saved is never run again.
      record = _record(config, arm, index, values, seconds)
      writer.write(record | traffic(parts, state, index))
      meta = {'round': index + 1, 'arm': arm, 'config_digest': digest}
      checkpointer.save(state, meta)
      bar.set_postfix(loss=f'{float(metrics["client/loss"]):.3f}')
    bar.n = index + 1
    bar.refresh()

  bar = tqdm.tqdm(
    total=config.client.num_rounds,
    desc=f'{arm}: rounds',
    disable=not distributed.is_first(),
  )
  previous = None
  try:
    for current in _rounds(config, language_model, clients, checkpointer):
      if previous:
        keep(*previous)
      previous = current
      if stop.poll():
        break
    keep(*previous)
  finally:
    bar.close()
    checkpointer.close()
  stop.check()
  return previous[1].adapter
