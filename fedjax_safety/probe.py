"""Pairs that the server holds, and what an adapter loses on them.

A few harmful requests with safe answers. A rule that asks for `probe` sees in
every round how likely each client's adapter makes those answers; one that
asks for `loss_fn` (Zeno) sees the same of deltas.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import assembly, client_algorithms, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.config import defense_checks
from fedjax_safety.data import sources, templates
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.synthesis import filters as written_filters

# Keeps the draw apart from those of clients and repair.
_SEED = 2_000_003

# (tokens, loss mask), each [T, B, L].
Batches = tuple[np.ndarray, np.ndarray]


class Held(NamedTuple):
  """What the server holds, as arrays; None where its rule has no use for it.

  Attributes:
    tested: pairs to test deltas on.
    trained: pairs to make deltas of, [kind, pair, L].
  """

  tested: Batches | None = None
  trained: Batches | None = None


def held_pairs(
  config: settings_lib.ExperimentConfig,
) -> list[sources.Example]:
  """Returns all pairs that the server holds, none asked in an evaluation.

  Raises:
    ValueError: a source cannot be read, or has too few pairs.
  """
  chosen, pairs = config.defense.probe, []
  if defense_checks.tests_deltas(config):
    pairs += _drawn(config, 'source', chosen.num_pairs, 'num_pairs')
  if defense_checks.makes_references(config):
    for kind in defense_checks.KINDS:
      pairs += _training_pairs(config, kind)
  elif client_algorithms.sends_pairs(config.client.algorithm):
    pairs += _training_pairs(config, 'source')
  return pairs


def sent(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
) -> templates.EncodedExamples | None:
  """Returns the pairs that the server sends clients to train on, if any.

  Raises:
    ValueError: the source cannot be read, or has too few pairs or answers.
  """
  if not client_algorithms.sends_pairs(config.client.algorithm):
    return None
  pairs = _training_pairs(config, 'source')
  encoded = assembly.encode(pairs, language_model, config)
  _check_answers(config, 'source', encoded.loss_mask)
  return encoded


def _training_pairs(config, kind: str) -> list[sources.Example]:
  """Returns the pairs of one kind of references."""
  count = config.defense.probe.num_training_pairs
  return _drawn(config, kind, count, 'num_training_pairs')


def _drawn(config, kind: str, count: int, name: str) -> list[sources.Example]:
  """Draws pairs of a source, none of them asked in an evaluation."""
  source = getattr(config.defense.probe, kind)
  measured = {
    written_filters.normal_form(example.prompt)
    for _, prompts in evaluation_inputs.evaluation_sets(
      config.evaluation
    ).values()
    for example in prompts
  }
  pairs = assembly.examples(source, count=2 * count, seed=config.seed + _SEED)
  left = [
    e for e in pairs if written_filters.normal_form(e.prompt) not in measured
  ]
  if len(left) < count:
    raise ValueError(
      f'defense.probe.{name}={count}, but {source} has {len(left)} pairs that '
      f'no evaluation set asks; lower it or give more'
    )
  return random.Random(config.seed + _SEED).sample(left, count)


def held(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
) -> Held:
  """Returns what the server holds for an arm's rule.

  Raises:
    ValueError: a source cannot be read, or has too few pairs or answers.
  """
  return Held(
    batches(config, language_model)
    if defense_checks.tests_deltas(config)
    else None,
    _training(config, language_model)
    if defense_checks.makes_references(config)
    else None,
  )


def _training(config, language_model) -> Batches:
  """Returns the tokens and masks of the references, [kind, pair, L]."""
  parts = []
  for kind in defense_checks.KINDS:
    pairs = _training_pairs(config, kind)
    encoded = assembly.encode(pairs, language_model, config)
    _check_answers(config, kind, encoded.loss_mask)
    pad = [(0, 0), (0, config.model.max_length - encoded.tokens.shape[1])]
    parts.append((np.pad(encoded.tokens, pad), np.pad(encoded.loss_mask, pad)))
  return tuple(np.stack(each) for each in zip(*parts, strict=True))


def _check_answers(config, kind: str, mask: np.ndarray) -> None:
  """Raises unless some answer can be trained on."""
  if not mask.any():
    raise ValueError(
      f'defense.probe.{kind}={getattr(config.defense.probe, kind)}: no answer '
      f'is left within model.max_length={config.model.max_length}'
    )


def batches(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
) -> Batches:
  """Returns the pairs to test on as tokens and masks, a few at a time."""
  count = config.defense.probe.num_pairs
  pairs = _drawn(config, 'source', count, 'num_pairs')
  encoded = assembly.encode(pairs, language_model, config)
  _check_answers(config, 'source', encoded.loss_mask)
  shape = _shape(config)
  padded = np.zeros((shape[0] * shape[1], shape[2]), np.int32)
  mask = np.zeros(padded.shape, bool)
  rows, length = encoded.tokens.shape
  padded[:rows, :length] = encoded.tokens
  mask[:rows, :length] = encoded.loss_mask
  if config.defense.probe.num_tokens:
    mask &= np.cumsum(mask, axis=1) <= config.defense.probe.num_tokens
  return padded.reshape(shape), mask.reshape(shape)


def blank(config: settings_lib.ExperimentConfig) -> Held:
  """Returns arrays of the same shapes as `held` without any pair in them."""
  count, length = config.defense.probe.num_training_pairs, config.model

  def zeros(*shape):
    return np.zeros(shape, np.int32), np.zeros(shape, bool)

  return Held(
    zeros(*_shape(config)) if defense_checks.tests_deltas(config) else None,
    zeros(len(defense_checks.KINDS), count, length.max_length)
    if defense_checks.makes_references(config)
    else None,
  )


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


def make_references(
  config: settings_lib.ExperimentConfig, trained: Batches
) -> Callable[[types.PRNGKey], tuple[jax.Array, jax.Array, jax.Array]]:
  """Returns `(key) -> (tokens, mask, is_unsafe)` of the server's own clients.

  Tokens and masks are [M, S, B, L] as those of a cohort; of the M rows a third
  each hold aligned, normal and unaligned pairs, drawn anew by each key.
  """
  client, count = config.client, config.defense.probe.num_references
  kinds = np.repeat(np.arange(len(defense_checks.KINDS)), count)
  shape = (kinds.size, client.num_local_steps, client.batch_size)

  def references(key):
    tokens, mask = jax.tree.map(jnp.asarray, trained)
    rows = jax.random.randint(key, shape, 0, tokens.shape[1])
    at = kinds[:, None, None]
    return (
      tokens[at, rows],
      mask[at, rows],
      kinds == len(defense_checks.KINDS) - 1,
    )

  return references


def make(
  config: settings_lib.ExperimentConfig,
  language_model: assembly.LanguageModel,
  tested: Batches,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[[types.BaseParams, types.Adapter], jax.Array]:
  """Returns `(base_params, adapter) -> loss` on the held pairs.

  The loss is the mean over the answer tokens that count, in nats, without
  dropout.
  Pure; of the model only its config is looked at.

  Args:
    config: the arm's settings.
    language_model: the model that is tuned.
    tested: of `batches`.
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

    sums, counts = jax.lax.map(summed, jax.tree.map(jnp.asarray, tested))
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)

  return probe
