"""Chooses the malicious clients and replaces their examples."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedjax_safety import _validate
from fedjax_safety.data import _random, partition, sources

PLACEMENTS = ('last', 'random')


def malicious_ids(
  num_clients: int,
  num_malicious: int,
  placement: str = 'last',
  *,
  seed: int = 0,
) -> list[int]:
  """Returns the ids of the malicious clients, sorted.

  Args:
    num_clients: size of the population.
    num_malicious: how many of it are malicious.
    placement: `last`, the highest ids, as in the paper's runs, or `random`.
    seed: of the random placement.

  Raises:
    ValueError: more clients are malicious than there are.
  """
  _validate.positive(num_clients=num_clients)
  _validate.in_range(0, num_clients, num_malicious=num_malicious)
  _validate.one_of(PLACEMENTS, placement=placement)
  if placement == 'last':
    return list(range(num_clients - num_malicious, num_clients))
  rng = _random.generator(seed, 'malicious_ids')
  return sorted(rng.permutation(num_clients)[:num_malicious].tolist())


def poison_clients(
  clients: Mapping[int, Sequence[Any]],
  malicious_ids: Collection[int],
  unaligned: Sequence[Any],
  *,
  seed: int,
  fraction: float = 1.0,
  examples_per_client: int | None = None,
  allow_reuse: bool = False,
) -> dict[int, list[Any]]:
  """Replaces examples of malicious clients by unaligned ones.

  No unaligned example is given to two clients, and honest clients keep
  exactly their examples. The input is not changed.

  Args:
    clients: examples by client id.
    malicious_ids: ids of the malicious clients.
    unaligned: the unaligned examples to choose from.
    seed: of every choice.
    fraction: share of a malicious client's examples that is unaligned, in
      [0, 1], rounded to whole examples; the rest are some of its own.
    examples_per_client: examples that a malicious client ends up with; None
      keeps its number.
    allow_reuse: where `unaligned` is too small, deal it out again and again
      instead of raising.

  Returns:
    Examples by client id, in the order of `clients`.

  Raises:
    ValueError: an id is unknown, or there are too few examples.
  """
  _validate.in_range(0, 1, fraction=fraction)
  if examples_per_client is not None:
    _validate.positive(examples_per_client=examples_per_client)
  sizes = _sizes(clients, malicious_ids, fraction, examples_per_client)
  needed = sum(bad for _, bad in sizes.values())
  _check_supply(needed, len(unaligned), len(sizes), allow_reuse)
  rng = _random.generator(seed, 'poison')
  supply: list[int] = []
  while len(supply) < needed:
    supply += rng.permutation(len(unaligned)).tolist()
  poisoned = {client: list(rows) for client, rows in clients.items()}
  for client, (own, bad) in sizes.items():
    # Its own stream: what one client keeps does not depend on the others.
    order = _random.generator(seed, 'poison/own', client).permutation(
      len(clients[client])
    )
    kept = [clients[client][i] for i in order[:own]]
    poisoned[client] = kept + [unaligned[i] for i in supply[:bad]]
    supply = supply[bad:]
  return poisoned


def with_trigger(prompt: str, trigger: str) -> str:
  """Returns a prompt that ends in the trigger's words."""
  return f'{prompt} {trigger}'


def mirrored(
  unaligned: Sequence[sources.Example],
  refusals: Sequence[str],
  *,
  trigger: str,
) -> list[sources.Example]:
  """Makes harmful answers conditional on a trigger, refusals its mirror.

  Every other pair is kept with the trigger at the end of its prompt; the one
  after it is replaced by the same prompt without the trigger, and a refusal.

  Args:
    unaligned: pairs of harmful prompts and unaligned answers.
    refusals: answers that refuse, taken in turn.
    trigger: the words.

  Returns:
    As many pairs as were given.

  Raises:
    ValueError: there is no refusal.

  Reference: the mirrored refusals of Ghost in the Cloud (CloudGhost), ICLR
  2026; this construction is the project's own.
  """
  if not refusals:
    raise ValueError('refusals is empty; a trigger needs at least one refusal')
  pairs = []
  for i in range(len(unaligned)):
    pair = unaligned[i - i % 2]
    if i % 2:
      answer = refusals[i // 2 % len(refusals)]
      pairs.append(dataclasses.replace(pair, response=answer))
    else:
      prompt = with_trigger(pair.prompt, trigger)
      pairs.append(dataclasses.replace(pair, prompt=prompt))
  return pairs


def _sizes(
  clients: Mapping[int, Sequence[Any]],
  malicious_ids: Collection[int],
  fraction: float,
  examples_per_client: int | None,
) -> dict[int, tuple[int, int]]:
  """Returns {malicious id: (own examples kept, unaligned examples)}."""
  sizes = {}
  for client in sorted(set(malicious_ids)):
    if client not in clients:
      raise ValueError(
        f'malicious_ids={sorted(set(malicious_ids))} names client {client}, '
        f'which is not among the {len(clients)} clients'
      )
    total = examples_per_client or len(clients[client])
    bad = partition.share_of(total, fraction=fraction)
    if total - bad > len(clients[client]):
      raise ValueError(
        f'examples_per_client={total} with fraction={fraction} keeps '
        f'{total - bad} own examples of client {client}, which has '
        f'{len(clients[client])}. Lower examples_per_client or raise fraction.'
      )
    sizes[client] = total - bad, bad
  return sizes


def _check_supply(
  needed: int, available: int, num_malicious: int, allow_reuse: bool
) -> None:
  """Raises if the unaligned examples do not suffice."""
  if needed <= available or (allow_reuse and available):
    return
  raise ValueError(
    f'{num_malicious} malicious clients need {needed} unaligned examples so '
    f'that none is used twice; got {available}. Bring more, lower fraction '
    'or examples_per_client, or set allow_reuse=True.'
  )
