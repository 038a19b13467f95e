"""Makes the arrays that one round trains on."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_safety import _validate
from fedjax_safety.data import _random, templates
from fedjax_safety.data import cohort as cohort_lib

EncodedByClient = (
  Mapping[int, templates.EncodedExamples] | Sequence[templates.EncodedExamples]
)


class RoundBatches(NamedTuple):
  """What the clients of one round train on.

  Attributes:
    tokens: int32[C, S, B, L].
    loss_mask: bool[C, S, B, L], true where a token is to be predicted.
    num_examples: int32[C], trainable examples of each client in all.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  num_examples: np.ndarray


def common_length(encoded_by_client: EncodedByClient) -> int:
  """Returns the longest padded length of any client, the L of a whole run."""
  return max(e.tokens.shape[1] for e in _values(encoded_by_client))


def round_batches(
  encoded_by_client: EncodedByClient,
  cohort: Sequence[int] | np.ndarray,
  *,
  round_index: int,
  num_local_steps: int,
  batch_size: int,
  seed: int,
  schedule: str = 'uniform',
  length: int | None = None,
) -> RoundBatches:
  """Draws each client's examples for one round.

  A client's batches depend on (seed, round, client id) and not on its row or
  on who else is in the cohort. Examples are drawn without replacement; a
  client with fewer than `num_local_steps * batch_size` goes through all of
  them, reshuffled each time. Examples whose answer was cut off entirely are
  never drawn. The shapes are the same in every round.

  Args:
    encoded_by_client: tokenized examples of every client of the population.
    cohort: client ids, one a row.
    round_index: the round, from 0.
    num_local_steps: S.
    batch_size: B, examples of one client's local step.
    seed: of the run.
    schedule: `uniform`, or `paper`: the examples of the reference runs, at
      the same positions for every client with as many examples, whatever the
      seed (their order within the round is not reproduced).
    length: L; None takes `common_length(encoded_by_client)`.

  Returns:
    The batches, rows in the order of `cohort`.

  Raises:
    ValueError: a client is unknown or has nothing to train on, or `length`
      would cut examples.
  """
  _validate.positive(num_local_steps=num_local_steps, batch_size=batch_size)
  _validate.non_negative(round_index=round_index)
  _validate.one_of(cohort_lib.SCHEDULES, schedule=schedule)
  longest = common_length(encoded_by_client)
  length = longest if length is None else length
  if length < longest:
    raise ValueError(
      f'length={length} must be at least {longest}, the longest padded '
      'example. Tokenize with a smaller max_length.'
    )
  shape = (len(cohort), num_local_steps, batch_size, length)
  tokens = np.empty(shape, np.int32)
  loss_mask = np.zeros(shape, bool)
  num_examples = np.empty(len(cohort), np.int32)
  for row, client_id in enumerate(map(int, cohort)):
    encoded = _encoded(encoded_by_client, client_id)
    usable = encoded.trainable
    draw = _draw(
      len(usable),
      num_local_steps * batch_size,
      round_index=round_index,
      client_id=client_id,
      seed=seed,
      schedule=schedule,
    )
    picked = usable[draw].reshape(num_local_steps, batch_size)
    width = encoded.tokens.shape[1]
    tokens[row, ..., :width] = encoded.tokens[picked]
    tokens[row, ..., width:] = encoded.pad_id
    loss_mask[row, ..., :width] = encoded.loss_mask[picked]
    num_examples[row] = len(usable)
  return RoundBatches(tokens, loss_mask, num_examples)


def _draw(
  available: int,
  needed: int,
  *,
  round_index: int,
  client_id: int,
  seed: int,
  schedule: str,
) -> np.ndarray:
  """Returns `needed` positions below `available`, pass after pass."""
  if schedule == 'paper':
    reference = random.Random(round_index)
    passes = [reference.sample(range(available), min(available, needed))]
    while sum(map(len, passes)) < needed:
      passes.append(reference.sample(range(available), available))
  else:
    rng = _random.generator(seed, 'batching', round_index, client_id)
    num_passes = -(-needed // available)
    passes = [rng.permutation(available) for _ in range(num_passes)]
  return np.concatenate(passes)[:needed]


def _encoded(
  encoded_by_client: EncodedByClient, client_id: int
) -> templates.EncodedExamples:
  """Returns a client's examples or raises."""
  try:
    encoded = encoded_by_client[client_id]
  except (KeyError, IndexError):
    raise ValueError(
      f'client_id={client_id} is not among the '
      f'{len(encoded_by_client)} clients with data'
    ) from None
  if not len(encoded.trainable):
    raise ValueError(
      f'client_id={client_id} has no example with an answer left to train '
      'on. Raise max_length or give the client other examples.'
    )
  return encoded


def _values(
  encoded_by_client: EncodedByClient,
) -> Sequence[templates.EncodedExamples]:
  """Returns the examples of all clients; raises if there are no clients."""
  if isinstance(encoded_by_client, Mapping):
    encoded_by_client = list(encoded_by_client.values())
  if not encoded_by_client:
    raise ValueError('encoded_by_client is empty: there are no clients')
  return encoded_by_client
