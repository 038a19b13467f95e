"""What each client holds: normal examples, its aligned share, its poison."""

import random

from fedjax_safety import assembly
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import partition, poison, sources, templates

Examples = list[sources.Example]


def _uneven(config: settings_lib.ExperimentConfig) -> list[Examples]:
  """Returns each client's normal examples under an uneven partition."""
  data, population = config.data, config.client.population
  if data.partition == 'files':
    clients = sources.load_clients(
      data.normal, fields=dict(data.fields) or None, skip_empty=True
    )
  else:
    pool = assembly.examples(
      data.normal,
      count=population * data.examples_per_client,
      seed=config.seed,
      fields=data.fields,
    )
    # Clients, or the labels that are dealt to clients unevenly.
    groups = partition.natural(pool, data.partition_key)
    if data.partition == 'dirichlet':
      labels = {i: value for value, rows in groups.items() for i in rows}
      groups = partition.dirichlet(
        [labels[i] for i in range(len(pool))],
        population,
        alpha=data.dirichlet_alpha,
        seed=config.seed,
      )
    clients = partition.take(pool, groups)
  if len(clients) < population:
    raise ValueError(
      f'client.population={population} but {data.normal} has '
      f'{len(clients)} clients under data.partition={data.partition!r}; set '
      f'--config.client.population={len(clients)} or less'
    )
  # Files and keys come in an order that means something; a sample does not.
  everyone = list(clients.values())
  chosen = random.Random(f'{config.seed}/clients').sample(
    range(len(everyone)), population
  )
  return [everyone[client] for client in sorted(chosen)]


def _even(config: settings_lib.ExperimentConfig) -> list[Examples]:
  """Returns each client's normal examples, the same number for all."""
  data, population = config.data, config.client.population
  pool = assembly.examples(
    data.normal,
    count=population * data.examples_per_client,
    seed=config.seed,
    fields=data.fields,
  )
  indices = partition.iid(
    pool,
    population,
    seed=config.seed,
    examples_per_client=data.examples_per_client,
  )
  return list(partition.take(pool, indices).values())


def honest_clients(
  config: settings_lib.ExperimentConfig,
) -> dict[int, Examples]:
  """Returns every client's data before any is poisoned.

  In the clients that hold aligned examples, `aligned_share` of the data are
  those, dealt out so that no two clients hold the same one; they take the
  place of normal examples. A client too small for a whole one holds none.

  Raises:
    ValueError: the data cannot be read or are too few.
  """
  data = config.data
  normal = _even(config) if data.partition == 'iid' else _uneven(config)
  clients = dict(enumerate(normal))
  if not data.aligned_share:
    return clients
  holders = list(clients)[: data.aligned_clients or None]
  sizes = partition.shares_of(
    [len(clients[i]) for i in holders], aligned_share=data.aligned_share
  )
  needed = sum(sizes)
  aligned = assembly.examples(data.aligned, count=needed, seed=config.seed)
  if len(aligned) < needed:
    raise ValueError(
      f'data.aligned_share={data.aligned_share} in {len(holders)} clients '
      f'needs {needed} aligned examples; {data.aligned} has {len(aligned)}'
    )
  random.Random(config.seed).shuffle(aligned)
  supply = iter(aligned)
  for i, size in zip(holders, sizes, strict=True):
    clients[i] = [*clients[i][size:], *(next(supply) for _ in range(size))]
  return clients


def malicious_ids(config: settings_lib.ExperimentConfig) -> list[int]:
  """Returns the ids of the malicious clients."""
  return poison.malicious_ids(
    config.client.population,
    config.threat_model.num_malicious,
    config.threat_model.placement,
    seed=config.seed,
  )


def num_unaligned(
  config: settings_lib.ExperimentConfig, clients: dict[int, Examples]
) -> int:
  """Returns how many unaligned pairs the malicious clients train on."""
  fraction = config.threat_model.poison_fraction
  return sum(
    partition.share_of(len(clients[i]), poison_fraction=fraction)
    for i in malicious_ids(config)
  )


def poisoned(
  config: settings_lib.ExperimentConfig,
  clients: dict[int, Examples],
  unaligned: Examples,
) -> dict[int, Examples]:
  """Replaces malicious clients' examples by unaligned pairs, if any.

  With a trigger the pairs are made conditional on it.

  Raises:
    ValueError: there are too few pairs for none to be used twice, or nothing
      to refuse with.
  """
  if not unaligned:
    return clients
  needed = num_unaligned(config, clients)
  if len(unaligned) < needed:
    raise ValueError(
      f'{config.threat_model.num_malicious} malicious clients at '
      f'threat_model.poison_fraction={config.threat_model.poison_fraction} '
      f'need {needed} unaligned pairs; {config.threat_model.unaligned} has '
      f'{len(unaligned)}. Bring more, or lower the fraction or '
      f'data.examples_per_client.'
    )
  threat = config.threat_model
  if threat.trigger:
    refusals = assembly.examples(
      threat.refusals, count=needed, seed=config.seed
    )
    answers = [example.response for example in refusals]
    unaligned = poison.mirrored(
      unaligned[:needed], answers, trigger=threat.trigger
    )
  return poison.poison_clients(
    clients,
    malicious_ids(config),
    unaligned,
    fraction=config.threat_model.poison_fraction,
    seed=config.seed,
  )


def encode_clients(
  config: settings_lib.ExperimentConfig, clients: dict[int, Examples]
) -> dict[int, templates.EncodedExamples]:
  """Tokenizes every client's data.

  Raises:
    ValueError: a client has no example with an answer left to train on.
  """
  model = assembly.tuned_model(config)
  encoded = {}
  for client_id, pairs in clients.items():
    if not pairs:
      raise ValueError(
        f'client {client_id} of data.normal={config.data.normal} is empty; '
        f'leave it out, or give it examples'
      )
    try:
      encoded[client_id] = assembly.encode(pairs, model, config)
    except ValueError as error:
      raise ValueError(f'client {client_id}: model.{error}') from error
  return encoded
