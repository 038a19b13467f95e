"""Stopping the repair early, by its loss on pairs that it does not see.

The loss is that of aligned pairs. Normal data that a model wrote itself are
likeliest before the first step: by their loss no repair would be worth one.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_safety import assembly, probe, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import sources
from fedjax_safety.synthesis import filters as written_filters

Examples = list[sources.Example]
# What `repair.repair` yields: steps done, adapter, metrics.
Progress = tuple[int, types.Adapter, dict[str, Any]]


def split(
  pairs: Sequence[sources.Example], share: float, *, seed: int
) -> tuple[Examples, Examples]:
  """Returns (trained, held out) pairs, which have no request in common.

  Args:
    pairs: defense data, whose metadata say their kind.
    share: of the requests of aligned pairs that are held out, at least one;
      of all requests where no pair is aligned. 0 holds none out.
    seed: of the draw.

  Raises:
    ValueError: none would be left to train on.
  """
  if not share:
    return list(pairs), []
  aligned = [pair for pair in pairs if pair.metadata['kind'] == 'aligned']
  forms = dict.fromkeys(
    written_filters.normal_form(pair.prompt) for pair in aligned or pairs
  )
  count = max(round(share * len(forms)), 1)
  held = set(random.Random(f'{seed}/held out').sample(list(forms), count))
  parts = [], []
  for pair in pairs:
    parts[written_filters.normal_form(pair.prompt) in held].append(pair)
  if not parts[0]:
    raise ValueError(
      f'defense.repair.early_stopping.held_out_share={share} leaves none of '
      f'{len(pairs)} pairs to train on; lower it, or raise '
      f'defense.repair.num_examples'
    )
  return parts


def held_out_loss(
  pairs: Examples,
  language_model: assembly.LanguageModel,
  config: settings_lib.ExperimentConfig,
) -> Callable[[types.Adapter], float]:
  """Returns `(adapter) -> loss`, the mean over the answer tokens, in nats.

  Raises:
    ValueError: no answer is left within `model.max_length`.
  """
  encoded = assembly.encode(pairs, language_model, config)
  size = config.defense.repair.batch_size
  padding = ((0, -len(pairs) % size), (0, 0))

  def batched(rows):
    return np.pad(rows, padding).reshape(-1, size, rows.shape[1])

  tested = batched(encoded.tokens), batched(encoded.loss_mask)
  measure = jax.jit(probe.make(config, language_model, tested))
  return lambda adapter: float(measure(language_model.base_params, adapter))


def best(
  steps: Iterable[Progress],
  measure: Callable[[types.Adapter], float],
  settings: settings_lib.RepairConfig,
) -> Iterator[Progress]:
  """Measures a repair as it goes, and yields the best adapter so far.

  The adapter before the first step does not count: it is what is repaired.

  Args:
    steps: of `repair.repair`; not asked for more once it has stopped.
    measure: `(adapter) -> loss` on pairs that are held out.
    settings: of the repair: how often, and how long without a new best.

  Yields:
    As `steps`, with the adapter of the least loss measured. Metrics after a
    measurement have its loss, and the steps of that adapter.
  """
  chosen = settings.early_stopping
  kept, kept_step, least, waited = None, 0, float('inf'), 0
  for done, adapter, values in steps:
    if done % chosen.every_steps == 0 or done == settings.num_steps:
      loss = measure(adapter)
      waited += 1
      if loss < least:
        kept, kept_step, least, waited = adapter, done, loss, 0
      values = {
        **values,
        'repair/held_out_loss': loss,
        'repair/best_step': kept_step,
      }
    yield done, adapter if kept is None else kept, values
    if waited == chosen.patience:
      return
