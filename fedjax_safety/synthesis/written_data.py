"""The pairs of attack and defense: read from files, or written by a model.

What a model wrote is kept in a file, which a resumed run finds, beside a
manifest of how it was asked.
"""

import dataclasses
import json
import pathlib
import random
from typing import Any

from fedjax_safety import arm as arm_lib
from fedjax_safety import (
  assembly,
  client_data,
  distributed,
  endpoint,
  probe,
  synthesis,
  types,
  workdir,
)
from fedjax_safety import config as config_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.config import defense_checks
from fedjax_safety.data import sources
from fedjax_safety.endpoint import replies
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.models import sampler as sampler_lib
from fedjax_safety.settings import endpoint as endpoint_settings
from fedjax_safety.synthesis import filters as written_filters

# What each use of randomness folds into the run's key.
_ATTACK_DATA, _DEFENSE_DATA = 11, 12
# Keeps the draw of level public apart from the draws of the clients.
_PUBLIC_SEED = 1_000_003

Examples = list[sources.Example]


def attack_data(
  arm: arm_lib.Arm, clients: dict[int, Examples]
) -> list[sources.Example]:
  """Returns the unaligned pairs of this arm's malicious clients.

  Pairs that a model writes are made once for all arms that ask alike.

  Args:
    arm: the arm.
    clients: the clients' data before any is poisoned.
  """
  config, threat = arm.config, arm.config.threat_model
  if not threat.num_malicious or threat.data_attack == 'none':
    return []
  count = client_data.num_unaligned(config, clients)
  if threat.data_attack == 'file':
    return assembly.examples(threat.unaligned, count=count, seed=config.seed)
  asked = _asked(config, threat.generator, threat.generation)
  asked['count'] = count
  knows = threat.data_attack == 'repair'
  if knows:
    asked |= _known(config)
  name = f'attack-{config_lib.digest(asked)}'
  path = arm.root / 'synthesis' / f'{name}.jsonl'
  if not distributed.on_first(path.exists):
    writer = _writer(
      config, _generator(arm, 'threat_model'), None, threat.generation
    )
    key = arm.key(_ATTACK_DATA)
    if knows:
      written = writer.answered(_known_requests(arm, count), key=key)
    else:
      written = writer.unaligned(count, key=key)
    pairs = written.pairs
    manifest = {
      **asked,
      'distinct_prompts': _distinct(pairs),
      'filters': {'unaligned': written.account},
    }
    distributed.on_first(
      workdir.write_examples,
      path,
      pairs,
      path.with_suffix('.manifest.json'),
      manifest,
    )
  return _read_examples(path)


def _known(config: settings_lib.ExperimentConfig) -> dict[str, Any]:
  """Returns all that the requests that an attacker knows depend on."""
  repair = config.defense.repair
  return {
    'known_level': config.threat_model.known_level,
    'public_aligned': repair.public_aligned,
    'known': _asked(config, repair.external_model, repair.generation),
    'num_aligned': _num_aligned(repair),
  }


def _num_aligned(repair: settings_lib.RepairConfig) -> int:
  """Returns how many of the defense data are aligned."""
  return round(repair.aligned_share * repair.num_examples)


def check_known(config: settings_lib.ExperimentConfig) -> None:
  """Loads what the requests come from that an attacker knows.

  Raises:
    ValueError: it cannot be read.
  """
  if config.threat_model.known_level == 'external':
    load_generator(config, 'defense.repair')
  else:
    source = config.defense.repair.public_aligned
    assembly.examples(source, count=1, seed=config.seed)


def _known_requests(arm: arm_lib.Arm, count: int) -> list[str]:
  """Returns the harmful requests that the repair will be tuned on, in turn.

  Raises:
    ValueError: there are none.
  """
  level, repair = arm.config.threat_model.known_level, arm.config.defense.repair
  # The normal data are drawn apart, so that none need be written here.
  aligned, _ = _made(arm, level, None, _num_aligned(repair), 0)
  if not aligned.pairs:
    raise ValueError(
      f"threat_model.data_attack='repair' found no aligned data of level "
      f'{level}; give defense.repair.public_aligned, or an aligned_share '
      f'above 0'
    )
  pairs = aligned.pairs
  return [pairs[i % len(pairs)].prompt for i in range(count)]


def _asked(
  config: settings_lib.ExperimentConfig,
  source: str,
  generation: settings_lib.GenerationConfig,
) -> dict[str, Any]:
  """Returns who was asked for data, and how, as far as it decides on them."""
  asked = config_lib.as_dict(generation)
  parameters = asked.pop('endpoint')['parameters']
  return {
    'source': source,
    'generation': asked | {'parameters': parameters},
    'max_new_tokens': config.evaluation.max_new_tokens,
    'template': config.model.template,
    'seed': config.seed,
  }


def _distinct(pairs: Examples) -> int:
  """Returns how many different prompts there are."""
  return len({example.prompt for example in pairs})


def _named(
  config: settings_lib.ExperimentConfig, group: str
) -> tuple[str, str, endpoint_settings.EndpointConfig]:
  """Returns a model that writes data, its setting, and how it is asked.

  Args:
    config: the settings.
    group: threat_model, or defense.repair.
  """
  if group == 'threat_model':
    threat = config.threat_model
    setting, how = f'{group}.generator', threat.generation
    return threat.generator, setting, how.endpoint
  repair = config.defense.repair
  setting, how = f'{group}.external_model', repair.generation
  return repair.external_model, setting, how.endpoint


def load_generator(
  config: settings_lib.ExperimentConfig, group: str
) -> assembly.LanguageModel | endpoint.Endpoint:
  """Loads a model that writes data, in the dtype and template of the run.

  Of an endpoint nothing is asked yet.

  Args:
    config: the settings.
    group: threat_model, or defense.repair: whose model.

  Raises:
    ValueError: it cannot be loaded, or an endpoint lacks what it needs.
  """
  name, setting, how = _named(config, group)
  if endpoint.is_endpoint(name):
    return endpoint.Endpoint(name, setting, how)
  return assembly.load_model(name, config.model.dtype, config.model.template)


def missing_endpoints(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path
) -> list[endpoint.Endpoint]:
  """Returns the endpoints that an arm has yet to ask for data.

  Args:
    config: the arm's settings.
    directory: where the arm's files are.
  """
  threat, groups = config.threat_model, []
  federated = (directory / 'adapters' / 'federated').is_dir()
  if not config.given_adapter and not federated and threat.num_malicious:
    if threat.data_attack in ('generated', 'repair'):
      groups.append('threat_model')
  if 'external' in config.defense.repair.levels:
    if not workdir.defense_data(directory, 'external').exists():
      groups.append('defense.repair')
  return [
    load_generator(config, group)
    for group in groups
    if endpoint.is_endpoint(_named(config, group)[0])
  ]


def _generator(
  arm: arm_lib.Arm, group: str
) -> sampler_lib.Sampler | replies.EndpointSampler:
  """Returns a model that writes data, ready to be asked."""
  model = load_generator(arm.config, group)
  if isinstance(model, endpoint.Endpoint):
    return replies.EndpointSampler(
      model,
      arm.replies,
      arm.config.evaluation.max_new_tokens,
      arm.config.performance.generation_batch_size,
      arm.stop.check,
    )
  return assembly.make_sampler(model, arm.config)


def _writer(
  config: settings_lib.ExperimentConfig,
  sampler: sampler_lib.Sampler | replies.EndpointSampler,
  adapter: types.Adapter | None,
  generation: settings_lib.GenerationConfig,
) -> synthesis.Writer:
  """Returns a model that writes data; it must not write evaluation prompts."""
  sets = evaluation_inputs.evaluation_sets(config.evaluation).values()
  return synthesis.Writer(
    sampler,
    adapter,
    generation,
    frozenset(
      written_filters.normal_form(e.prompt)
      for _, prompts in sets
      for e in prompts
    ),
  )


def _read_examples(path: pathlib.Path) -> Examples:
  """Returns the pairs of a file that `workdir.write_examples` wrote."""
  text = distributed.on_first(path.read_text)
  # A text may hold any other separator of lines.
  rows = map(json.loads, text.rstrip('\n').split('\n'))
  return [
    sources.Example(row.pop('instruction'), row.pop('response'), row)
    for row in rows
  ]


def _public(
  arm: arm_lib.Arm, num_aligned: int, num_normal: int
) -> tuple[Examples, Examples]:
  """Returns (aligned, normal) drawn from the given data sets.

  A file that clients hold as well may give the same example to both; the
  report's audit counts such overlap. Without aligned data all are normal.
  """
  config, seed = arm.config.defense.repair, arm.config.seed + _PUBLIC_SEED
  shuffler = random.Random(seed)

  def draw(source, count):
    if not source or not count:
      return []
    found = assembly.examples(source, count=count, seed=seed)
    shuffler.shuffle(found)
    return found[:count]

  if not config.public_aligned:
    num_normal += num_aligned
  return (
    draw(config.public_aligned, num_aligned),
    draw(config.public_normal, num_normal),
  )


def _made(
  arm: arm_lib.Arm,
  level: str,
  adapter: types.Adapter | None,
  num_aligned: int,
  num_normal: int,
) -> tuple[synthesis.Written, synthesis.Written]:
  """Returns (aligned, normal) of a level, read or written anew.

  The adapter writes at level self; the others do not depend on the rounds.
  """
  config = arm.config
  if level == 'public':
    aligned, normal = _public(arm, num_aligned, num_normal)
    return synthesis.Written(aligned, {}), synthesis.Written(normal, {})
  if level == 'external':
    sampler, adapter = _generator(arm, 'defense.repair'), None
  else:
    sampler = assembly.make_sampler(assembly.tuned_model(config), config)
  writer = _writer(config, sampler, adapter, config.defense.repair.generation)
  return writer.defense(num_aligned, num_normal, key=arm.key(_DEFENSE_DATA))


def defense_data(
  arm: arm_lib.Arm, level: str, adapter: types.Adapter
) -> Examples:
  """Returns the defense data of a level, made and written down once.

  The metadata of each pair says its kind, aligned or normal.

  Raises:
    ValueError: data that were written down do not say it.
  """
  path = arm.defense_data(level)
  if distributed.on_first(path.exists):
    pairs = _read_examples(path)
    if not all('kind' in pair.metadata for pair in pairs):
      raise ValueError(
        f'{path} does not say of each pair whether it is aligned or normal; '
        f'remove it, and it is written anew'
      )
    return pairs
  config = arm.config.defense.repair
  num_aligned = _num_aligned(config)
  made = _made(
    arm, level, adapter, num_aligned, config.num_examples - num_aligned
  )
  source = {
    'public': [config.public_aligned, config.public_normal],
    'external': config.external_model,
    'self': 'the adapter',
  }[level]
  parts = dict(zip(('aligned', 'normal'), made, strict=True))
  pairs = [
    dataclasses.replace(pair, metadata={'kind': kind})
    for kind, part in parts.items()
    for pair in part.pairs
  ]
  random.Random(arm.config.seed).shuffle(pairs)
  manifest = {
    'level': level,
    **_asked(arm.config, source, config.generation),
    **{name: len(part.pairs) for name, part in parts.items()},
    'distinct_prompts': _distinct(pairs),
    'filters': {n: part.account for n, part in parts.items() if part.account},
  }
  distributed.on_first(
    workdir.write_examples,
    path,
    pairs,
    path.with_name('manifest.json'),
    manifest,
  )
  return _read_examples(path)


def audit_sets(arm: arm_lib.Arm, unaligned: Examples) -> dict[str, list[str]]:
  """Returns the prompts of attack, defense and evaluation, by name."""
  sets = {'attack': [e.prompt for e in unaligned]}
  if defense_checks.probe_sources(arm.config):
    sets['defense, probe'] = [e.prompt for e in probe.held_pairs(arm.config)]
  for level in arm.config.defense.repair.levels:
    pairs = _read_examples(arm.defense_data(level))
    sets[f'defense, {level}'] = [e.prompt for e in pairs]
  prompts_of = evaluation_inputs.evaluation_sets(arm.config.evaluation)
  for name, (role, prompts) in prompts_of.items():
    if role == 'harmful':
      sets[f'evaluation, {name}'] = [e.prompt for e in prompts]
  return {name: prompts for name, prompts in sets.items() if prompts}
