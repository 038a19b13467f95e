"""Looks at all that the arms of a run will need, before any of them begins."""

import pathlib
from collections.abc import Mapping

import tqdm

from fedjax_safety import (
  assembly,
  client_data,
  distributed,
  probe,
  safe_lora,
  stages,
  workdir,
)
from fedjax_safety import config as config_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.config import defense_checks
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.plan import settle
from fedjax_safety.synthesis import written_data

_Arms = Mapping[tuple[str, int], settings_lib.ExperimentConfig]


def check(
  arms: _Arms, root: pathlib.Path
) -> dict[tuple[str, int], settle.Choice]:
  """Loads every file that some arms will need, and raises if one is unusable.

  What several arms have in common is looked at once.

  Args:
    arms: settings by name and seed.
    root: the work directory, for what is written there already.

  Returns:
    What the settings of each arm leave to the program, chosen.

  Raises:
    ValueError: in one sentence: what, where, what to do. What the devices
      cannot do or hold is refused before any weight is read.
  """
  needs = {arm: _needs(config) for arm, config in arms.items()}
  different = {needs[arm]: config for arm, config in arms.items()}
  trained = {
    _trained_on(config): config
    for config in arms.values()
    if not config.given_adapter
  }
  choices = {}
  with tqdm.tqdm(
    total=len(different) + len(trained),
    desc='Checking inputs',
    leave=False,
    disable=None if distributed.is_first() else True,
  ) as bar:
    for need, config in different.items():
      choices[need] = _check_files(config)
      bar.update()
    for config in trained.values():
      _check_clients(config)
      bar.update()
  distributed.on_first(_check_endpoints, arms, root)
  return {arm: choices[need] for arm, need in needs.items()}


def _needs(config: settings_lib.ExperimentConfig) -> str:
  """Returns what decides which files an arm needs: all but label and rule."""
  tree = config_lib.as_dict(config)
  tree['label'] = tree['defense']['aggregator'] = ''
  tree['defense']['aggregator_kwargs'] = {}
  tree['holds'] = defense_checks.probe_sources(config)
  return config_lib.digest(tree)


def _trained_on(config: settings_lib.ExperimentConfig) -> str:
  """Returns what decides the data of an arm's clients."""
  tree = config_lib.as_dict(config)
  for name in ('label', 'lora', 'server', 'checkpoint'):
    del tree[name]
  if config.threat_model.data_attack != 'repair':
    del tree['defense'], tree['evaluation']
  return config_lib.digest(tree)


def _check_files(config: settings_lib.ExperimentConfig) -> settle.Choice:
  """Checks all but the clients' data."""
  distributed.check_mesh(config.performance.mesh)
  choice = settle.settle(config)
  assembly.tuned_model(config)
  evaluation_inputs.evaluation_sets(config.evaluation)
  evaluation_inputs.judges(config)
  evaluation_inputs.scorers(config)
  evaluation_inputs.code_sandbox(config)
  if config.given_adapter:
    stages.given_adapter(config)
  else:
    probe.held(config, assembly.tuned_model(config))
    probe.sent(config, assembly.tuned_model(config))
    safe_lora.subspaces(config)
  repair = config.defense.repair
  if 'public' in repair.levels:
    for source in (repair.public_aligned, repair.public_normal):
      if source:
        assembly.examples(source, count=1, seed=config.seed)
  if 'external' in repair.levels:
    written_data.load_generator(config, 'defense.repair')
  return choice


def _check_clients(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless every client, poisoned as it will be, can train."""
  clients, threat = client_data.honest_clients(config), config.threat_model
  if threat.num_malicious and threat.data_attack in ('generated', 'repair'):
    written_data.load_generator(config, 'threat_model')
  if threat.num_malicious and threat.data_attack == 'repair':
    written_data.check_known(config)
  if threat.num_malicious and threat.trigger:
    assembly.examples(threat.refusals, count=1, seed=config.seed)
  if threat.num_malicious and threat.data_attack == 'file':
    count = client_data.num_unaligned(config, clients)
    unaligned = assembly.examples(
      threat.unaligned, count=count, seed=config.seed
    )
    clients = client_data.poisoned(config, clients, unaligned)
  client_data.encode_clients(config, clients)


def _check_endpoints(arms: _Arms, root: pathlib.Path) -> None:
  """Raises unless every endpoint that is yet to be asked answers now."""
  checked = set()
  for (name, seed), config in arms.items():
    directory = workdir.arm_directory(root, name, seed)
    for chosen in (
      *written_data.missing_endpoints(config, directory),
      *stages.endpoints_to_judge(config, directory),
    ):
      if (chosen.url, chosen.model) not in checked:
        chosen.check()
        checked.add((chosen.url, chosen.model))
