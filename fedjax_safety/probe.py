"""Pairs that the server holds, and what an adapter loses on them.

A few harmful requests with safe answers. A rule that asks for `probe` sees in
every round how likely each client's adapter makes those answers; one that
asks for `loss_fn` (Zeno) sees the same of deltas.
"""

import dataclasses
import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import aggregators, assembly, synthesis, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import sources

# Inputs of a rule for which a server needs pairs of its own.
INPUTS = frozenset({'probe', 'loss_fn'})
# Keeps the draw apart from those of clients and repair.
_SEED = 2_000_003

# (tokens, loss mask), each [T, B, L].
Batches = tuple[np.ndarray, np.ndarray]


def is_used(config: settings_lib.ExperimentConfig) -> bool:
  """Whether an arm's rule looks at pairs that the server holds."""
  return bool(INPUTS & aggregators.inputs(config.defense.aggregator))


def held_pairs(
  config: settings_lib.ExperimentConfig,
) -> list[sources.Example]:
  """Draws the server's pairs, none of them asked in an evaluation.

  Raises:
    ValueError: the source cannot be read, or too few pairs are left.
  """
  chosen = config.defense.probe
  measured = {
    synthesis.normal_form(example.prompt)
    for _, prompts in assembly.evaluation_sets(config.evaluation).values()
    for example in prompts
  }
  pairs = assembly.examples(
    chosen.source, count=2 * chosen.num_pairs, seed=config.seed + _SEED
  )
  left = [e for e in pairs if synthesis.normal_form(e.prompt) not in measured]
  if len(left) < chosen.num_pairs:
    raise ValueError(
      f'defense.probe.num_pairs={chosen.num_pairs}, but {chosen.source} has '
      f'{len(left)} pairs that no evaluation set asks; lower it or give more'
    )
  return random.Random(config.seed + _SEED).sample(left, chosen.num_pairs)


def batches(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
) -> Batches:
  """Returns the held pairs as tokens and masks, a few rows at a time."""
  encoded = assembly.encode(held_pairs(config), language_model, config)
  if not encoded.loss_mask.any():
    raise ValueError(
      f'defense.probe.source={config.defense.probe.source}: no answer is left '
      f'within model.max_length={config.model.max_length}'
    )
  shape = _shape(config)
  padded = np.zeros((shape[0] * shape[1], shape[2]), np.int32)
  mask = np.zeros(padded.shape, bool)
  rows, length = encoded.tokens.shape
  padded[:rows, :length] = encoded.tokens
  mask[:rows, :length] = encoded.loss_mask
  if config.defense.probe.num_tokens:
    mask &= np.cumsum(mask, axis=1) <= config.defense.probe.num_tokens
  return padded.reshape(shape), mask.reshape(shape)


def blank(config: settings_lib.ExperimentConfig) -> Batches:
  """Returns batches of the same shapes without any pair in them."""
  shape = _shape(config)
  return np.zeros(shape, np.int32), np.zeros(shape, bool)


def _shape(config: settings_lib.ExperimentConfig) -> tuple[int, int, int]:
  """Returns T, B, L: all rows with B examples take no more than training.

  Clients that train at once hold `clients_per_chunk * batch_size` examples;
  the probe has every row of the cohort at once, and so fewer of each.
  """
  client, fsdp = config.client, config.performance.mesh[1]
  chunk = config.performance.clients_per_chunk or client.cohort_size
  at_once = chunk * client.batch_size // client.cohort_size
  size = max(at_once // fsdp, 1) * fsdp
  return (
    -(-config.defense.probe.num_pairs // size),
    size,
    (config.model.max_length),
  )


def make(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  held: Batches,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[[types.BaseParams, types.Adapter], jax.Array]:
  """Returns `(base_params, adapter) -> loss` on the held pairs.

  The loss is the mean over the answer tokens that count, in nats, without
  dropout.
  Pure; of the model only its config is looked at.

  Args:
    config: the arm's settings.
    language_model: the model that is tuned.
    held: of `batches`.
    mesh: devices over which the model is split.
  """
  still = dataclasses.replace(
    config, lora=dataclasses.replace(config.lora, dropout=0.0)
  )
  loss_fn = assembly.make_loss(
    assembly.make_decoder(language_model, still, mesh)
  )

  def probe(base_params, adapter):
    def summed(batch):
      tokens, mask = batch
      count = jnp.sum(mask[:, 1:])
      loss = loss_fn(base_params, adapter, tokens, mask, None)
      return loss * count, count

    sums, counts = jax.lax.map(summed, jax.tree.map(jnp.asarray, held))
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)

  return probe
