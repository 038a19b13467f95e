"""A table of arms, run as far as it goes: what is done is left as it is."""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fedjax_safety import arm as arm_lib
from fedjax_safety import config as config_lib
from fedjax_safety import distributed, experiment, workdir
from fedjax_safety import settings as settings_lib

_FEDERATED = 'federated'


def run(
  config: Mapping[str, Any],
  directory: str | pathlib.Path,
  *,
  allow_config_change: bool = False,
) -> tuple[pathlib.Path, list[str]]:
  """Runs or resumes every arm at every seed of a config that has a table.

  Finished arms are skipped without loading anything of theirs. Arms that
  differ only in what follows the rounds share one federation. An arm that
  fails, because its model writes no usable defense data for example, does not
  keep the others from running; the next call tries it again. Several processes
  may run the same sweep in one directory: each takes what no other one runs.

  Args:
    config: a ConfigDict made from `config.default()`, or the same as a dict.
    directory: the work directory.
    allow_config_change: go on with another config, such as one of more seeds;
      what is done stays as it is.

  Returns:
    The path of `report.html`, and a sentence for every arm that failed.

  Raises:
    ValueError: the config has no table, or is unusable; nothing has run yet.
    interrupt.Interrupted: asked to stop; run again to resume.
  """
  if not config_lib.to_json(config).get('paper', {}).get('rows'):
    raise ValueError(
      'the config has no table: paper.rows is empty; use the command run'
    )
  root, failures = pathlib.Path(directory), []
  places = _places(config, root)
  with experiment.arms_of(
    config, root, allow_config_change=allow_config_change, skip=_is_done
  ) as arms:
    for rounds, group in _by_rounds(arms).items():
      with _claimed(root, rounds) as is_ours:
        for arm in group if is_ours else ():
          failures += _run_arm(arm, places[rounds], arms)
        if not is_ours:
          _say(f'{", ".join(map(_words, group))}: another process runs this')
  return experiment.write_report(root), failures


def _by_rounds(arms: list[arm_lib.Arm]) -> dict[str, list[arm_lib.Arm]]:
  """Returns the arms that share a federation, by `_rounds`."""
  groups = {}
  for arm in arms:
    groups.setdefault(_rounds(arm.config), []).append(arm)
  return groups


@contextlib.contextmanager
def _claimed(root: pathlib.Path, rounds: str) -> Iterator[bool]:
  """Yields whether this run is the one that has some rounds, until it ends."""
  with contextlib.ExitStack() as stack:
    yield distributed.on_first(
      lambda: stack.enter_context(workdir.lock(root, rounds))
    )


def _run_arm(
  arm: arm_lib.Arm, places: list[pathlib.Path], arms: list[arm_lib.Arm]
) -> list[str]:
  """Runs an arm; returns a sentence if it failed."""
  # Another process may have done it since this one began.
  if _is_done(arm.directory, arm.config):
    return []
  _say(f'[{arms.index(arm) + 1}/{len(arms)}] {_words(arm)}')
  try:
    _share_federation(arm, places)
    experiment.run_arm(arm)
  except ValueError as error:
    return [f'{_words(arm)}: {error}']
  return []


def _words(arm: arm_lib.Arm) -> str:
  """Returns which arm it is."""
  return f'{arm.name}, seed {arm.config.seed}'


def _say(text: str) -> None:
  """Tells the user, once."""
  if distributed.is_first():
    print(text, file=sys.stderr)


def _is_done(
  directory: pathlib.Path, config: settings_lib.ExperimentConfig
) -> bool:
  """Whether every stage of an arm is measured and its audit is written."""
  levels = config.defense.repair.levels
  stages = (_FEDERATED, *(f'repair_{level}' for level in levels))
  files = [f'evaluations/{stage}.jsonl' for stage in stages]
  return distributed.on_first(
    lambda: all((directory / name).exists() for name in (*files, 'audit.json'))
  )


def _places(
  config: Mapping[str, Any], root: pathlib.Path
) -> dict[str, list[pathlib.Path]]:
  """Returns where adapters of equal rounds may be, by `_rounds`."""
  places = {}
  for (name, seed), experiment_ in config_lib.resolve(config).items():
    directory = workdir.arm_directory(root, name, seed)
    places.setdefault(_rounds(experiment_), []).append(directory)
  return places


def _share_federation(arm: arm_lib.Arm, places: list[pathlib.Path]) -> None:
  """Copies the federated adapter of an arm with the same rounds, if any."""
  name = f'adapters/{_FEDERATED}'
  for place in places:
    if place != arm.directory and distributed.on_first(
      _copy, place / name, arm.directory / name
    ):
      return


def _copy(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Copies a directory, whole or not at all, unless there is one already."""
  if target.is_dir() or not source.is_dir():
    return target.is_dir()
  part = target.with_name(f'.{target.name}.part')
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(source, part)
  part.rename(target)
  return True


def _rounds(config: settings_lib.ExperimentConfig) -> str:
  """Returns a hash of all that the federated adapter depends on.

  The evaluation counts: generated attack data must not hold its prompts. So
  does the repair where the attacker knows it. How nobody attacks does not, and
  neither does performance, some of which is settled only on the device.
  """
  repair, threat_model = settings_lib.RepairConfig(), config.threat_model
  if not threat_model.num_malicious:
    threat_model = settings_lib.ThreatModelConfig()
  if threat_model.data_attack == 'repair':
    repair = dataclasses.replace(config.defense.repair, levels=())
  return config_lib.digest(
    dataclasses.replace(
      config,
      label='',
      threat_model=threat_model,
      performance=settings_lib.PerformanceConfig(),
      defense=dataclasses.replace(config.defense, repair=repair),
    )
  )
